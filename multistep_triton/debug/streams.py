"""Random streams that compare a backend with the specification, and the reference with torchrl's transform.

Owns the data of the streams and both comparisons. May import the package, ``parity`` and torchrl.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy
import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor
from torchrl.data import LazyTensorStorage
from torchrl.envs.transforms import MultiStepTransform as TorchRLMultiStepTransform

from multistep_triton.debug.parity import find_difference
from multistep_triton.replay_buffer import NStepReplayBuffer
from multistep_triton.transform import MultiStepTransform


@dataclass(frozen=True)
class Kind:
    """The properties of a stream that kernels are compiled for; all others are random."""

    n_steps: int
    observation: tuple[int, ...] = (3,)
    dtype: torch.dtype = torch.float32
    """The dtype of observations."""
    rewards: tuple[torch.dtype, ...] = (torch.float32,)
    features: tuple[int, ...] = (1,)
    """The trailing shape of rewards."""
    agents: int = 0
    """The number of agents, each of which has a done flag; 0 if one flag serves all."""
    mask: bool = False
    traj: torch.dtype | None = None
    layout: str = "contiguous"
    """``"contiguous"``, ``"time-major"``, or ``"channels-last"``, in which the last feature dimension is outermost."""
    done_at: str = "start"
    match_reward_shape: bool = False


TORCHRL_KINDS = (
    Kind(3),
    Kind(1, observation=(17,)),
    Kind(8, observation=(4,)),
    Kind(2, observation=(4, 5, 6), dtype=torch.uint8),
    Kind(20),
)
KINDS = (
    *TORCHRL_KINDS,
    Kind(5, rewards=(torch.float64,), features=()),
    Kind(3, rewards=(torch.float16, torch.bfloat16, torch.int64), features=(2,)),
    Kind(2, observation=(4, 5, 6), dtype=torch.uint8, layout="time-major"),
    Kind(3, observation=(64,), dtype=torch.bfloat16, layout="time-major"),
    Kind(2, observation=(4, 5, 6), dtype=torch.float16, layout="channels-last"),
    Kind(3, observation=(2501,), dtype=torch.uint8, features=(600,)),
    Kind(4, mask=True),
    Kind(12, mask=True, features=()),
    Kind(3, traj=torch.int64),
    Kind(9, traj=torch.int32, mask=True, layout="time-major"),
    Kind(3, agents=3),
    Kind(10, agents=2, mask=True, done_at="end"),
    Kind(3, done_at="end", match_reward_shape=True),
    Kind(70, mask=True, traj=torch.int16),
)


class Result(NamedTuple):
    """The result of one stream."""

    frames: int
    """The number of frames that were compared."""
    difference: str | None = None
    """A message about the first difference or failure; None if there is none."""


class Stream:
    """A random sequence of rollouts ``[*B, T]``, each of which continues the one before; a seed fixes all values."""

    def __init__(self, seed: int, kinds: tuple[Kind, ...], *, torchrl: bool = False) -> None:
        chance = random.Random(seed)
        self.kind = kinds[seed % len(kinds)]
        # A wide row has many tiles, and Triton's interpreter takes milliseconds for each.
        wide = torch.Size(self.kind.observation).numel() > 1000
        self.batch = chance.choice([(), (1,)] if wide else [(), (1,), (5,), (2, 3), (40,)])
        few, many = (0, 3) if wide else (9, 30)
        self.cuts = [chance.choice([1, 2, few, chance.randint(3, many)]) for _ in range(chance.randint(1, 4))]
        self.gamma = chance.choice([0.0, 0.5, 0.99, 1.0, chance.random()])
        self.p_done = chance.choice([0.0, 0.1, 0.5])
        self.torchrl = torchrl
        """Whether data suits torchrl's transform: finite rewards, none negative; ``terminated`` implies ``done``."""
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._group = ("agents",) if self.kind.agents else ()
        """The path under "next" of the group that holds done flags and rewards."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of a transform or a buffer for this stream."""
        kind = self.kind
        done_keys: list[NestedKey] = [(*self._group, "done"), (*self._group, "terminated")]
        return {
            "n_steps": kind.n_steps,
            "gamma": self.gamma,
            "reward_keys": [(*self._group, f"reward{i or ''}") for i in range(len(kind.rewards))],
            "done_key": done_keys[0],
            "done_keys": done_keys,
            "done_at": kind.done_at,
            "traj_key": "traj_ids" if kind.traj else None,
            "match_reward_shape": kind.match_reward_shape,
        }

    def buffer(self, device: torch.device) -> NStepReplayBuffer:
        """Returns a buffer for all or part of the stream; by chance it draws n per sample or is compact, or both."""
        n_steps, most = self.kind.n_steps, self.kind.n_steps + sum(self.cuts)
        chance = random.Random(most)
        capacity = torch.Size(self.batch).numel() * chance.randint(n_steps, most)
        arguments = self.arguments
        if chance.random() < 0.5:
            arguments["n_steps"] = (1, n_steps)
        if chance.random() < 0.5:
            arguments.update(compact=True, end_slots=chance.randint(1, n_steps))
        return NStepReplayBuffer(
            **arguments,
            backend="verify",
            storage=LazyTensorStorage(capacity, ndim=len(self.batch) + 1, device=device),
            batch_size=chance.randint(1, min(capacity, 40)),
            generator=torch.Generator(device).manual_seed(capacity),
        )

    def rollouts(self, device: torch.device) -> Iterator[TensorDict]:
        """Yields the rollouts, one for each call of the transform or of the buffer's ``extend``."""
        kind, agents = self.kind, (self.kind.agents,) if self.kind.agents else ()
        before: TensorDict | None = None
        for frames in self.cuts:
            shape = (*self.batch, frames)
            data = TensorDict(batch_size=shape)
            done = self._flags((*shape, *agents, 1), self.p_done)
            data["observation"] = self._values((*shape, *kind.observation), kind.dtype)
            data["next", "observation"] = self._values((*shape, *kind.observation), kind.dtype)
            data[("next", *self._group, "done")] = done
            # torchrl's transform ends windows at ``done`` alone, so that ``terminated`` must imply it.
            other = self._flags(done.shape, 0.5 if self.torchrl else self.p_done / 2)
            data[("next", *self._group, "terminated")] = done & other if self.torchrl else other
            for i, dtype in enumerate(kind.rewards):
                rewards = self._rewards((*shape, *agents, *kind.features), dtype)
                data[("next", *self._group, f"reward{i or ''}")] = rewards
            if agents:
                data["next", "agents", "observation"] = self._values((*shape, *agents, 2), kind.dtype)
            if kind.mask:
                data["mask"] = self._flags(shape, 0.9)
            if kind.traj:
                data["traj_ids"] = self._flags(shape, 0.15).cumsum(-1).to(kind.traj)
            if frames:
                data = self._going_on(before, data)
                before = data[..., -1:]
            yield self._laid_out(data).to(device)

    def _going_on(self, before: TensorDict | None, data: TensorDict) -> TensorDict:
        """Returns ``data`` with each next observation copied to the root of the frame after it, except after an end."""
        both: Any = data if before is None else torch.cat((before, data), -1)
        first, then = both[..., :-1], both[..., 1:]
        ended = torch.zeros(then.batch_size, dtype=torch.bool, device="cpu")
        for name in ("done", "terminated"):
            ended |= first[("next", *self._group, name)].flatten(then.ndim).any(-1)
        if self.kind.mask:
            ended |= ~(first["mask"] & then["mask"])
        if self.kind.traj:
            ended |= first["traj_ids"] != then["traj_ids"]
        own, after = then["observation"], first["next", "observation"]
        own.copy_(torch.where(ended.view(*ended.shape, *[1] * (own.ndim - ended.ndim)), own, after))
        whole: TensorDict = both[..., -data.shape[-1] :]
        return whole

    def _laid_out(self, data: TensorDict) -> TensorDict:
        time = data.ndim - 1
        if self.kind.layout == "time-major":
            return data.apply(lambda leaf: leaf.movedim(time, 0).contiguous().movedim(0, time))
        if self.kind.layout == "channels-last":
            return data.apply(lambda leaf: leaf.movedim(-1, time + 1).contiguous().movedim(time + 1, -1))
        return data

    def _flags(self, shape: tuple[int, ...], p: float) -> Tensor:
        return torch.rand(shape, generator=self._generator, device="cpu") < p

    def _values(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns values of random bits, NaNs and infinities included."""
        count = torch.Size(shape).numel() * dtype.itemsize
        values = torch.randint(256, (count,), dtype=torch.uint8, generator=self._generator, device="cpu")
        return values.view(dtype).view(shape)

    def _rewards(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        rewards = torch.randn(shape, generator=self._generator, device="cpu")
        if self.torchrl:
            return rewards.abs()
        if not dtype.is_floating_point:
            return (rewards * 10).to(dtype)
        small = torch.finfo(dtype).tiny
        for p, value in ((0.05, rewards * small), (0.01, torch.inf), (0.01, -torch.inf), (0.02, torch.nan)):
            rewards = torch.where(self._flags(shape, p), value, rewards)
        return rewards.to(dtype)


def run_verified(seed: int, device: torch.device) -> Result:
    """Runs stream ``seed`` through a transform and a buffer with ``backend="verify"``, and samples the buffer once."""
    logging.getLogger("torchrl").setLevel(logging.WARNING)  # torchrl logs the allocation of every storage to stdout
    stream = Stream(seed, KINDS)
    transform = MultiStepTransform(backend="verify", **stream.arguments)
    buffer = stream.buffer(device)
    frames = 0
    try:
        with numpy.errstate(all="ignore"):  # the interpreter sums with numpy, which warns about infinities
            for rollout in stream.rollouts(device):
                out = transform.inv(rollout)
                frames += 0 if out is None else out.numel()
                buffer.extend(rollout)
            for out in transform.flush(), buffer.sample():
                frames += 0 if out is None else out.numel()
        return Result(frames)
    except Exception as error:  # a wrong kernel can raise anything
        return Result(frames, f"stream {seed}, {stream.kind}: {error}")


def run_torchrl(seed: int, device: torch.device) -> Result:
    """Compares the reference with torchrl's transform on stream ``seed``."""
    stream = Stream(seed, TORCHRL_KINDS, torchrl=True)
    where, frames = f"stream {seed}, {stream.kind}", 0
    try:
        ours = MultiStepTransform(backend="reference", **stream.arguments)
        theirs = TorchRLMultiStepTransform(
            ours.n_steps, ours.gamma, reward_keys=ours.reward_keys, done_key=ours.done_key, done_keys=ours.done_keys
        )
        for call, rollout in enumerate(stream.rollouts(device)):
            # torchrl computes returns by a convolution, whose operands a GPU would otherwise round to TF32.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                got, expected = ours.inv(rollout), theirs.inv(rollout)
            if got is None or expected is None:
                if got is not expected:
                    alone = "torchrl" if got is None else "the reference"
                    return Result(frames, f"{where}, call {call}: {alone} alone returned frames")
            elif found := find_difference(got, expected, ours.n_steps):
                return Result(frames, f"{where}, call {call}, {found.what}, frame {found.frame}: {found.values}")
            else:
                frames += got.numel()
        return Result(frames)
    except Exception as error:  # another version of torchrl, or a device that it does not support, can raise anything
        return Result(frames, f"{where}: {type(error).__name__}: {error}")
