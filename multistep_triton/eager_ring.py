"""The fast path in eager PyTorch where frames lie in a ring: stored there, and sampled.

Keys are opaque. May import torch, ``task``, ``samples`` and ``windows``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from multistep_triton.eager_ends import Following, stand_in
from multistep_triton.ends import Ends
from multistep_triton.samples import Samples, sampled_where_frames_are
from multistep_triton.task import AFTER_END, Leaves, Results, Task, find, return_dtype
from multistep_triton.windows import (
    find_boundaries,
    index_dtype,
    powers_of,
    sum_windows,
    take,
    take_discounts,
    take_rows,
)


@sampled_where_frames_are
def n_step_sample(task: Task, samples: Samples, data: Leaves) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_sample` of frames that are all there."""
    samples = stand_in(samples)
    keys, gamma, live = task.keys, task.gamma, samples.live
    sizes = next(iter(data.values())).shape[: len(samples.indices)]
    envs, n_steps = math.prod(sizes[1:]), min(task.n_steps, live)
    # One frame ahead tells where a trajectory goes on: after the first and, for what comes after it, after the last.
    ahead = min(max(n_steps, 2) + (samples.ends is not None), live)
    own = _rows_of(samples, sizes)
    frames = _frames_of_windows(samples, data, (*keys.flags, *keys.rewards), sizes, own, ahead)
    if keys.done:
        done = functools.reduce(torch.bitwise_or, [frames.flag(key) for key in keys.done])
    else:
        # Its n and the newest frame end a window.
        done = torch.zeros_like(frames.followed)
    mask, traj = (None if key is None else frames.flag(key) for key in (keys.mask, keys.traj))
    boundary = find_boundaries(done, mask, traj, 0)
    goes_on = ~boundary & frames.followed
    nonterminal = frames.first(goes_on)
    if samples.ends is not None and keys.count is not None:
        # A window ends before an end whose rows are gone.
        newest = data[keys.count].reshape(-1, envs)[samples.newest]
        gone = frames.of_rows(newest) - frames.flag(keys.count) > samples.ends.slots
        goes_on[:-1] &= ~(boundary & frames.followed & gone)[1:]
    if samples.n_steps is not None:
        goes_on &= torch.arange(1, ahead + 1, device=own.device).unsqueeze(1) < samples.n_steps
    lengths, totals = sum_windows(goes_on, [frames.read[key] for key in keys.rewards], n_steps, gamma, 0)
    length = frames.first(lengths)
    steps = length.to(torch.int64)
    returns = {
        key: frames.first(total).to(return_dtype(data[key])) for key, total in zip(keys.rewards, totals, strict=True)
    }
    end = _turned(torch.add(own - envs, length, alpha=envs), live * envs)
    leaves = {}
    following: Following | None = None
    for out, key, at in keys.outputs:
        if at == AFTER_END:
            following = following or Following(samples, steps, sizes)
            leaves[out] = following.take(data, key)
        elif key in frames.read and not at:
            leaves[out] = frames.first(frames.read[key])
        else:
            leaves[out] = take_rows(data, key, end if at else own, sizes)
        if key in keys.wide:
            leaves[out] = leaves[out].to(keys.wide[key])
    powers = find(data, ("powers", gamma, n_steps), lambda: powers_of(gamma, n_steps, own.device))
    return Results(leaves, returns, steps, take_discounts(steps, powers), nonterminal)


class _Read(NamedTuple):
    """The frames that windows have, ``[K, M]``, time first."""

    read: dict[Hashable, Tensor]
    """Their flags and rewards, ``[K, M, *F]``."""
    followed: Tensor
    """Whether a frame is not the newest."""
    first: Callable[[Tensor], Tensor]
    """Of a value ``[K, M, *F]``, that of the first frame of every sample, ``[N, *F]``, in new memory."""
    of_rows: Callable[[Tensor], Tensor]
    """Of what there is for every environment, that of every column, ``[M]``."""

    def flag(self, key: Hashable) -> Tensor:
        """A flag, ``[K, M]``."""
        return self.read[key].view(self.followed.shape)


def _frames_of_windows(
    samples: Samples, data: Leaves, keys: Sequence[Hashable], sizes: torch.Size, own: Tensor, ahead: int
) -> _Read:
    """The first frames of all windows, then the next ones, and so on; or, where these are more, the whole ring."""
    live, envs, newest = samples.live, math.prod(sizes[1:]), samples.newest
    keys = list(dict.fromkeys(keys))
    if samples.n_steps is None and 2 * live * envs <= 3 * ahead * len(own):
        # Once round, and on until the window of the last slot ends.
        round_on = {key: torch.cat((data[key][:live], data[key][: ahead - 1])) for key in keys}
        read = {key: leaf.view(-1, envs, *leaf.shape[len(sizes) :]) for key, leaf in round_on.items()}
        slot = torch.arange(live + ahead - 1, device=own.device).unsqueeze(1)
        followed = ((slot != newest) & (slot != live + newest)).expand(-1, envs)
        return _Read(read, followed, lambda value: take(value.flatten(0, 1), own), lambda value: value)
    offsets = torch.arange(ahead, device=own.device).unsqueeze(1)
    walk = _turned(torch.add(own, offsets, alpha=envs), live * envs)
    read = {key: take_rows(data, key, walk, sizes) for key in keys}
    return _Read(read, offsets < _after(samples), lambda value: value[0].clone(), lambda value: value[own % envs])


def store_frames(
    data: Leaves,
    ring: Leaves,
    numbers: Tensor | None,
    dims: int,
    time_dim: int,
    slot: int | Tensor,
    ends: Ends | None = None,
) -> Tensor:
    """Computes :func:`multistep_triton.engine.store_frames`."""
    kept = next(iter(ring.values()))
    slots, *lead = kept.shape[:dims]
    slot, frames = int(slot) % slots, next(iter(data.values())).shape[time_dim]
    index = _frames_in_order(frames, *lead, device=kept.device).clone()
    index.select(1, 0).add_(slot)
    if slot + frames <= slots:
        runs = [(slot, frames)]
    else:
        runs = [(slot, slots - slot), (0, slot + frames - slots)]
        index.select(1, 0).remainder_(slots)
    if time_dim:
        data = {key: leaf.transpose(0, time_dim) for key, leaf in data.items()}
    keep = None
    if ends is not None:
        newest = (slot - 1) % slots
        keep = ends.find_writes(data, ends.find_ended(data, ring, newest), newest, slot)
    for key, leaf in ring.items():
        write_runs(leaf, data[key], runs, 0)
    if keep is not None:
        keep()
    if numbers is not None:
        write_runs(numbers, index.select(1, 0).view(frames, *lead), runs, 0)
    return index


@functools.lru_cache(maxsize=16)
def _frames_in_order(*sizes: int, device: torch.device) -> Tensor:
    """The index of every frame of ``sizes``, time first."""
    return torch.cartesian_prod(*[torch.arange(size, device=device) for size in sizes]).view(-1, len(sizes))


def write_runs(leaf: Tensor, frames: Tensor, runs: list[tuple[int, int]], time_dim: int) -> None:
    """Writes frames into runs of slots."""
    if len(runs) == 1:
        leaf.narrow(time_dim, *runs[0]).copy_(frames)
        return
    parts = frames.split_with_sizes([count for _, count in runs], time_dim) if runs else ()
    for (slot, count), part in zip(runs, parts, strict=True):
        leaf.narrow(time_dim, slot, count).copy_(part)


def _rows_of(samples: Samples, sizes: torch.Size) -> Tensor:
    """The rows that samples lie in, counted over ``sizes``."""
    row, *others = samples.indices
    if samples.rows is not None:
        row, others = samples.rows, []
    for size, each in zip(sizes[1:], others, strict=False):
        row = torch.add(each, row, alpha=size)
    # No window goes round more than once.
    return row.to(index_dtype(2 * math.prod(sizes)))


def _turned(rows: Tensor, end: int) -> Tensor:
    """Rows of which those from ``end`` on are at the beginning."""
    return torch.where(rows < end, rows, rows - end)


def _after(samples: Samples) -> Tensor:
    """How many newer frames there are in the row of each."""
    return (samples.newest - samples.indices[0]) % samples.live
