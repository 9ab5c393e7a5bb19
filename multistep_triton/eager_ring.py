"""The fast path in eager PyTorch for frames in a ring: stores frames there, and samples them.

Where observations are kept once, it replaces sampled ends that are gone, and reads the rows after windows. Frames are
named by rows, counted over ``[C, *R]`` or, with a row for every agent, ``[C, *R, *A]``. Keys are opaque. May import
torch, ``carry``, ``task``, ``samples``, ``ends`` and ``windows``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multistep_triton.carry import runs_of
from multistep_triton.ends import Ends
from multistep_triton.samples import Ring, Samples, sampled_where_frames_are
from multistep_triton.task import AFTER_END, Leaves, Results, Task, compute_once, return_dtype, summed_dtype
from multistep_triton.windows import (
    Taker,
    bits,
    find_boundaries,
    find_windows,
    move_rows,
    powers_of,
    take_rows,
    takers,
    write_runs,
)


@sampled_where_frames_are
def n_step_sample(task: Task, samples: Samples, data: Leaves) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_sample` of indices that all point at frames."""
    keys, live, sizes = task.keys, samples.live, next(iter(data.values())).shape[: len(samples.indices)]
    if task.n_steps > live:
        task = task._replace(n_steps=live)
    envs, n_steps, gamma = math.prod(sizes[1:]), task.n_steps, task.gamma
    own, take = samples.rows_in(sizes), takers(data, sizes)
    counted = lost = None
    if samples.ends is not None:
        counted = EndCounts(samples.ends, samples.newest, live, envs, own)
        own, lost = counted.rows, counted if counted.has_lost else None
    first: dict[Any, Tensor] = {}
    few = n_steps.bit_length() * live * envs > 3 * n_steps * len(own)
    if samples.n_steps is None and lost is None and not few:
        # Joining the windows of all frames of the ring costs less than reading so many sampled windows frame by frame.
        length, returns, nonterminal = _windows_of_ring(task, samples, data, own, envs)
    else:
        length, returns, nonterminal, first = _windows_of_frames(task, samples, data, own, take, envs, lost)
    end, steps = move_rows(own, length, live, envs), length + 1
    leaves = {}
    following: NextRows | None = None
    for out, key, at in keys.outputs:
        if at == AFTER_END:
            assert counted is not None
            following = following or NextRows(end, counted)
            leaves[out] = following.take(key, take[key])
        elif key in first and not at:
            leaves[out] = first[key].clone()
        else:
            leaves[out] = take[key](end if at else own)
        if key in keys.wide_dtypes:
            leaves[out] = leaves[out].to(keys.wide_dtypes[key])
    powers = compute_once(data, ("powers", gamma, n_steps), lambda: powers_of(gamma, n_steps, own.device))
    return Results(leaves, returns, steps, powers.index_select(0, steps), nonterminal)


def _windows_of_frames(
    task: Task,
    samples: Samples,
    data: Leaves,
    own: Tensor,
    take: Mapping[Any, Taker],
    envs: int,
    lost: EndCounts | None,
) -> tuple[Tensor, dict[Any, Tensor], Tensor, dict[Any, Tensor]]:
    """Returns ``steps - 1``, returns and nonterminal of the windows that begin at ``own``, and first frames by key.

    Windows end before ends whose rows are ``lost``.
    """
    keys, n_steps, live = task.keys, task.n_steps, samples.live
    # One frame more tells whether the trajectory goes on after the first and, if ends are gone, after the last frame.
    count = min(max(n_steps, 2) + (lost is not None), live)
    ahead: Tensor = compute_once(
        data, ("ahead", count), lambda: torch.arange(count, dtype=torch.int32, device=own.device).unsqueeze(1)
    )
    # The first frames of all windows come first, then the second ones, and so on.
    walk = move_rows(own, ahead, live, envs)
    rows = walk.view(-1)
    marks = [key for key in (*keys.done, keys.mask, keys.traj) if key is not None]
    read = {key: take[key](rows) for key in dict.fromkeys((*marks, *keys.rewards))}
    flags = {key: read[key].view(walk.shape) for key in marks}
    # Without flags, only n and the newest frame end a window.
    dones = [flags[key] for key in keys.done] or [torch.zeros_like(walk, dtype=torch.bool)]
    done = functools.reduce(torch.bitwise_or, dones)
    boundary = find_boundaries(done, flags.get(keys.mask), flags.get(keys.traj), 0)
    is_newest = ahead >= (samples.newest - own // envs) % live
    last = boundary | is_newest
    nonterminal = ~last[0]
    if lost is not None:
        # A window ends before an end that is gone, of any group.
        last[:-2] |= lost.are_lost(walk[1:], lost.count(walk[1:]))
    last |= ahead >= (n_steps if samples.n_steps is None else samples.n_steps) - 1
    # torch.max would return this index itself, but shares even the smallest tensors out among threads.
    length = torch.where(last, ahead, count).amin(0).to(torch.int64)
    beyond, returns = ahead > length, {}
    for key in keys.rewards:
        reward = read[key].view(*walk.shape, *read[key].shape[1:]).to(summed_dtype(data[key]))
        # A boundary selects, it never multiplies, so that a NaN or Inf after it does not reach the frames before it.
        # The -0.0 in the place of frames beyond the window changes no sum, not even one of -0.0.
        known = reward.masked_fill(beyond.view(*walk.shape, *[1] * (reward.ndim - 2)), -0.0)
        returns[key] = _discounted_sum(known.unbind()[:n_steps], task.gamma).to(return_dtype(data[key]))
    return length, returns, nonterminal, {key: each[: len(own)] for key, each in read.items()}


def _windows_of_ring(
    task: Task, samples: Samples, data: Leaves, own: Tensor, envs: int
) -> tuple[Tensor, dict[Any, Tensor], Tensor]:
    """Returns the same without first frames, by joining the windows of all frames of the ring, oldest first."""
    keys, live, dims = task.keys, samples.live, len(samples.indices)
    oldest, sizes = (samples.newest + 1) % live, (live, *next(iter(data.values())).shape[1:dims])

    def in_order(*keys: Hashable) -> Tensor:
        views = [torch.cat((data[key][oldest:live], data[key][:oldest])) for key in keys]
        return functools.reduce(torch.bitwise_or, views)

    goes_on, lengths, totals = find_windows(in_order, task._replace(hold=False), sizes, 0)
    rows = move_rows(own, -oldest, live, envs)
    length, nonterminal, *sums = (take_rows(each.flatten(0, dims - 1), rows) for each in (lengths, goes_on, *totals))
    returns = {key: each.to(return_dtype(data[key])) for key, each in zip(keys.rewards, sums, strict=True)}
    return length.to(torch.int64) - 1, returns, nonterminal


def _discounted_sum(rewards: Sequence[Tensor], gamma: float) -> Tensor:
    """Returns the discounted sum of consecutive rewards, added in the order in which :func:`sum_windows` joins."""
    if len(rewards) == 1:
        return rewards[0]
    half = 1 << (len(rewards) - 1).bit_length() - 1
    first, then = _discounted_sum(rewards[:half], gamma), _discounted_sum(rewards[half:], gamma)
    return torch.add(first, then, alpha=gamma**half)


def store_frames(data: Leaves, ring: Ring, slot: int | Tensor) -> Tensor:
    """Computes :func:`multistep_triton.engine.store_frames`."""
    leaves, numbers, dims, time_dim, ends = ring
    kept = next(iter(leaves.values()))
    slots, *lead = kept.shape[:dims]
    slot, frames = int(slot) % slots, next(iter(data.values())).shape[time_dim]
    in_order = _frames_in_order if frames * math.prod(lead) <= MOST_CACHED else _frames_in_order.__wrapped__
    index = in_order(frames, *lead, device=kept.device).clone()
    index.select(1, 0).add_(slot)
    runs = runs_of(slot, frames, slots)
    if len(runs) > 1:
        index.select(1, 0).remainder_(slots)
    if time_dim:
        data = {key: leaf.transpose(0, time_dim) for key, leaf in data.items()}
    keep = None
    if ends is not None:
        newest = (slot - 1) % slots
        keep = ends.find_writes(data, ends.find_ended(data, leaves, newest), newest, slot)
    for key, leaf in leaves.items():
        write_runs(leaf, data[key], runs, 0)
    if keep is not None:
        keep()
    if numbers is not None:
        write_runs(numbers, index.select(1, 0).view(frames, *lead), runs, 0)
    return index


# The index of more frames is made anew, as the cache would keep its memory.
MOST_CACHED = 1 << 14


@functools.lru_cache(maxsize=16)
def _frames_in_order(*sizes: int, device: torch.device) -> Tensor:
    """Returns the index of every frame of ``sizes``, time first."""
    return torch.cartesian_prod(*[torch.arange(size, device=device) for size in sizes]).view(-1, len(sizes))


class EndCounts:
    """Sampled frames ``[N]`` of a storage of ``live`` slots of ``envs`` rows each, and the counts of ends near them."""

    def __init__(self, ends: Ends, newest: int, live: int, envs: int, rows: Tensor) -> None:
        """Finds whether any end is gone, for which the host waits, and replaces the sampled frames that are such ends.

        The frame before replaces such an end. If that is an end, too, or no frame is there, the newest frame of the
        environment does.
        """
        self.ends, self.live, self.envs, self.rows = ends, live, envs, rows
        self.agents, self.oldest = envs // max(ends.count[0].numel(), 1), (newest + 1) % live
        self.has_lost = bool((ends.count[newest] - ends.count[self.oldest] > ends.slots).any())
        if self.has_lost:
            # The rows of the newest frames of these environments, and their counts of ends.
            self.newest = rows % envs + newest * envs
            self.total = self.count(self.newest)
            around = move_rows(rows, torch.arange(-1, 2, device=rows.device).unsqueeze(1), live, envs)
            before, own, _ = numbers = self.count(around)
            lost = self.are_lost(around[1:], numbers[1:])[0]
            # An end before one that is gone is gone, too.
            is_end = (before != own) & (around[0] != self.newest)
            self.rows = torch.where(lost, torch.where(is_end, self.newest, around[0]), rows)

    def count(self, rows: Tensor) -> Tensor:
        """Returns how many ends were passed on before the frames at ``rows`` came; a frame's agents share one count."""
        rows = rows if self.agents == 1 else rows // self.agents
        return self.ends.count.view(-1).index_select(0, rows.view(-1)).view(rows.shape)

    def are_lost(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Returns which of consecutive frames ``[K, N]`` but the last are ends that are gone, by their counts."""
        return (numbers[:-1] != numbers[1:]) & (rows[:-1] != self.newest) & self.is_gone(numbers[:-1])

    def is_gone(self, number: Tensor) -> Tensor:
        """Returns whether later ends have overwritten the rows of the ends with these numbers."""
        return self.total - number > self.ends.slots


class NextRows:
    """The rows after frames: the next frames hold them, but ``Ends`` those after the newest frame and ends not gone."""

    def __init__(self, rows: Tensor, counted: EndCounts) -> None:
        """Finds where these rows lie."""
        ends, envs = counted.ends, counted.envs
        self.after, oldest = move_rows(rows, 1, counted.live, envs), counted.oldest * envs
        number, is_newest = counted.count(rows), (self.after >= oldest) & (self.after < oldest + envs)
        is_end = number != counted.count(self.after)
        if counted.has_lost:
            is_end &= ~counted.is_gone(number)
        self.kept = (is_end | is_newest).nonzero().view(-1)
        row, number, is_newest = (each.index_select(0, self.kept) for each in (rows, number, is_newest))
        slot = torch.where(is_newest, ends.slots, number % ends.slots)
        self.row, self.kept_rows = torch.add(row % envs, slot, alpha=envs), ends.rows

    def take(self, key: Hashable, take: Taker) -> Tensor:
        """Returns the rows of a leaf; ``take`` copies those that frames hold."""
        taken = take(self.after)
        if len(self.kept):
            rows = bits(self.kept_rows[key])
            rows = rows.flatten(0, rows.ndim - taken.ndim).index_select(0, self.row)
            bits(taken).index_copy_(0, self.kept, rows)
        return taken
