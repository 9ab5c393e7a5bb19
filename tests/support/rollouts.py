"""Random rollouts, and what must come of them: plain loops in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.transforms import Transform


def make_rollout(batch: Sequence[int], frames: int, *, p_done: float = 0.2, seed: int = 0) -> TensorDict:
    """State observations, ``[*batch, frames]``, with ends of both kinds."""
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    shape = (*batch, frames)
    terminated = torch.rand(*shape, 1, generator=generator) < p_done / 2
    truncated = torch.rand(*shape, 1, generator=generator) < p_done / 2
    return TensorDict(
        {
            "observation": torch.randn(*shape, 3, generator=generator),
            "action": torch.randint(0, 5, shape, generator=generator),
            "next": {
                "observation": torch.randn(*shape, 3, generator=generator),
                "reward": torch.randn(*shape, 1, generator=generator),
                "done": terminated | truncated,
                "terminated": terminated,
                "truncated": truncated,
            },
        },
        batch_size=shape,
    )


def frames(rewards: Sequence[float], done: Sequence[bool], **extra: object) -> TensorDict:
    """One row of frames whose observations count from 0, and next observations from 1."""
    count = len(rewards)
    return TensorDict(
        {
            "observation": torch.arange(count),
            "next": {
                "observation": torch.arange(1, count + 1),
                "reward": torch.tensor(rewards).unsqueeze(-1),
                "done": torch.tensor(done).unsqueeze(-1),
            },
            **extra,
        },
        batch_size=[count],
    )


def extend(transform: Transform, rollout: TensorDictBase, cuts: Sequence[int]) -> TensorDictBase | None:
    """What comes out of calls of ``cuts`` frames each, joined in time; None if nothing did."""
    parts = [transform.inv(part) for part in rollout.split(list(cuts), -1)]
    parts = [part for part in parts if part is not None]
    return torch.cat(parts, -1) if parts else None


def boundaries(done: Tensor, mask: Tensor | None = None, traj: Tensor | None = None) -> Tensor:
    """Whether each frame of ``[*B, S]`` is a boundary, by looking at one frame after the other."""
    frames = done.shape[-1]
    flags = done, torch.ones_like(done) if mask is None else mask, torch.zeros_like(done) if traj is None else traj
    result = []
    for ends, valid, ids in zip(*(flag.reshape(-1, max(frames, 1)).tolist() for flag in flags), strict=True):
        for t in range(frames):
            last = t == frames - 1
            result.append(ends[t] or not valid[t] or (not last and (not valid[t + 1] or ids[t] != ids[t + 1])))
    return torch.tensor(result, dtype=torch.bool).view(done.shape)


def window_ends(done: Tensor, n_steps: int, mask: Tensor | None = None, traj: Tensor | None = None) -> Tensor:
    """``e(t)`` of every frame of ``[*B, S]``, by looking at one frame after the other."""
    frames = done.shape[-1]
    result = []
    for row in boundaries(done, mask, traj).reshape(-1, max(frames, 1)).tolist():
        for t in range(frames):
            end = t
            while end < min(t + n_steps, frames) - 1 and not row[end]:
                end += 1
            result.append(end)
    return torch.tensor(result, dtype=torch.int64).view(done.shape)


def window_sums(reward: Tensor, ends: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """n-step returns ``[*B, S, *F]`` in float64, and the same sums over absolute rewards."""
    frames = ends.shape[-1]
    rewards = reward.double().reshape(ends.shape[:-1].numel(), frames, reward.shape[ends.ndim :].numel())
    sums, magnitudes = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b, row in enumerate(ends.reshape(rewards.shape[:2]).tolist()):
        for t, end in enumerate(row):
            for i in range(t, end + 1):
                sums[b, t] += gamma ** (i - t) * rewards[b, i]
                magnitudes[b, t] += gamma ** (i - t) * rewards[b, i].abs()
    return sums.view(reward.shape), magnitudes.view(reward.shape)


def assert_returns(actual: Tensor, reward: Tensor, ends: Tensor, gamma: float, n_steps: int) -> None:
    """Compares the returns of the first frames with float64, within the error bound of the recursion.

    A backward recursion over ``n`` terms rounds twice per step, and gamma once: at most ``1.5 n eps`` times the sum
    of absolute terms, ``eps`` that of the dtype in which it accumulates; then one rounding to the result's dtype.
    """
    dtype = reward.dtype if reward.is_floating_point() else torch.get_default_dtype()
    assert actual.dtype == dtype
    accumulated = torch.float64 if dtype == torch.float64 else torch.float32
    time_dim = ends.ndim - 1
    expected, magnitude = (
        sums.narrow(time_dim, 0, actual.shape[time_dim]) for sums in window_sums(reward, ends, gamma)
    )
    bound = 1.5 * n_steps * torch.finfo(accumulated).eps * magnitude
    if dtype != accumulated:
        info = torch.finfo(dtype)
        bound = bound + info.eps / 2 * (magnitude + bound) + info.smallest_normal * info.eps
    error = (actual.double() - expected).abs()
    assert actual.shape == expected.shape
    assert (error <= bound).all(), f"error {error.max()} beyond the bound, at {(error > bound).nonzero()[0].tolist()}"
