"""Windows in eager PyTorch: finds for the fast path where windows end, and sums their rewards.

It joins windows of 1, 2, 4, ... frames: one or two joins per binary digit of n. May import torch and ``task``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from multistep_triton.task import Leaves, Task, compute_once, summed_dtype

Taker: TypeAlias = Callable[[Tensor], Tensor]
"""Copies rows ``[N]`` of a leaf, bit for bit, into new memory ``[N, *F]``; reads no other row."""
Windows: TypeAlias = tuple[Tensor, list[Tensor]]
"""The lengths of windows, int32, and the discounted sum of each reward."""

# The dtypes whose rows torch can select and overwrite.
SELECTED = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}
SELECTED |= {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(leaf: Tensor) -> Tensor:
    """Returns a leaf whose rows torch can select and overwrite: itself, or a view as integers of the same bits."""
    return leaf if leaf.dtype in SELECTED else leaf.resolve_conj().view(BITS[leaf.itemsize])


def find_boundaries(done: Tensor, mask: Tensor | None, traj: Tensor | None, dim: int) -> Tensor:
    """Returns the boundaries: frames that are done or padding, or that padding or another trajectory follows."""
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


def find_windows(
    join: Callable[..., Tensor], task: Task, shape: Sequence[int], dim: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Returns which frames of ``shape``, time in ``dim``, are no boundaries, and their windows' lengths and sums.

    ``join`` returns the frames of a leaf or, given several flags, their logical or.
    """
    keys, n_steps, gamma, _, hold = task
    known = shape[dim]
    done = join(*keys.done).reshape(shape)
    mask, traj = (None if key is None else join(key).reshape(shape) for key in (keys.mask, keys.traj))
    goes_on = ~find_boundaries(done, mask, traj, dim)
    rewards = [join(key) for key in keys.rewards]
    if not hold and known:
        # All windows come out; the padding cuts those at the end.
        goes_on = _pad(goes_on.narrow(dim, 0, known - 1), n_steps, dim)
        rewards = [_pad(reward, n_steps - 1, dim) for reward in rewards]
    return goes_on, *sum_windows(goes_on, rewards, n_steps, gamma, dim)


def _pad(value: Tensor, frames: int, dim: int) -> Tensor:
    """Returns ``value`` followed by frames of zeros, which no window reads."""
    if not frames:
        return value
    return torch.cat((value, value.new_zeros((*value.shape[:dim], frames, *value.shape[dim + 1 :]))), dim)


def sum_windows(goes_on: Tensor, rewards: Sequence[Tensor], n_steps: int, gamma: float, dim: int) -> Windows:
    """Returns the windows of ``n_steps`` frames that begin at the first ``S - n_steps + 1`` of ``S``, time in ``dim``.

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
    """Extends windows ``first`` by windows ``then``, ``shift`` frames later, where the trajectory is ``on`` to there.

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
    """Returns ``gamma ** steps``, float32, each power rounded once."""
    return powers_of(gamma, n_steps, steps.device).index_select(0, steps.view(steps.numel())).view(steps.shape)


def powers_of(gamma: float, n_steps: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns ``gamma ** k`` for ``k = 0 .. n_steps``; the host waits for them, as other streams may read them, too."""
    return torch.tensor([gamma**k for k in range(n_steps + 1)], dtype=dtype, device=device)


def index_dtype(largest: int) -> torch.dtype:
    return torch.int32 if largest < 2**31 else torch.int64


def move_rows(rows: Tensor, slots: int | Tensor, live: int, envs: int) -> Tensor:
    """Returns the rows ``slots`` slots after ``rows`` in a ring of ``live`` slots of ``envs`` rows each."""
    return torch.add(rows, slots, alpha=envs) % (live * envs)


def write_runs(leaf: Tensor, frames: Tensor, runs: list[tuple[int, int]], time_dim: int) -> None:
    """Writes frames into runs of slots."""
    parts = (frames,) if len(runs) == 1 else frames.split_with_sizes([count for _, count in runs], time_dim)
    for (slot, count), part in zip(runs, parts, strict=True):
        leaf[(*[slice(None)] * time_dim, slice(slot, slot + count))].copy_(part)


def take_rows(value: Tensor, rows: Tensor) -> Tensor:
    """Copies rows of ``value`` ``[S, *F]``, bit for bit, into new memory."""
    return _taker(value, value.shape[:1])(rows)


def takers(data: Leaves, sizes: torch.Size) -> Mapping[Any, Taker]:
    """Returns the taker of each leaf ``[*sizes, *F]``, which counts rows over ``sizes``."""
    # A cached taker would keep the autograd graph of a leaf that requires grad.
    known: Leaves = {} if any([leaf.requires_grad for leaf in data.values()]) else data
    found: Mapping[Any, Taker]
    found = compute_once(known, ("takers", sizes), lambda: {key: _taker(leaf, sizes) for key, leaf in data.items()})
    return found


def _taker(leaf: Tensor, sizes: torch.Size) -> Taker:
    if leaf.dtype not in SELECTED and leaf.is_floating_point() and leaf.requires_grad:
        # torch adds no gradients of such numbers, which are float32, too.
        take_floats, narrow = _taker(leaf.float(), sizes), leaf.dtype
        return lambda rows: take_floats(rows).to(narrow)
    if leaf.dtype not in SELECTED:
        take_bits, dtype = _taker(bits(leaf), sizes), leaf.dtype
        return lambda rows: take_bits(rows).view(dtype)
    strides, dims = leaf.stride(), [dim for dim, size in enumerate(sizes) if size != 1]
    if any(strides[outer] != strides[inner] * sizes[inner] for outer, inner in itertools.pairwise(dims)):
        return lambda rows: leaf[torch.unravel_index(rows, sizes)]
    flat, features = leaf.flatten(0, len(sizes) - 1), leaf.shape[len(sizes) :]
    if not features or flat.numel() != flat.shape[0] or not flat.numel():
        return lambda rows: flat.index_select(0, rows)
    # torch selects elements in a fraction of the time that it needs for rows of one element.
    elements = flat.flatten()
    return lambda rows: elements.index_select(0, rows).view(-1, *features)
