"""The fast path in eager PyTorch, on any device; the tests and ``backend="verify"`` compare it with ``spec``.

A call of fewer than n frames writes them into the free slots of the carry, and reads its outputs from the slots.
Keys are opaque. May import torch, ``task``, ``carry``, ``eager_ring`` and ``windows``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

from multistep_triton.carry import Carry, next_carry
from multistep_triton.eager_ring import n_step_sample as n_step_sample
from multistep_triton.eager_ring import store_frames as store_frames
from multistep_triton.task import Leaves, Results, Task, return_dtype
from multistep_triton.windows import discounts, find_windows, index_dtype, take_rows, write_runs

# Up to this many bytes of a leaf, joining carry and data costs less than further calls that read both where they lie.
JOIN_BYTES = 1 << 16


class _Joined(NamedTuple):
    """The carried frames, followed by the new ones."""

    carry: Carry | None
    data: Leaves
    time_dim: int
    carried: int
    known: int

    def old(self, key: Hashable, begin: int = 0, count: int | None = None) -> list[Tensor]:
        """Returns views of the carried frames, from ``begin`` on."""
        return self.carry.pieces(key, self.time_dim, begin, count) if self.carry else []

    def join(self, *keys: Hashable, time_first: bool) -> Tensor:
        """Returns all frames of a leaf or, given several flags, their logical or; a view of a leaf without a carry."""
        of_each, dim = zip(*([*self.old(key), self.data[key]] for key in keys), strict=True), self.time_dim
        views = [functools.reduce(torch.bitwise_or, views) for views in of_each]
        if time_first:
            views, dim = [view.movedim(dim, 0) for view in views], 0
        return views[0] if len(views) == 1 else torch.cat(views, dim)

    def split(self, key: Hashable, at: int) -> tuple[list[Tensor], list[Tensor]]:
        """Returns views of the frames before frame ``at``, and views of the others."""
        leaf = self.data[key]
        if at < self.carried:
            return self.old(key, 0, at), [*self.old(key, at), leaf]
        head, tail = leaf.split_with_sizes((at - self.carried, self.known - at), self.time_dim)
        return [*self.old(key), head], [tail]


def n_step_extend(task: Task, carry: Carry | None, data: Leaves) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_extend`."""
    keys, n_steps, gamma, time_dim, hold = task
    *lead, new = data[keys.done[0]].shape[: time_dim + 1]
    carried = carry.count if carry else 0
    known = carried + new
    emitted = max(known - n_steps, 0) if hold else known
    both = _Joined(carry, data, time_dim, carried, known)
    # What a longer call holds back is allocated where it is joined.
    held = keys.held if new < n_steps else ()
    after, stay = next_carry(carry, data, held, new, n_steps, time_dim) if hold else (None, 0)
    # If frames stay, the call writes new ones into the carry's slots, and reads its outputs there.
    ring = carry if stay else None
    n_steps = max(min(n_steps, known), 1)
    join = functools.partial(both.join, time_first=ring is not None)
    dim, shape = (0, (known, *lead)) if ring else (time_dim, (*lead, known))
    goes_on, lengths, totals = find_windows(join, task._replace(n_steps=n_steps), shape, dim)

    def come_out(value: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the emitted frames of ``value``, ``[*B, E, *F]``, in new memory."""
        value = value[:emitted].movedim(0, time_dim) if ring else value.narrow(time_dim, 0, emitted)
        return value.to(dtype, copy=True, memory_format=torch.contiguous_format)

    steps = come_out(lengths, torch.int64)
    returns = {key: come_out(total, return_dtype(data[key])) for key, total in zip(keys.rewards, totals, strict=True)}
    older = {}
    if after is not None:
        # Two carries in turn would take twice the memory, and save a CPU no time.
        after.spare = {}
        runs = after.runs(stay, new) if ring else []
        for key in keys.held:
            if ring:
                older[key] = both.old(key, 0, emitted)
                write_runs(after.leaves[key], data[key], runs, time_dim)
            else:
                older[key], newer = both.split(key, emitted)
                _lay_out(after, key, newer, time_dim)
    gather = _gather_in_ring(ring, lengths, emitted) if ring else _gather_in_joined(both, lengths, emitted, n_steps)
    leaves = {}
    for out, key, at_end in keys.outputs:
        if at_end:
            leaves[out] = gather(key).view(*lead, emitted, *data[key].shape[time_dim + 1 :])
        elif hold:
            leaves[out] = torch.cat(older[key] or [data[key].narrow(time_dim, 0, 0)], time_dim)
        else:
            leaves[out] = data[key]
    return Results(leaves, returns, steps, discounts(steps, n_steps, gamma), come_out(goes_on, torch.bool), after)


def _gather_in_ring(ring: Carry, lengths: Tensor, emitted: int) -> Callable[[Hashable], Tensor]:
    """Returns a function that reads a leaf at the ends of windows ``[E, *B]``, in slots that hold carry and data."""
    _, *lead = lengths.shape
    envs, time_dim = math.prod(lead), len(lead)
    begin, dtype = (ring.first - 1) * envs, index_dtype((ring.first + lengths.shape[0] + ring.capacity) * envs)
    before = torch.arange(begin, begin + emitted * envs, dtype=dtype, device=lengths.device).view(emitted, *lead)
    rows = torch.add(before, lengths[:emitted], alpha=envs).remainder_(ring.capacity * max(envs, 1))
    rows = rows.movedim(0, time_dim).flatten()
    return lambda key: take_rows(ring.leaves[key].movedim(time_dim, 0).flatten(0, time_dim), rows)


def _gather_in_joined(both: _Joined, lengths: Tensor, emitted: int, n_steps: int) -> Callable[[Hashable], Tensor]:
    """Returns a function that reads a leaf at the ends of windows ``[*B, S]``, of which ``emitted`` come out.

    Windows that begin in the carry may end there: the function reads them from the carry joined with the new frames
    near it. It reads the other windows from the data, which it copies only if the data is small.
    """
    _, data, dim, carried, known = both
    *lead, _ = lengths.shape
    seam, near = min(carried, emitted), min(carried + n_steps - 1, known)
    if seam and sum(leaf.nbytes for leaf in data.values()) <= JOIN_BYTES * len(data):
        seam, near = emitted, known
    seam_rows = _end_rows(lengths.narrow(dim, 0, seam), near, 0)
    if seam < emitted:
        data_rows = _end_rows(lengths.narrow(dim, 0, emitted), known - carried, -carried)
        if seam:
            # Windows that end in the carry have no row in the data; they get any row, which gather overwrites.
            data_rows = data_rows.clamp(min=0)

    def gather(key: Hashable) -> Tensor:
        if seam < emitted:
            future = take_rows(data[key].flatten(0, dim), data_rows)
        if seam or not emitted:
            joined = torch.cat([*both.old(key), data[key].narrow(dim, 0, near - carried)], dim)
            near_carry = take_rows(joined.flatten(0, dim), seam_rows)
            if seam == emitted:
                return near_carry
            features = future.shape[1:]
            future = future.view(*lead, emitted, *features)
            future.narrow(dim, 0, seam).copy_(near_carry.view(*lead, seam, *features))
        return future

    return gather


def _end_rows(lengths: Tensor, frames: int, offset: int) -> Tensor:
    """Returns rows of window ends in a source of ``frames`` per environment; window 0 begins at frame ``offset``."""
    *lead, count = lengths.shape
    envs = math.prod(lead)
    span = max(envs - 1, 0) * frames + count
    before = torch.arange(
        offset - 1, offset - 1 + span, dtype=index_dtype(envs * frames + count), device=lengths.device
    )
    return torch.add(before.unfold(0, count, max(frames, 1)), lengths.reshape(envs, count)).view(envs * count)


def gather_future(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future`; ``steps`` is int64 ``[*B, T]``."""
    return take_rows(value.flatten(0, steps.ndim - 1), _end_rows(steps, steps.shape[-1], 0)).view(value.shape)


def _lay_out(after: Carry, key: Hashable, pieces: list[Tensor], time_dim: int) -> None:
    """Holds back frames ``[*B, k, ...]``, one after the other, without an autograd graph."""
    pieces = [piece.detach() if piece.requires_grad else piece for piece in pieces]
    if not after.time_first:
        after.leaves[key] = torch.cat(pieces, time_dim)
        return
    at = 0
    for piece in pieces:
        write_runs(after.leaves[key], piece, after.runs(at, piece.shape[time_dim]), time_dim)
        at += piece.shape[time_dim]
