"""The reference: n-step windows in eager PyTorch, on any device.

It defines what is correct, verifies the kernels, and is the fast path on CPU. Owns the maths and nothing
else: arguments arrive validated (by ``functional``), keys are opaque. May import torch only.

Terms: a *boundary* is a frame after which nothing of its trajectory follows; the *window* of frame ``t`` is
``t .. e(t)``, ``e(t)`` the smallest of ``t + n - 1``, the first boundary at or after ``t``, and the last frame.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping

import torch
from torch import Tensor

Leaves = dict[Hashable, Tensor]

# Up to this many bytes, joining carry and data costs less than the calls it takes to read them where they lie.
_JOIN_BYTES = 1 << 16

# torch selects no single elements of these; their bits are those of the signed ones.
_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def gather_future_reference(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future`; ``steps`` is int64 ``[*B, T]``."""
    return _take(value, _end_rows(steps - 1, value.shape[steps.ndim - 1], 0), steps.shape)


def n_step_extend_reference(
    carry: Mapping[Hashable, Tensor] | None,
    data: Mapping[Hashable, Tensor],
    *,
    time_dim: int,
    reward_keys: Collection[Hashable],
    gathered_keys: Collection[Hashable],
    done_key: Hashable,
    mask_key: Hashable | None,
    traj_key: Hashable | None,
    n_steps: int,
    gamma: float,
    hold: bool,
) -> tuple[Leaves, Leaves, Tensor, Tensor, Tensor, Leaves]:
    """Computes :func:`multistep_triton.functional.n_step_extend`."""
    if carry is None:
        carry = {key: leaf.narrow(time_dim, 0, 0) for key, leaf in data.items()}
    lead = data[done_key].shape[:time_dim]
    carried, new = carry[done_key].shape[time_dim], data[done_key].shape[time_dim]
    known = carried + new
    n_steps = max(min(n_steps, known), 1)
    emitted = max(known - n_steps, 0) if hold else known

    def join(key: Hashable) -> Tensor:
        return torch.cat((carry[key], data[key]), time_dim)

    def joined_flag(key: Hashable | None) -> Tensor | None:
        return None if key is None else join(key).view(*lead, known)

    def cut(key: Hashable) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        if emitted < carried:
            older, newer = carry[key].split_with_sizes((emitted, carried - emitted), time_dim)
            return (older,), (newer, data[key])
        older, newer = data[key].split_with_sizes((emitted - carried, known - emitted), time_dim)
        return (carry[key], older), (newer,)

    # Windows read rewards and flags as one stream; these are joined, wider leaves only where all is small.
    done = join(done_key).view(*lead, known)
    inside = ~_boundaries(done, joined_flag(mask_key), joined_flag(traj_key))
    beyond = 0 if hold else n_steps - 1
    if not hold:
        inside[..., max(known - 1, 0) :] = False
    nonterminal = inside[..., :emitted].contiguous()
    goes_on = _slide(_pad(inside, beyond, time_dim), emitted, n_steps - 1)
    ahead = _frames_ahead(goes_on, nonterminal)
    returns = {
        key: _window_returns(_pad(join(key), beyond, time_dim), goes_on, emitted, time_dim, gamma)
        for key in reward_keys
    }

    # A window that starts in the carry ends in the carry or in the first n - 1 new frames; every other one lies in
    # the new data, and is read there.
    small = sum(leaf.nbytes for leaf in data.values()) <= _JOIN_BYTES
    seam = emitted if small else min(carried, emitted)
    near = min(carried + n_steps - 1, known)
    if seam == emitted:
        stream_rows = _end_rows(ahead, known, 0)
    else:
        # Windows that end in the carry have no row here; they get any, and are overwritten below.
        data_rows = _end_rows(ahead, new, -carried).clamp_(min=0)
        seam_rows = _end_rows(ahead.narrow(time_dim, 0, seam), near, 0)

    def gather(key: Hashable) -> Tensor:
        if seam == emitted:
            return _take(join(key), stream_rows, (*lead, emitted))
        future = _take(data[key], data_rows, (*lead, emitted))
        if seam:
            joined = torch.cat((carry[key], data[key].narrow(time_dim, 0, near - carried)), time_dim)
            future.narrow(time_dim, 0, seam).copy_(_take(joined, seam_rows, (*lead, seam)))
        return future

    leaves, held = dict(data), {}
    for key in data if hold or carried else gathered_keys:
        older, newer = cut(key)
        leaves[key] = gather(key) if key in gathered_keys else torch.cat(older, time_dim)
        held[key] = torch.cat(newer, time_dim)
    return leaves, returns, (ahead + 1).to(torch.int64), _discounts(ahead, n_steps, gamma), nonterminal, held


def _boundaries(done: Tensor, mask: Tensor | None, traj: Tensor | None) -> Tensor:
    """Boundaries ``[*B, S]``: done, or invalid, or followed by an invalid frame or by one of another trajectory."""
    if mask is not None:
        done = done | ~mask
        done[..., :-1] |= ~mask[..., 1:]
    if traj is not None:
        changes = traj[..., 1:] != traj[..., :-1]
        done = torch.cat((done[..., :-1] | changes, done[..., -1:]), -1)
    return done


def _slide(flags: Tensor, frames: int, count: int) -> list[Tensor]:
    """Views of ``flags`` ``[*B, S]`` at frame ``t + i`` of every frame ``t``, for ``i < count``; each ``[*B, E]``."""
    return [flags[..., i : i + frames] for i in range(count)]


def _frames_ahead(goes_on: list[Tensor], like: Tensor) -> Tensor:
    """``e(t) - t``, int32 ``[*B, E]``, the shape of ``like``.

    Back from the window's end: ahead of ``t + i`` there is no frame if it is a boundary, else one more than ahead of
    ``t + i + 1``; ahead of ``t + n - 1`` there is none.
    """
    if not goes_on:
        return torch.zeros_like(like, dtype=torch.int32, memory_format=torch.contiguous_format)
    ahead = goes_on[-1].to(torch.int32, memory_format=torch.contiguous_format)
    for here in reversed(goes_on[:-1]):
        ahead.add_(1).mul_(here)
    return ahead


def _window_returns(reward: Tensor, goes_on: list[Tensor], frames: int, time_dim: int, gamma: float) -> Tensor:
    """The n-step returns ``[*B, E, *F]`` of the first frames of ``reward`` ``[*B, S, *F]``.

    Back from the window's end, from ``R = r(t + n - 1)``: ``R = r(t + i) + gamma * R``, or ``r(t + i)`` alone if
    ``t + i`` is a boundary. The boundary selects, it never multiplies, so that a NaN or Inf after it does not reach
    the frames before it.
    """
    dtype = reward.dtype if reward.is_floating_point() else torch.get_default_dtype()
    stream = reward.to(torch.float64 if dtype == torch.float64 else torch.float32)
    returns = stream.narrow(time_dim, len(goes_on), frames)
    for i in reversed(range(len(goes_on))):
        here, on = stream.narrow(time_dim, i, frames), goes_on[i]
        for _ in range(here.ndim - on.ndim):
            on = on.unsqueeze(-1)
        returns = torch.where(on, torch.add(here, returns, alpha=gamma), here)
    return returns.to(dtype).contiguous()


def _discounts(ahead: Tensor, n_steps: int, gamma: float) -> Tensor:
    """``gamma ** steps``, float32, each power rounded once; ``steps`` is ``ahead + 1``."""
    powers = torch.tensor([gamma ** (k + 1) for k in range(n_steps)], dtype=torch.float32, device=ahead.device)
    return powers.index_select(0, ahead.view(-1)).view(ahead.shape)


def _end_rows(ahead: Tensor, length: int, offset: int) -> Tensor:
    """Row of ``e(t) + offset`` in a source whose ``length`` frames per batch element are laid end to end."""
    batch, frames = ahead.shape[:-1].numel(), ahead.shape[-1]
    span = max(batch - 1, 0) * length + frames
    dtype = torch.int32 if batch * length + frames < 2**31 else torch.int64
    starts = torch.arange(offset, offset + span, dtype=dtype, device=ahead.device).unfold(0, frames, max(length, 1))
    return (starts + ahead.reshape(batch, frames)).view(-1)


def _take(value: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows of ``value`` ``[*B, T, *F]``, counted over ``[*B, T]``, as a new tensor of ``[*shape, *F]``."""
    if signed := _SIGNED.get(value.dtype):
        return _take(value.view(signed), rows, shape).view(value.dtype)
    time_dim = len(shape) - 1
    return value.flatten(0, time_dim).index_select(0, rows).view(*shape, *value.shape[time_dim + 1 :])


def _pad(value: Tensor, frames: int, dim: int) -> Tensor:
    """``value`` followed by frames that no window reads."""
    if not frames:
        return value
    shape = (*value.shape[:dim], frames, *value.shape[dim + 1 :])
    return torch.cat((value, value.new_zeros(shape)), dim)
