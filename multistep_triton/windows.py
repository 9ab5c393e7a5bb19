"""Windows in eager PyTorch: where they end and what they sum, for the fast path. May import torch and ``task``.

Windows of 1, 2, 4, ... frames are joined, so that sums take as many operators as n has binary digits, or twice as many.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from multistep_triton.task import Leaves, find, summed_dtype

Windows: TypeAlias = tuple[Tensor, list[Tensor]]
"""Lengths, int32, and discounted sums of the rewards."""

# torch selects no single elements of these; their bits are those of the signed ones.
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


# What torch copies wherever it lies, by the bytes of an element.
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(leaf: Tensor) -> Tensor:
    """A leaf as integers of the same bits, whose elements torch selects whatever they are."""
    return leaf.view(BITS.get(leaf.itemsize, leaf.dtype))


def find_boundaries(done: Tensor, mask: Tensor | None, traj: Tensor | None, dim: int) -> Tensor:
    """Boundaries: done, or invalid, or followed by an invalid frame or by one of another trajectory."""
    boundary, frames = done, done.shape[dim]
    before = max(frames - 1, 0)
    if mask is not None:
        boundary = boundary | ~mask
        boundary.narrow(dim, 0, before).logical_or_(~mask.narrow(dim, frames - before, before))
    if traj is not None:
        boundary = boundary.clone()
        changes = traj.narrow(dim, frames - before, before) != traj.narrow(dim, 0, before)
        boundary.narrow(dim, 0, before).logical_or_(changes)
    return boundary


def sum_windows(goes_on: Tensor, rewards: Sequence[Tensor], n_steps: int, gamma: float, dim: int) -> Windows:
    """The windows of ``n_steps`` of ``S`` frames, time in dimension ``dim``: of the first ``S - n_steps + 1``.

    ``goes_on`` is False at boundaries.
    """
    length, on = 1, goes_on
    block = torch.ones_like(goes_on, dtype=torch.int32), [reward.to(summed_dtype(reward)) for reward in rewards]
    whole: Windows | None = None
    while True:
        if n_steps & length:
            whole = block if whole is None else _append(on, block, whole, length, gamma**length, dim)
            if 2 * length > n_steps:
                return whole
        block = _append(on, block, block, length, gamma**length, dim)
        frames = block[0].shape[dim]
        on = on.narrow(dim, 0, frames) & on.narrow(dim, length, frames)
        length *= 2


def _append(on: Tensor, first: Windows, then: Windows, shift: int, weight: float, dim: int) -> Windows:
    """Windows of ``first`` which, where the trajectory is ``on`` to their end, go on with those of ``then``.

    A boundary selects, it never multiplies, so that a NaN or Inf after it does not reach the frames before it.
    """
    frames = then[0].shape[dim] - shift
    on = on.narrow(dim, 0, frames)
    lengths = torch.addcmul(first[0].narrow(dim, 0, frames), on, then[0].narrow(dim, shift, frames))
    totals = []
    for total, further in zip(first[1], then[1], strict=True):
        total = total.narrow(dim, 0, frames)
        longer = torch.add(total, further.narrow(dim, shift, frames), alpha=weight)
        totals.append(torch.where(on.view(*on.shape, *[1] * (total.ndim - on.ndim)), longer, total))
    return lengths, totals


def discounts(steps: Tensor, n_steps: int, gamma: float) -> Tensor:
    """``gamma ** steps``, float32, each power rounded once."""
    return take_discounts(steps, powers_of(gamma, n_steps, steps.device))


def powers_of(gamma: float, n_steps: int, device: torch.device) -> Tensor:
    """``gamma ** k`` for ``k = 0 .. n_steps``, float32."""
    return torch.tensor([gamma**k for k in range(n_steps + 1)], dtype=torch.float32, device=device)


def take_discounts(steps: Tensor, powers: Tensor) -> Tensor:
    """Powers of these exponents."""
    return powers.index_select(0, steps.view(-1)).view(steps.shape)


def index_dtype(largest: int) -> torch.dtype:
    return torch.int32 if largest < 2**31 else torch.int64


def take(value: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``value`` ``[N, *F]``, bit for bit, in new memory."""
    if signed := SIGNED.get(value.dtype):
        return take(value.view(signed), rows).view(value.dtype)
    if value.ndim > 1 and value.numel() == value.shape[0] > 0:
        # torch selects elements in a fraction of the time that it takes for rows of one element.
        return value.flatten().index_select(0, rows).view(-1, *value.shape[1:])
    return value.index_select(0, rows)


def take_rows(data: Leaves, key: Hashable, rows: Tensor, sizes: torch.Size) -> Tensor:
    """Rows of a leaf ``[*sizes, *F]``, counted over ``sizes``, as a new ``[*N, *F]``; no other row is read."""
    # Of what requires grad, the graph is not kept.
    known: Leaves = {} if data[key].requires_grad else data
    flat, features, dtype = find(known, ("rows", key, sizes), lambda: _as_rows(data[key], sizes))
    if flat is None:
        taken = _viewed(data[key], dtype)[torch.unravel_index(rows, sizes)]
    else:
        taken = flat.index_select(0, rows if rows.ndim == 1 else rows.view(-1))
        if taken.ndim != len(features) + 1 or rows.ndim > 1:
            taken = taken.view(*rows.shape, *features)
    return _viewed(taken, data[key].dtype)


def _viewed(leaf: Tensor, dtype: torch.dtype) -> Tensor:
    """A leaf by another dtype; torch takes no gradient through one that is the same."""
    return leaf if leaf.dtype is dtype else leaf.view(dtype)


def _as_rows(leaf: Tensor, sizes: torch.Size) -> tuple[Tensor | None, torch.Size, torch.dtype]:
    """A leaf as rows, of one element as elements, if it lies so; features; and the dtype by which torch selects it."""
    dtype, features = SIGNED.get(leaf.dtype, leaf.dtype), leaf.shape[len(sizes) :]
    strides, dims = leaf.stride(), [dim for dim, size in enumerate(sizes) if size != 1]
    if any(strides[outer] != strides[inner] * sizes[inner] for outer, inner in itertools.pairwise(dims)):
        return None, features, dtype
    value = _viewed(leaf, dtype).flatten(0, len(sizes) - 1)
    return value.flatten() if value.numel() == value.shape[0] > 0 else value, features, dtype
