"""Owns the comparison of this package's n-step transitions with torchrl's, key by key. May import ``differences``."""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from multistep_triton.debug.differences import different_bits

# torchrl documents the first name and writes only the second; this package writes both.
DOCUMENTED_REWARD, WRITTEN_REWARD = ("next", "reward_orig"), ("next", "original_reward")
INEXACT_KEYS: tuple[NestedKey, ...] = (("next", "reward"), "gamma")


class Difference(NamedTuple):
    """The first difference between this package's transitions and torchrl's."""

    what: str
    frame: tuple[int, ...] | None
    """The index of the frame; None if keys, shapes or dtypes differ."""
    values: str


def leaf_keys(frames: TensorDictBase) -> list[NestedKey]:
    """Returns the keys of all tensors, nested ones included."""
    return list(frames.keys(include_nested=True, leaves_only=True))


def find_difference(ours: TensorDictBase, theirs: TensorDictBase, n_steps: int) -> Difference | None:
    """Finds the first difference between the transitions that both transforms made of the same frames, or None.

    The one reward must not be negative. Returns and discounts may be :func:`ulps` apart; all else must be equal.
    """
    our_keys, their_keys = set(leaf_keys(ours)), set(leaf_keys(theirs))
    if our_keys != their_keys | {DOCUMENTED_REWARD}:
        return Difference("keys", None, f"{sorted(map(str, our_keys))}, torchrl's {sorted(map(str, their_keys))}")
    if ours.batch_size != theirs.batch_size:
        return Difference("batch size", None, f"{list(ours.batch_size)}, torchrl's {list(theirs.batch_size)}")
    for key in leaf_keys(ours):
        got: Tensor = ours.get(key)
        expected: Tensor = theirs.get(WRITTEN_REWARD if key == DOCUMENTED_REWARD else key)
        if key == "nonterminal" and n_steps == 1:  # torchrl writes False everywhere
            expected = ~theirs.get(("next", "done")).squeeze(-1)
        if got.shape != expected.shape or got.dtype != expected.dtype:
            values = f"{got.dtype} {list(got.shape)}, torchrl's {expected.dtype} {list(expected.shape)}"
            return Difference(f"key {key}", None, values)
        different = ~_close(got, expected, n_steps) if key in INEXACT_KEYS else different_bits(got, expected)
        different = different[..., None].flatten(ours.ndim).any(-1)
        if different.any():
            frame = tuple(different.nonzero()[0].tolist())
            return Difference(f"key {key}", frame, f"{got[frame].tolist()}, torchrl's {expected[frame].tolist()}")
    return None


def ulps(n_steps: int) -> int:
    """Returns how far apart two correct results can be, in float32 ulps, where an ulp is eps times the value."""
    # A rounding errs by half an ulp, and rewards are not negative, so that nothing cancels. This package joins n - 1
    # parts at most, each with a power of gamma, a product and a sum: 3 (n - 1) roundings. torchrl's convolution rounds
    # a power, a product and n - 1 sums: n + 1. Together: 2 n - 1 ulps. Discounts take n / 2 + 2.5: this package
    # rounds once; torchrl rounds gamma, an error that the power repeats n times, and its power errs by 2 ulps.
    return 2 * n_steps + 2


def _close(got: Tensor, expected: Tensor, n_steps: int) -> Tensor:
    eps, tiny = torch.finfo(expected.dtype).eps, torch.finfo(expected.dtype).tiny
    # High powers of a small gamma fall below the smallest normal number, where an ulp is no longer relative.
    return (got - expected).abs() <= ulps(n_steps) * eps * expected.abs() + tiny
