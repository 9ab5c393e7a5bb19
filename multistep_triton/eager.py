"""The fast path in eager PyTorch, on any device; held to ``spec`` by the tests and by ``backend="verify"``.

Windows of 1, 2, 4, ... frames are joined, so that sums take as many operators as n has binary digits, or twice as
many. Calls of fewer than n frames write these into the free slots of the carry, and read all that comes out there.
Keys are opaque. May import torch, ``task`` and ``carry``.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multistep_triton.carry import Carry, find_slots
from multistep_triton.task import Results, Samples, Task, return_dtype, sampled_where_frames_are, summed_dtype

# Up to this many bytes, joining carry and data costs less than the calls it takes to read them where they lie.
_JOIN_BYTES = 1 << 16

Windows = tuple[Tensor, list[Tensor]]
"""Lengths, int32, and discounted sums of the rewards."""

# torch selects no single elements of these; their bits are those of the signed ones.
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


class _Stream(NamedTuple):
    """The frames carried and then the new ones."""

    carry: Carry | None
    data: Mapping[Hashable, Tensor]
    time_dim: int
    carried: int
    known: int

    def pieces(self, key: Hashable, begin: int, end: int) -> list[Tensor]:
        """Views of the frames from ``begin`` on that come before ``end``."""
        carried, dim, views = self.carried, self.time_dim, []
        if self.carry and begin < min(end, carried):
            views = self.carry.pieces(key, dim, begin, min(end, carried) - begin)
        if end > carried or not views:
            first = max(begin, carried)
            views.append(self.data[key].narrow(dim, first - carried if end > first else 0, max(end - first, 0)))
        return views

    def join(self, key: Hashable, time_first: bool = False) -> Tensor:
        """All frames; a view where there is nothing to join."""
        views, dim = self.pieces(key, 0, self.known) if self.carry else [self.data[key]], self.time_dim
        if time_first:
            views, dim = [view.movedim(dim, 0) for view in views], 0
        return views[0] if len(views) == 1 else torch.cat(views, dim)

    def copy(self, key: Hashable, begin: int, end: int) -> Tensor:
        """The frames from ``begin`` on that come before ``end``, in new memory."""
        return torch.cat(self.pieces(key, begin, end), self.time_dim)


def n_step_extend(task: Task, carry: Carry | None, data: Mapping[Hashable, Tensor]) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_extend`."""
    keys, n_steps, gamma, time_dim, hold = task
    *lead, new = data[keys.done[0]].shape[: time_dim + 1]
    carried = carry.count if carry else 0
    known = carried + new
    emitted = max(known - n_steps, 0) if hold else known
    stream, slots = _Stream(carry, data, time_dim, carried, known), find_slots(carry, data.values(), new, n_steps)
    # If so, new frames are written into the carry, and what comes out is read there.
    ring = carry if slots.stay else None
    inside, lengths, totals = _windows_of(stream, task, lead, ring is not None)

    def come_out(value: Tensor, dtype: torch.dtype) -> Tensor:
        """Of every frame that comes out, ``[*B, E, *F]``, in new memory."""
        dim = 0 if ring else time_dim
        emitted_first = value.narrow(dim, 0, emitted).movedim(dim, time_dim)
        return emitted_first.to(dtype, copy=True, memory_format=torch.contiguous_format)

    steps = come_out(lengths, torch.int64)
    returns = {
        key: come_out(total, return_dtype(data[key])) for key, total in zip(keys.rewards, totals, strict=True)
    }
    held: dict[Hashable, Tensor] = {}
    for key in keys.held if hold else ():
        if ring:
            held[key] = ring.leaves[key]
            _write(held[key], data[key], ring.runs(carried, new), time_dim)
        else:
            held[key] = _lay_out(stream.pieces(key, emitted, known), slots, time_dim)
    after = slots.carry(held, emitted, known) if hold else None
    gather = _gather_in_ring(ring, lengths, emitted) if ring else _gather_in_stream(stream, lengths.narrow(time_dim, 0, emitted), n_steps)
    leaves = {}
    for out, key, at_end in keys.outputs:
        if at_end:
            leaves[out] = gather(key).view(*lead, emitted, *data[key].shape[time_dim + 1 :])
        else:
            leaves[out] = stream.copy(key, 0, emitted) if hold else data[key]
    return Results(leaves, returns, steps, discounts(steps, n_steps, gamma), come_out(inside, torch.bool), after)


def _windows_of(
    stream: _Stream, task: Task, lead: Sequence[int], time_first: bool
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Of windows that begin at frames of carry and data: which end there, lengths, and sums of rewards."""
    keys, n_steps, gamma, dim, hold = task
    known, shape = stream.known, (*lead, stream.known)
    if time_first:
        dim, shape = 0, (stream.known, *lead)
    flag = {key: stream.join(key, time_first).reshape(shape) for key in keys.flags}
    inside = ~find_boundaries([flag[key] for key in keys.done], flag.get(keys.mask), flag.get(keys.traj), dim)
    rewards = [stream.join(key, time_first) for key in keys.rewards]
    n_steps = max(min(n_steps, known), 1)
    if not hold and known:
        # All windows come out, those at the end cut.
        inside = _pad(inside.narrow(dim, 0, known - 1), n_steps, dim)
        rewards = [_pad(reward, n_steps - 1, dim) for reward in rewards]
    return inside, *sum_windows(inside, rewards, n_steps, gamma, dim)


def _gather_in_ring(ring: Carry, lengths: Tensor, emitted: int) -> Callable[[Hashable], Tensor]:
    """What is read at the ends of windows ``[E, *B]`` in slots that hold carry and data."""
    dims, envs = lengths.ndim, math.prod(lengths.shape[1:])
    begin, end = (ring.first - 1) * envs, (ring.first - 1 + emitted) * envs
    dtype = index_dtype((ring.first + lengths.shape[0] + ring.capacity) * envs)
    before = torch.arange(begin, end, dtype=dtype, device=lengths.device).view(emitted, *lengths.shape[1:])
    rows = torch.add(before, lengths.narrow(0, 0, emitted), alpha=envs).remainder_(ring.capacity * max(envs, 1))
    rows = rows.movedim(0, dims - 1).flatten()
    return lambda key: take(ring.leaves[key].movedim(dims - 1, 0).flatten(0, dims - 1), rows)


def _gather_in_stream(stream: _Stream, lengths: Tensor, n_steps: int) -> Callable[[Hashable], Tensor]:
    """What is read at the ends of windows ``[*B, E]``.

    Those that begin in the carry may end there, and are read from it and the new frames near it; the others are read
    from the data, so that no copy of it is made.
    """
    _, data, dim, carried, known = stream
    new, (*lead, emitted) = known - carried, lengths.shape
    seam, near = min(carried, emitted), min(carried + n_steps - 1, known)
    if seam and sum(leaf.nbytes for leaf in data.values()) <= _JOIN_BYTES:
        seam, near = emitted, known

    seam_rows = _end_rows(lengths.narrow(dim, 0, seam), near, 0)
    data_rows = _end_rows(lengths, new, -carried) if seam < emitted else seam_rows
    if seam:
        # Windows that end in the carry have no row in the data; they get any.
        data_rows = data_rows.clamp(min=0)

    def gather(key: Hashable) -> Tensor:
        joined = stream.copy(key, 0, near).flatten(0, dim) if seam else data[key]
        if seam == emitted:
            return take(joined, seam_rows)
        future = take(data[key].flatten(0, dim), data_rows)
        if seam:
            features = future.shape[1:]
            near_carry = take(joined, seam_rows).view(*lead, seam, *features)
            future.view(*lead, emitted, *features).narrow(dim, 0, seam).copy_(near_carry)
        return future

    return gather


def _end_rows(steps: Tensor, frames: int, offset: int) -> Tensor:
    """Rows at the ends of windows in a source of so many frames per environment, of which ``offset`` is the first."""
    *lead, count = steps.shape
    envs = math.prod(lead)
    dtype = index_dtype(envs * frames + count)
    starts = torch.arange(envs, dtype=dtype, device=steps.device).mul_(frames).view(*lead, 1)
    before = torch.arange(offset - 1, offset - 1 + count, dtype=dtype, device=steps.device)
    return torch.add(starts + before, steps).to(dtype).flatten()


@sampled_where_frames_are
def n_step_sample(task: Task, samples: Samples, data: Mapping[Hashable, Tensor]) -> Results:
    """Computes :func:`multistep_triton.engine.n_step_sample` of frames that are all there.

    Windows are found in the whole ring or, where that is more, in the frames that windows may have, ``[K, N]``.
    """
    keys, gamma, (time, *others) = task.keys, task.gamma, samples.indices
    sizes = next(iter(data.values())).shape[: len(samples.indices)]
    envs, live = math.prod(sizes[1:]), samples.live
    n_steps = min(task.n_steps, live)
    # One frame ahead, even if n is 1, tells where a trajectory goes on.
    ahead = min(max(n_steps, 2), live)
    whole = samples.n_steps is None and 2 * live * envs <= 3 * ahead * time.shape[0]
    place = _places(samples, sizes)
    walked: dict[int, Tensor] = {}
    if whole:
        shape = torch.Size((live + ahead - 1, envs))

        def stream(key: Hashable) -> Tensor:
            """The ring once round, and on until the window of its last slot ends."""
            leaf = data[key]
            return torch.cat((leaf[:live], leaf[: ahead - 1])).reshape(*shape, *leaf.shape[len(sizes) :])

        def of_samples(value: Tensor) -> Tensor:
            return take(value.flatten(0, 1), place)
    else:
        shape = torch.Size((ahead, time.shape[0]))
        offsets = torch.arange(ahead, device=time.device).unsqueeze(1)
        walk = _turned(offsets * envs + place, live * envs).flatten()

        def stream(key: Hashable) -> Tensor:
            """What windows may have: the first frames of all, then the next ones."""
            walked[id(data[key])] = leaf = take_places(data[key], walk, sizes)
            return leaf.view(*shape, *leaf.shape[1:])

        def of_samples(value: Tensor) -> Tensor:
            return value[0].clone()

    flag = {key: stream(key).reshape(shape) for key in keys.flags}
    # Where there is no flag, its n and the newest frame end a window.
    dones = [flag[key] for key in keys.done] or [torch.zeros(shape, dtype=torch.bool, device=time.device)]
    inside = ~find_boundaries(dones, flag.get(keys.mask), flag.get(keys.traj), 0)
    if whole:
        inside[samples.newest :: live] = False
    else:
        inside &= offsets < _after(samples)
    nonterminal = of_samples(inside)
    if samples.n_steps is not None:
        inside &= offsets + 1 < samples.n_steps
    lengths, totals = sum_windows(inside, [stream(key) for key in keys.rewards], n_steps, gamma, 0)
    lengths = of_samples(lengths)
    steps = lengths.to(torch.int64)
    returns = {
        key: of_samples(total).to(return_dtype(data[key])) for key, total in zip(keys.rewards, totals, strict=True)
    }
    end = _turned(torch.add(place - envs, lengths, alpha=envs), live * envs)
    leaves = {}
    for out, key, at_end in keys.outputs:
        if not at_end and (frames := walked.get(id(data[key]))) is not None:
            leaves[out] = frames[: time.shape[0]].clone()
        else:
            leaves[out] = take_places(data[key], end if at_end else place, sizes)
    return Results(leaves, returns, steps, discounts(steps, n_steps, gamma), nonterminal)


def gather_future(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future`; ``steps`` is int64 ``[*B, T]``."""
    return take(value.flatten(0, steps.ndim - 1), _end_rows(steps, steps.shape[-1], 0)).view(value.shape)


def find_boundaries(dones: Sequence[Tensor], mask: Tensor | None, traj: Tensor | None, dim: int) -> Tensor:
    """Boundaries: done, or invalid, or followed by an invalid frame or by one of another trajectory."""
    boundary = functools.reduce(torch.bitwise_or, dones)
    frames = boundary.shape[dim]
    before = max(frames - 1, 0)
    if mask is not None:
        boundary = boundary | ~mask
        boundary.narrow(dim, 0, before).logical_or_(~mask.narrow(dim, frames - before, before))
    if traj is not None:
        boundary = boundary.clone()
        changes = traj.narrow(dim, frames - before, before) != traj.narrow(dim, 0, before)
        boundary.narrow(dim, 0, before).logical_or_(changes)
    return boundary


def sum_windows(inside: Tensor, rewards: Sequence[Tensor], n_steps: int, gamma: float, dim: int) -> Windows:
    """The windows of ``n_steps`` of ``S`` frames, time in dimension ``dim``: of the first ``S - n_steps + 1``.

    ``inside`` is False at boundaries.
    """
    length, on = 1, inside
    block = torch.ones_like(inside, dtype=torch.int32), [reward.to(summed_dtype(reward)) for reward in rewards]
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
    powers = torch.tensor([gamma**k for k in range(n_steps + 1)], dtype=torch.float32, device=steps.device)
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


def take_places(leaf: Tensor, places: Tensor, sizes: torch.Size) -> Tensor:
    """Rows of a leaf ``[*sizes, *F]``, counted over ``sizes``, as a new ``[N, *F]``; no other row is read."""
    strides, dims = leaf.stride(), [dim for dim, size in enumerate(sizes) if size != 1]
    if all(strides[outer] == strides[inner] * sizes[inner] for outer, inner in itertools.pairwise(dims)):
        return take(leaf.flatten(0, len(sizes) - 1), places)
    if signed := SIGNED.get(leaf.dtype):
        return take_places(leaf.view(signed), places, sizes).view(leaf.dtype)
    return leaf[torch.unravel_index(places, sizes)]


def _pad(value: Tensor, frames: int, dim: int) -> Tensor:
    """``value`` followed by frames of zeros, which no window reads."""
    if not frames:
        return value
    return torch.cat((value, value.new_zeros((*value.shape[:dim], frames, *value.shape[dim + 1 :]))), dim)


def _lay_out(pieces: list[Tensor], slots: Any, time_dim: int) -> Tensor:
    """Frames ``[*B, k, ...]`` one after the other from slot 0 on, in new memory and without an autograd graph."""
    pieces = [piece.detach() if piece.requires_grad else piece for piece in pieces]
    if not slots.time_first:
        return torch.cat(pieces, time_dim)
    leaf, at = slots.empty(pieces[0], time_dim), 0
    for piece in pieces:
        count = piece.shape[time_dim]
        _write(leaf, piece, [(at, count)], time_dim)
        at += count
    return leaf


def _write(leaf: Tensor, frames: Tensor, runs: list[tuple[int, int]], time_dim: int) -> None:
    """Writes frames into runs of slots."""
    parts = frames.split_with_sizes([count for _, count in runs], time_dim) if runs else ()
    for (slot, count), part in zip(runs, parts, strict=True):
        leaf.narrow(time_dim, slot, count).copy_(part)


def _places(samples: Samples, sizes: torch.Size) -> Tensor:
    """Where samples lie, counted over ``sizes``."""
    place, *others = samples.indices
    for size, each in zip(sizes[1:], others, strict=True):
        place = torch.add(each, place, alpha=size)
    # No window goes round more than once.
    return place.to(index_dtype(2 * math.prod(sizes)))


def _turned(places: Tensor, end: int) -> Tensor:
    """Places of which those from ``end`` on are at the beginning."""
    return torch.where(places < end, places, places - end)


def _after(samples: Samples) -> Tensor:
    """How many newer frames there are in the row of each."""
    after = samples.newest - samples.indices[0]
    return torch.where(after < 0, after + samples.live, after)
