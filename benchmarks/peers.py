"""Other ways to n-step transitions: replay buffers that store single steps and look ahead when they are sampled."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import NStepReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from tensordict import TensorDict
from torch import Tensor

from benchmarks.cases import ACTION_WIDTH, GAMMA, Case


class StableBaselines3:
    """stable-baselines3's buffer, which is filled frame by frame with NumPy arrays ``[envs, ...]``."""

    def __init__(self, case: Case):
        self.buffer = NStepReplayBuffer(
            case.capacity(True) * case.envs,
            spaces.Box(-np.inf, np.inf, (case.width,)),
            spaces.Box(-np.inf, np.inf, (ACTION_WIDTH,)),
            device="cpu",
            n_envs=case.envs,
            n_steps=case.n_steps,
            gamma=GAMMA,
        )

    def store(self, rollout: TensorDict) -> None:
        observation, action = rollout["observation"].numpy(), rollout["action"].numpy()
        following = rollout["next"]
        later, reward = following["observation"].numpy(), following["reward"].squeeze(-1).numpy()
        done, truncated = following["done"].squeeze(-1).numpy(), following["truncated"].squeeze(-1).t().tolist()
        for t, flags in enumerate(truncated):
            infos = [{"TimeLimit.truncated": flag} for flag in flags]
            self.buffer.add(observation[:, t], later[:, t], action[:, t], reward[:, t], done[:, t], infos)

    @staticmethod
    def transitions(samples: ReplayBufferSamples) -> TensorDict:
        return TensorDict(
            {
                "observation": samples.observations,
                "action": samples.actions,
                "gamma": samples.discounts,
                "next": {
                    "observation": samples.next_observations,
                    "reward": samples.rewards,
                    "terminated": samples.dones.bool(),
                },
            },
            batch_size=len(samples.actions),
        )


def rows_of(leaf: Tensor, rows: Tensor) -> Tensor:
    """Some of the ``envs * ring`` rows of ``[envs, ring, ...]``, as ``[*rows.shape, ...]``."""
    # A row of one element is read faster as an element.
    flat = leaf.flatten(0, 1).squeeze(-1)
    return flat.index_select(0, rows.flatten()).view(*rows.shape, *leaf.shape[2:])


class VectorizedRing:
    """A ring of single steps per environment, ``[envs, ring, ...]``, sampled with tensor operations alone.

    It samples as FastTD3's replay buffer does (https://arxiv.org/abs/2505.22642): as many frames of every environment,
    which reads less memory than frames drawn from all alike, by ``gather`` of single elements; of n consecutive frames,
    rewards count as long as no frame before them was done, and the next observation is that of the first done, or of
    the last frame. Unlike there, a whole rollout is stored per call, flags are bool, and where a window reaches the
    newest frame it ends: the original goes on adding rewards of the oldest ones.
    """

    def __init__(self, case: Case, device: torch.device):
        self.n_steps, self.size, self.stored = case.n_steps, case.capacity(True), 0
        self.frames: TensorDict | None = None
        self.offsets = torch.arange(case.n_steps, device=device).view(-1, 1, 1)
        self.first_rows = torch.arange(0, case.envs * self.size, self.size, device=device).unsqueeze(-1)
        self.discounts = GAMMA ** torch.arange(case.n_steps, device=device).float()

    def store(self, rollout: TensorDict) -> None:
        envs, frames = rollout.batch_size
        if self.frames is None:
            self.frames = rollout.new_zeros((envs, self.size))
        slot = self.stored % self.size
        length = min(frames, self.size - slot)
        self.frames[:, slot : slot + length] = rollout[:, :length]
        self.frames[:, : frames - length] = rollout[:, length:]
        self.stored += frames

    def places(self, slots: Tensor) -> Tensor:
        """What finds frames in slots ``[*K, envs, N]``, each of its environment."""
        return slots

    def read(self, leaf: Tensor, places: Tensor) -> Tensor:
        """Frames of a leaf, ``[*K, envs, N, *F]``."""
        *lead, _, _ = places.shape
        index = places[(..., *[None] * (leaf.ndim - 2))].expand(*places.shape, *leaf.shape[2:])
        return leaf.expand(*lead, *leaf.shape).gather(len(lead) + 1, index)

    def sample(self, batch: int) -> TensorDict:
        """``batch`` transitions, as many of every environment."""
        envs, following = len(self.first_rows), self.frames["next"]
        start = torch.randint(min(self.stored, self.size), (envs, batch // envs), device=self.offsets.device)
        windows = self.places((start + self.offsets) % self.size)
        ends = following["done"].squeeze(-1).clone()
        ends[:, (self.stored - 1) % self.size] = True
        going_on = torch.ones(windows.shape, device=windows.device)
        going_on[1:] = ~self.read(ends, windows[:-1])
        counts = going_on.cumprod(0)
        steps = counts.sum(0).long()
        first, end = windows[0], windows.gather(0, steps.unsqueeze(0) - 1).squeeze(0)
        at_end = {key: self.read(following[key], end) for key in ("observation", "done", "truncated")}
        rewards = self.read(following["reward"].squeeze(-1), windows) * counts
        at_end["reward"] = (self.discounts @ rewards.flatten(1)).view(*steps.shape, 1)
        root = {key: self.read(self.frames[key], first) for key in ("observation", "action")}
        sample = TensorDict({**root, "steps_to_next_obs": steps, "next": at_end}, batch_size=steps.shape)
        return sample.flatten()


class SelectingRing(VectorizedRing):
    """The same, read by ``index_select`` of rows, which on a CPU takes a third of the time."""

    def places(self, slots: Tensor) -> Tensor:
        return slots + self.first_rows

    def read(self, leaf: Tensor, places: Tensor) -> Tensor:
        return rows_of(leaf, places)


class RowGathers:
    """The rows of a sample and nothing else, which is the least that a buffer has to do.

    Root entries are those of frames at random, next entries those of frames up to ``n - 1`` later. They are read by
    ``index_select``, the fastest that torch has for this on a CPU, at rows that are drawn beforehand: a number of
    samples in turn, as one and the same would be read from the cache.
    """

    SAMPLES = 16

    def __init__(self, case: Case, device: torch.device):
        shape = (self.SAMPLES, case.sample_size)
        env, frame = torch.randint(case.envs, shape), torch.randint(case.frames, shape)
        later = (frame + torch.randint(case.n_steps, shape)) % case.frames
        here, there = ((env * case.frames + at).to(device) for at in (frame, later))
        self.samples = cycle(zip(here, there, strict=True))
        self.frames: dict[str, Any] = {}

    def store(self, rollout: TensorDict) -> None:
        """Keeps the first rollout, which fills the ring."""
        if not self.frames:
            self.frames = rollout.to_dict()

    def sample(self, batch: int) -> dict[str, Any]:
        here, there = next(self.samples)
        following = {key: rows_of(leaf, there) for key, leaf in self.frames["next"].items()}
        return {key: rows_of(leaf, here) for key, leaf in self.frames.items() if key != "next"} | {"next": following}
