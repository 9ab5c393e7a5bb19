"""The reference: n-step windows in eager PyTorch, on any device.

It defines what is correct, verifies the kernels, and is the fast path on CPU. Owns the maths and nothing
else: arguments arrive validated (by ``functional``), keys are opaque. May import torch only.

Terms: a *boundary* is a frame after which nothing of its trajectory follows; the *window* of frame ``t`` is
``t .. e(t)``, ``e(t)`` the smallest of ``t + n - 1``, the first boundary at or after ``t``, and the last frame.

The rows of a batch are laid end to end and treated as one long row. That is sound because a window never
leaves its own row: either the row's last frame is marked as a boundary, or the frames near it are not read.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping

import torch
from torch import Tensor

Leaves = dict[Hashable, Tensor]


def n_step_return_reference(
    reward: Tensor, done: Tensor, *, gamma: float, n_steps: int, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes :func:`multistep_triton.n_step_return`; ``done`` and ``mask`` are bool ``[*B, T]``."""
    n_steps = max(min(n_steps, done.shape[-1]), 1)
    boundary = _boundaries(done, mask).clone(memory_format=torch.contiguous_format)
    boundary[..., -1:] = True
    steps = _window_steps(boundary, n_steps).to(torch.int64)
    returns = _window_returns(reward, boundary, gamma, n_steps)
    return returns, steps, _discounts(steps, gamma, n_steps)


def gather_future_reference(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future`; ``steps`` is int64 ``[*B, T]``."""
    return _take(value, _end_rows(steps, value.shape[steps.ndim - 1], 0), steps.shape)


def n_step_extend_reference(
    carry: Mapping[Hashable, Tensor] | None,
    data: Mapping[Hashable, Tensor],
    *,
    time_dim: int,
    reward_keys: Collection[Hashable],
    gathered_keys: Collection[Hashable],
    done_key: Hashable,
    mask_key: Hashable | None,
    n_steps: int,
    gamma: float,
) -> tuple[Leaves, Leaves, Tensor, Tensor, Tensor, Leaves]:
    """Computes :func:`multistep_triton.functional.n_step_extend`."""
    if carry is None:
        carry = {key: leaf.narrow(time_dim, 0, 0) for key, leaf in data.items()}
    lead = data[done_key].shape[:time_dim]
    carried, new = carry[done_key].shape[time_dim], data[done_key].shape[time_dim]
    n_steps = min(n_steps, carried + new)
    emitted = carried + new - n_steps

    def stream(key: Hashable, start: int, stop: int) -> Tensor:
        return _span(carry[key], data[key], start, stop, time_dim)

    def flags(key: Hashable) -> Tensor:
        return stream(key, 0, carried + new).view(*lead, carried + new)

    boundary = _boundaries(flags(done_key), None if mask_key is None else flags(mask_key))
    steps = _emit(_window_steps(boundary, n_steps), emitted, time_dim).to(torch.int64)
    returns = {}
    for key in reward_keys:
        reward = stream(key, 0, carried + new)
        returns[key] = _emit(_window_returns(reward, boundary, gamma, n_steps), emitted, time_dim)

    # A window of an emitted frame that starts in the carry ends in the carry or in the first n - 1 new frames;
    # every other one lies in the new data, and is read there.
    seam = min(carried, emitted)
    near = min(carried + n_steps - 1, carried + new)
    seam_rows = _end_rows(steps.narrow(time_dim, 0, seam), near, 0)
    data_rows = _end_rows(steps, new, -carried).clamp_(min=0)

    def gather(key: Hashable) -> Tensor:
        if emitted == seam:
            return _take(stream(key, 0, near), seam_rows, (*lead, seam))
        future = _take(data[key], data_rows, (*lead, emitted))
        if seam:
            future.narrow(time_dim, 0, seam).copy_(_take(stream(key, 0, near), seam_rows, (*lead, seam)))
        return future

    leaves = {key: gather(key) if key in gathered_keys else stream(key, 0, emitted) for key in data}
    discount = _discounts(steps, gamma, n_steps)
    nonterminal = ~_emit(boundary, emitted, time_dim)
    new_carry = {key: stream(key, emitted, carried + new) for key in data}
    return leaves, returns, steps, discount, nonterminal, new_carry


def _boundaries(done: Tensor, mask: Tensor | None) -> Tensor:
    """Boundaries ``[*B, S]``: done, or invalid, or followed by an invalid frame."""
    if mask is None:
        return done
    boundary = done | ~mask
    boundary[..., :-1] |= ~mask[..., 1:]
    return boundary


def _window_steps(boundary: Tensor, n_steps: int) -> Tensor:
    """``steps(t) = 1 if t is a boundary or n is 1, else 1 + steps(t + 1)`` with ``n - 1``; ``[*B, S]``."""
    dtype = torch.uint8 if n_steps < 256 else torch.int64
    goes_on = (~boundary).view(-1).to(dtype)[:-1]
    one = torch.ones_like(goes_on)
    steps = torch.ones(boundary.numel(), dtype=dtype, device=boundary.device)
    here, after = steps[:-1], steps[1:]
    for _ in range(n_steps - 1):
        here.copy_(torch.addcmul(one, goes_on, after))
    return steps.view(boundary.shape)


def _window_returns(reward: Tensor, boundary: Tensor, gamma: float, n_steps: int) -> Tensor:
    """``R(t) = r(t) if t is a boundary or n is 1, else r(t) + gamma * R(t + 1)`` with ``n - 1``.

    ``reward``: ``[*B, S, *F]``, ``boundary``: ``[*B, S]``. The boundary selects, it never multiplies, so that
    a NaN or Inf after it does not reach the frames before it.
    """
    dtype = reward.dtype if reward.is_floating_point() else torch.get_default_dtype()
    rows = reward.to(torch.promote_types(dtype, torch.float32)).flatten(0, boundary.ndim - 1)
    returns = rows.clone()
    now, here, after = rows[:-1], returns[:-1], returns[1:]
    ends = boundary.view(-1, *[1] * (rows.ndim - 1))[:-1]
    for _ in range(n_steps - 1):
        here.copy_(torch.where(ends, now, torch.add(now, after, alpha=gamma)))
    return returns.view(reward.shape).to(dtype)


def _discounts(steps: Tensor, gamma: float, n_steps: int) -> Tensor:
    """``gamma ** steps``, float32, each power rounded once."""
    powers = torch.tensor([gamma**k for k in range(n_steps + 1)], dtype=torch.float32, device=steps.device)
    return powers.index_select(0, steps.view(-1)).view(steps.shape)


def _end_rows(steps: Tensor, length: int, offset: int) -> Tensor:
    """Row of ``e(t) + offset`` in a source whose ``length`` frames per batch element are laid end to end."""
    batch, frames = steps.shape[:-1].numel(), steps.shape[-1]
    span = max(batch - 1, 0) * length + frames
    starts = torch.arange(offset - 1, offset - 1 + span, device=steps.device).unfold(0, frames, max(length, 1))
    return (starts + steps.reshape(batch, frames)).view(-1)


def _take(value: Tensor, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows of ``value`` ``[*B, T, *F]``, counted over ``[*B, T]``, as a new tensor of ``[*shape, *F]``."""
    time_dim = len(shape) - 1
    return value.flatten(0, time_dim).index_select(0, rows).view(*shape, *value.shape[time_dim + 1 :])


def _span(carry: Tensor, data: Tensor, start: int, stop: int, dim: int) -> Tensor:
    """Frames ``start .. stop - 1`` of the stream "carry, then data", as new contiguous memory."""
    carried = carry.shape[dim]
    parts = []
    if start < carried:
        parts.append(carry.narrow(dim, start, min(stop, carried) - start))
    if stop > carried or not parts:
        first = max(start - carried, 0)
        parts.append(data.narrow(dim, first, max(stop - carried, first) - first))
    return torch.cat(parts, dim)


def _emit(value: Tensor, frames: int, dim: int) -> Tensor:
    """The first ``frames`` frames, contiguous, so that no output keeps the frames held back alive."""
    return value.narrow(dim, 0, frames).contiguous()
