"""Streams of numbered frames, the ring that holds the newest of them, and what must be sampled of it: plain loops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rollouts import make_rollout
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyTensorStorage, RandomSampler, SamplerWithoutReplacement

from multistep_triton import NStepReplayBuffer

TRAJ_KEY = ("collector", "traj_ids")
TWINS = ("observation", "number")
"""What is both at the root and under "next"."""
WINDOW_KEYS = ("steps_to_next_obs", "gamma", "nonterminal")


def make_stream(
    batch: Sequence[int], frames: int, *, p_done: float = 0.2, traj: bool = False, mask: bool = False, seed: int = 0
) -> TensorDict:
    """A stream ``[*batch, frames]``, every frame of which has its number, at the root and under "next".

    A number is the frame's place in the flattened stream: what a sample holds of which frame is seen in the sample.
    """
    # By its device torchrl knows where the index of what is stored belongs.
    stream = make_rollout(batch, frames, p_done=p_done, seed=seed).to(torch.get_default_device())
    number = torch.arange(stream.numel()).view(stream.batch_size)
    stream["number"], stream["next", "number"] = number, number.clone()
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed + 1)
    if traj:
        stream[TRAJ_KEY] = (torch.rand(stream.batch_size, generator=generator) < 0.2).cumsum(-1)
    if mask:
        stream["mask"] = torch.rand(stream.batch_size, generator=generator) < 0.8
    return stream


class Ring:
    """Which frames of a stream are in a ring of ``capacity`` slots per environment, and the windows within.

    A frame and the one after it in the stream are one after the other in the ring, wherever they lie in it.
    """

    def __init__(
        self, stream: TensorDictBase, capacity: int, *, done_keys=("done",), mask_key: str = "mask", traj_key=None
    ):
        self.stream, self.capacity = stream, capacity
        self.length = stream.batch_size[-1]
        self.envs = stream.numel() // self.length
        self.first = self.written = 0
        count = stream.numel()
        self.done = [
            any(flags) for flags in zip(*(stream["next", key].reshape(count) for key in done_keys), strict=True)
        ]
        self.valid = [True] * count if stream.get(mask_key) is None else stream[mask_key].reshape(count).tolist()
        self.traj = [0] * count if traj_key is None else stream[traj_key].reshape(count).tolist()

    def take(self, frames: int) -> TensorDictBase:
        """The next frames of the stream, which are written now."""
        assert self.written + frames <= self.length
        self.written += frames
        return self.stream[..., self.written - frames : self.written]

    def empty(self) -> None:
        self.first = self.written

    def numbers(self) -> list[int]:
        """The frames that are there."""
        oldest = max(self.first, self.written - self.capacity)
        return [env * self.length + t for env in range(self.envs) for t in range(oldest, self.written)]

    def is_newest(self, number: int) -> bool:
        return number % self.length == self.written - 1

    def is_boundary(self, number: int) -> bool:
        if self.done[number] or not self.valid[number]:
            return True
        if self.is_newest(number):
            return False
        return not self.valid[number + 1] or self.traj[number] != self.traj[number + 1]

    def window(self, number: int, n_steps: int) -> list[int]:
        """The frames of a frame's window."""
        window = [number]
        while len(window) < n_steps and not self.is_newest(window[-1]) and not self.is_boundary(window[-1]):
            window.append(window[-1] + 1)
        return window


def kept_once(
    stream: TensorDict, keys: Sequence[str] = TWINS, *, done_keys: Sequence[str] = ("done",), traj_key=None
) -> TensorDict:
    """A stream in which what comes after a frame is what the next one holds, but at ends."""
    ring = Ring(stream, 1, done_keys=done_keys, traj_key=traj_key)
    ring.written = ring.length
    ended = torch.tensor([ring.is_boundary(number) for number in range(stream.numel())]).view(stream.batch_size)
    stream["next", "number"] = -1 - stream["number"]
    for key in keys:
        root, after = stream[key], stream["next"][key]
        there = ended.view(*ended.shape, *[1] * (root.ndim - ended.ndim))
        stream["next"][key] = torch.where(there, after, root.roll(-1, stream.ndim - 1))
    return stream


class Drawn(RandomSampler):
    """Draws what it is told."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def sample(self, storage, batch_size):
        return self.index, {}


def make_buffer(capacity: int, batch: Sequence[int] = (), *, storage=LazyTensorStorage, **arguments):
    """A buffer of ``capacity`` slots per environment, which is sampled slot by slot if nothing else is said."""
    size = torch.Size(batch).numel() * capacity
    return NStepReplayBuffer(
        storage=storage(size, ndim=len(batch) + 1, device=torch.get_default_device()),
        **{"n_steps": 3, "gamma": 0.9, "sampler": SamplerWithoutReplacement(shuffle=False), **arguments},
    )


def wrapped(capacity=16, batch=(2,), *, frames=None, **arguments):
    """A buffer whose ring is full and begins anew in the middle, and what must be sampled of it."""
    stream = make_stream(batch, 4 * capacity)
    ring = Ring(stream, capacity)
    buffer = make_buffer(capacity, batch, **arguments)
    for part in [capacity, capacity // 2 - 1] if frames is None else frames:
        buffer.extend(ring.take(part))
    return buffer, ring


def samples_of_everything(buffer: NStepReplayBuffer, size: int | None, **arguments: object) -> list[TensorDictBase]:
    """Samples that together are every frame that is there, ``size`` frames at a time or all at once."""
    size = size or len(buffer)
    return [buffer.sample(size, **arguments) for _ in range(-(len(buffer) // -size))]


def everything(buffer: NStepReplayBuffer, size: int | None = None, **arguments: object) -> TensorDictBase:
    """A sample of every frame that is there."""
    return torch.cat(samples_of_everything(buffer, size, **arguments))


def in_order(sample: TensorDictBase) -> TensorDictBase:
    return sample[sample["number"].argsort()]


def as_bytes(leaf: Tensor) -> Tensor:
    return leaf.contiguous().view(torch.uint8) if leaf.numel() else leaf


def assert_same_bytes(actual: Tensor, expected: Tensor, name: object = "") -> None:
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
    assert torch.equal(as_bytes(actual), as_bytes(expected)), name


def assert_windows(sample: TensorDictBase, ring: Ring, n_steps: int | tuple[int, int], gamma: float) -> list[list[int]]:
    """Checks where the windows of sampled frames end, and returns the frames of each."""
    low, high = n_steps if isinstance(n_steps, tuple) else (n_steps, n_steps)
    there, windows = set(ring.numbers()), []
    for number, steps in zip(sample["number"].tolist(), sample["steps_to_next_obs"].flatten().tolist(), strict=True):
        assert number in there, f"frame {number} is not in the ring"
        longest = ring.window(number, high)
        assert min(low, len(longest)) <= steps <= len(longest), f"steps {steps} of frame {number}, not {len(longest)}"
        windows.append(longest[:steps])
    steps = sample["steps_to_next_obs"]
    assert steps.dtype == torch.int64
    assert_same_bytes(sample["gamma"], (torch.tensor(gamma, dtype=torch.float64) ** steps).float())
    nonterminal = [not ring.is_boundary(number) and not ring.is_newest(number) for number, *_ in windows]
    assert_same_bytes(sample["nonterminal"], torch.tensor(nonterminal).view(steps.shape))
    return windows


def assert_returns(actual: Tensor, reward: Tensor, windows: list[list[int]], gamma: float, name: object = "") -> None:
    """Compares returns with sums in float64, of the rewards ``[S, *F]`` of a flattened stream.

    Summing ``n`` terms rounds at most ``1.5 n`` times per term, whatever the order: once per product with a power of
    gamma, gamma's own error once per step, and once per sum. Then there is one rounding to the result's dtype.
    """
    dtype = reward.dtype if reward.is_floating_point() else torch.get_default_dtype()
    assert (actual.dtype, actual.shape[1:]) == (dtype, reward.shape[1:]), name
    rewards = reward.double().flatten(1).tolist() if reward.ndim > 1 else [[each] for each in reward.double().tolist()]
    sums, magnitudes = [], []
    for window in windows:
        terms = [[gamma**i * each for each in rewards[number]] for i, number in enumerate(window)]
        sums.append([sum(column) for column in zip(*terms, strict=True)])
        magnitudes.append([sum(map(abs, column)) for column in zip(*terms, strict=True)])
    expected, magnitude = (torch.tensor(rows, dtype=torch.float64).view(actual.shape) for rows in (sums, magnitudes))
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    bound = 1.5 * max(map(len, windows)) * torch.finfo(accumulated).eps * magnitude
    if dtype != accumulated:
        info = torch.finfo(dtype)
        bound = bound + info.eps / 2 * (magnitude + bound) + info.smallest_normal * info.eps
    finite = expected.isfinite()
    wrong = finite & ~((actual.double() - expected).abs() <= bound)
    assert not wrong.any(), f"{name}: {actual[wrong].tolist()}, not {expected[wrong].tolist()}"
    torch.testing.assert_close(actual.double()[~finite], expected[~finite], equal_nan=True)


def assert_sampled(
    sample: TensorDictBase,
    ring: Ring,
    n_steps: int | tuple[int, int] = 3,
    gamma: float = 0.9,
    *,
    done_at: str = "end",
    reward_keys: Sequence[str] = ("reward",),
    done_keys: Sequence[str] = ("done", "terminated", "truncated"),
    info: Sequence[str] = ("index",),
) -> None:
    """Compares every entry of a sample with the loops."""
    windows = assert_windows(sample, ring, n_steps, gamma)
    stream = ring.stream.reshape(-1)
    own, ends = (torch.tensor([window[at] for window in windows]) for at in (0, -1))
    written = {*WINDOW_KEYS, *info, *(("next", f"{key}_orig") for key in reward_keys)}
    if len(reward_keys) == 1:
        written.add(("next", "original_reward"))
        assert_same_bytes(sample["next", "original_reward"], sample["next", f"{reward_keys[0]}_orig"])
    if done_at == "end":
        written.update(("next", f"{key}_orig") for key in done_keys)
    assert set(sample.keys(True, True)) == {*stream.keys(True, True), *written}
    for key in stream.keys(True, True):
        leaf, name = stream[key], key[-1]
        if key[0] != "next" or (name in done_keys and done_at == "start"):
            assert_same_bytes(sample[key], leaf[own], key)
        elif name in reward_keys:
            assert_returns(sample[key], leaf, windows, gamma, key)
        else:
            assert_same_bytes(sample[key], leaf[ends], key)
        if key == ("next", name) and ("next", f"{name}_orig") in written:
            assert_same_bytes(sample["next", f"{name}_orig"], leaf[own], key)


def assert_every_frame(
    buffer: NStepReplayBuffer, ring: Ring, *arguments: object, size: int | None = None, **keywords: object
) -> None:
    """Every frame that is there is sampled, is where the index says, and has the window of the loops."""
    arguments, numbers = arguments or (buffer.n_steps, buffer.gamma), []
    for sample in samples_of_everything(buffer, size):
        numbers += sample["number"].tolist()
        index = sample["index"]
        stored = buffer.storage[index if index.ndim == 1 else index.unbind(-1)]
        assert torch.equal(stored["number"], sample["number"])
        assert_sampled(sample, ring, *arguments, **keywords)
    assert sorted(numbers) == ring.numbers()
