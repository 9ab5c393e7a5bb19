"""The reference: n-step windows in eager PyTorch, on any device.

It defines what is correct, verifies the kernels, and is the fast path on CPU. Owns the maths and nothing
else: arguments arrive validated (by ``functional`` and ``base``), keys are opaque. May import torch and ``ring``.

Terms: a *boundary* is a frame after which nothing of its trajectory follows; the *window* of frame ``t`` is
``t .. e(t)``, ``e(t)`` the smallest of ``t + n - 1``, the first boundary at or after ``t``, and the last frame.

Windows are computed on flat tensors ``[N, ...]``, where the frame after one lies ``stride`` places further on: one
place if rows lie end to end, as in the data, as many as there are rows if frames do, as in a ring. What leaves its row
reads frames of another, but no window that comes out does: it has ended before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from multistep_triton.ring import Place, Ring, find_place

if TYPE_CHECKING:
    from multistep_triton.task import Task

Leaves = dict[Hashable, Tensor]

# Up to this many bytes, joining carry and data costs less than the calls it takes to read them where they lie.
_JOIN_BYTES = 1 << 16
# So it does where fewer frames move: all that are known, or else those near the seam, and those at it this often more.
_SEAM_MOVES = 2

# torch selects no single elements of these; their bits are those of the signed ones.
SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def gather_future_reference(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future`; ``steps`` is int64 ``[*B, T]``."""
    return _take(value, _end_rows(steps, value.shape[steps.ndim - 1], 0), steps.shape)


def n_step_extend_reference(
    carry: Ring | None,
    data: Mapping[Hashable, Tensor],
    task: Task,
    *,
    time_dim: int,
    n_steps: int,
    gamma: float,
    hold: bool,
) -> tuple[Leaves, Leaves, Tensor, Tensor, Tensor, Ring | None]:
    """Computes :func:`multistep_triton.dispatch.n_step_extend`."""
    *lead, new = data[task.done_keys[0]].shape[: time_dim + 1]
    carried = carry.count if carry else 0
    known = carried + new
    emitted = max(known - n_steps, 0) if hold else known
    place = find_place(carry, data.values(), new, n_steps)
    # If so, new frames are written into it, and all that comes out is read there.
    ring = carry if place.stay > 0 else None
    n_steps = max(min(n_steps, known), 1)
    rows = math.prod(lead)
    stride = rows if ring else 1

    def old(key: Hashable, begin: int = 0, count: int | None = None) -> list[Tensor]:
        return carry.pieces(key, time_dim, begin, count) if carry else []

    def stream(*keys: Hashable) -> Tensor:
        """Carry and data as one, ``[N, *F]``, and after it frames that no window reads; of several flags, any."""
        of_each = zip(*([*old(key), data[key]] for key in keys), strict=True)
        pieces = [functools.reduce(torch.bitwise_or, each) for each in of_each]
        if ring:
            return torch.cat([piece.movedim(time_dim, 0) for piece in pieces]).flatten(0, time_dim)
        joined = _join(pieces, time_dim).flatten(0, time_dim).contiguous()
        return joined if hold else _pad(joined, n_steps - 1)

    row = 1 if ring else known
    apart = (*(math.prod(lead[dim + 1 :]) * row for dim in range(time_dim)), stride)

    def cut(value: Tensor) -> Tensor:
        """The frames of ``[N, *F]`` that come out, ``[*B, E, *F]``; a view."""
        _, *tail = value.shape
        strides = [step * math.prod(tail) for step in apart]
        return value.as_strided((*lead, emitted, *tail), (*strides, *value.stride()[1:]))

    mask, traj = (None if key is None else stream(key).flatten() for key in (task.mask_key, task.traj_key))
    inside = ~find_boundaries(stream(*task.done_keys).flatten(), mask, traj, stride)
    if not hold:
        inside[max(known - 1, 0) :: max(known, 1)] = False
    lengths, totals = sum_windows(inside, [stream(key) for key in task.reward_keys], n_steps, stride, gamma)
    steps = _compact(cut(lengths), torch.int64)
    nonterminal = _compact(cut(inside), torch.bool)
    returns = {
        key: _compact(cut(total), return_dtype(data[key])) for key, total in zip(task.reward_keys, totals, strict=True)
    }

    # A window that starts in the carry ends in the carry or in the first n - 1 new frames; every other one lies in the
    # new data, and is read there. Where that costs more than it saves, all are read from the stream.
    seam, near = min(carried, emitted), min(carried + n_steps - 1, known)
    if known <= near + _SEAM_MOVES * seam or sum(leaf.nbytes for leaf in data.values()) <= _JOIN_BYTES:
        seam = emitted
    if ring or seam == emitted:
        begin = (place.first if ring else 0) * stride
        dtype = index_dtype((known + n_steps + place.capacity) * rows)
        before = torch.arange(begin - stride, begin - stride + lengths.shape[0], dtype=dtype, device=steps.device)
        ends = torch.add(before, lengths, alpha=stride)
        source_rows = cut(ends.remainder_(place.capacity * rows) if ring else ends).flatten()
    else:
        # Windows that end in the carry have no row here; they get any, and are overwritten below.
        data_rows = _end_rows(cut(lengths), new, -carried).clamp_(min=0)
        seam_rows = _end_rows(steps.narrow(time_dim, 0, seam), near, 0)

    def gather(key: Hashable) -> Tensor:
        shape = (*lead, emitted)
        if ring:
            return _take(ring.leaves[key].movedim(time_dim, 0), source_rows, shape)
        if seam == emitted:
            return _take(_join([*old(key), data[key]], time_dim), source_rows, shape)
        future = _take(data[key], data_rows, shape)
        if seam:
            joined = torch.cat((*old(key), data[key].narrow(time_dim, 0, near - carried)), time_dim)
            future.narrow(time_dim, 0, seam).copy_(_take(joined, seam_rows, (*lead, seam)))
        return future

    leaves, held = {key: leaf for key, leaf in data.items() if key not in task.only_read}, {}
    for key, leaf in list(leaves.items()) if hold else ():
        if ring:
            older, held[key] = old(key, 0, emitted), ring.leaves[key]
            _write(held[key], leaf, ring.runs(carried, new), time_dim)
        else:
            if emitted < carried:
                older, newer = old(key, 0, emitted), [*old(key, emitted), leaf]
            else:
                head, tail = leaf.split_with_sizes((emitted - carried, known - emitted), time_dim)
                older, newer = [*old(key), head], [tail]
            held[key] = _lay_out(newer, place, time_dim)
        if key not in task.gathered_keys:
            leaves[key] = torch.cat(older, time_dim) if older else leaf.narrow(time_dim, 0, 0).clone()
    for key in task.gathered_keys:
        leaves[key] = gather(key)
    after = place.ring(held, emitted, known) if hold else None
    return leaves, returns, steps, discounts(steps, n_steps, gamma), nonterminal, after


def sum_windows(
    inside: Tensor, rewards: list[Tensor], n_steps: int, stride: int, gamma: float
) -> tuple[Tensor, list[Tensor]]:
    """Lengths, int32 ``[M]``, and discounted sums ``[M, *F]`` of the windows of ``n_steps`` frames.

    Windows of 1, 2, 4, ... frames are joined: as many sums as ``n_steps`` has binary digits, or twice as many.
    ``inside`` ``[N]`` is False at boundaries.
    """
    length, on = 1, inside
    block = torch.ones_like(inside, dtype=torch.int32), [_accumulated(reward) for reward in rewards]
    whole = None
    while True:
        if n_steps & length:
            whole = block if whole is None else _append(on, block, whole, length * stride, gamma**length)
            if 2 * length > n_steps:
                return whole
        block = _append(on, block, block, length * stride, gamma**length)
        on = on[: block[0].shape[0]] & on[length * stride :]
        length *= 2


def _append(
    on: Tensor, first: tuple[Tensor, list[Tensor]], then: tuple[Tensor, list[Tensor]], shift: int, weight: float
) -> tuple[Tensor, list[Tensor]]:
    """Windows of ``first`` which, where the trajectory is ``on`` to their end, go on with those of ``then``.

    A boundary selects, it never multiplies, so that a NaN or Inf after it does not reach the frames before it.
    """
    count = max(then[0].shape[0] - shift, 0)
    on = on[:count]
    lengths = torch.addcmul(first[0][:count], on, then[0][shift:])
    totals = []
    for total, further in zip(first[1], then[1], strict=True):
        total = total[:count]
        goes_on = on.view(-1, *[1] * (total.ndim - 1))
        totals.append(torch.where(goes_on, torch.add(total, further[shift:], alpha=weight), total))
    return lengths, totals


def _accumulated(reward: Tensor) -> Tensor:
    """Rewards in the precision in which they are summed."""
    return reward.to(torch.float64 if return_dtype(reward) == torch.float64 else torch.float32)


def find_boundaries(done: Tensor, mask: Tensor | None, traj: Tensor | None, stride: int) -> Tensor:
    """Boundaries ``[N]``: done, or invalid, or followed by an invalid frame or by one of another trajectory."""
    if mask is not None:
        done = done | ~mask
        done[: len(done) - stride] |= ~mask[stride:]
    if traj is not None:
        done = done.clone()
        done[: len(done) - stride] |= traj[stride:] != traj[: len(traj) - stride]
    return done


def return_dtype(reward: Tensor) -> torch.dtype:
    return reward.dtype if reward.is_floating_point() else torch.get_default_dtype()


def discounts(steps: Tensor, n_steps: int, gamma: float) -> Tensor:
    """``gamma ** steps``, float32, each power rounded once."""
    powers = torch.tensor([gamma**k for k in range(n_steps + 1)], dtype=torch.float32, device=steps.device)
    return powers.index_select(0, steps.view(-1)).view(steps.shape)


def _compact(view: Tensor, dtype: torch.dtype) -> Tensor:
    return view.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _end_rows(steps: Tensor, length: int, offset: int) -> Tensor:
    """Row of ``e(t) + offset`` in a source whose ``length`` frames per batch element are laid end to end."""
    batch, frames = steps.shape[:-1].numel(), steps.shape[-1]
    span = max(batch - 1, 0) * length + frames
    dtype = index_dtype(batch * length + frames)
    starts = torch.arange(offset - 1, offset - 1 + span, dtype=dtype, device=steps.device)
    return torch.add(starts.unfold(0, frames, max(length, 1)), steps.reshape(batch, frames)).view(-1)


def index_dtype(largest: int) -> torch.dtype:
    return torch.int32 if largest < 2**31 else torch.int64


def _take(value: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows of ``value``, counted over its first dimensions, as many as ``shape`` has, as a new ``[*shape, *F]``."""
    time_dim = len(shape) - 1
    return take(value.flatten(0, time_dim), rows).view(*shape, *value.shape[time_dim + 1 :])


def take(value: Tensor, rows: Tensor) -> Tensor:
    """Rows of ``value`` ``[N, *F]``, bit for bit, in new memory."""
    if signed := SIGNED.get(value.dtype):
        return take(value.view(signed), rows).view(value.dtype)
    if value.ndim > 1 and value.numel() == value.shape[0] > 0:
        # torch selects elements in a fraction of the time that it takes for rows of one element.
        return value.flatten().index_select(0, rows).view(-1, *value.shape[1:])
    return value.index_select(0, rows)


def _join(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _pad(value: Tensor, frames: int) -> Tensor:
    """``value`` ``[N, *F]`` followed by frames that no window reads."""
    return torch.cat((value, value.new_zeros((frames, *value.shape[1:])))) if frames else value


def _lay_out(pieces: list[Tensor], place: Place, time_dim: int) -> Tensor:
    """Frames ``[*B, k, ...]`` one after the other from slot 0 on, in new memory and without an autograd graph."""
    pieces = [piece.detach() if piece.requires_grad else piece for piece in pieces]
    if not place.time_first:
        return torch.cat(pieces, time_dim)
    leaf, at = place.empty(pieces[0], time_dim), 0
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
