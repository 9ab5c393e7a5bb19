"""The whole extend in one launch, or in two where the windows are long.

A program takes one job on one tile of frames: the windows (steps, discount, nonterminal), the n-step return of one
reward key, or the rows of one leaf. A job that needs the windows of its frames computes them again, from flags that
lie in the cache; beyond ``UNROLLED_STEPS`` that costs more than a launch, and the rows come in a second one, which
reads the steps that the first one wrote. ``n_step_return`` and ``gather_future`` are the same kernel with fewer jobs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Hashable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from multistep_triton.kernels.gather import copy_rows
from multistep_triton.kernels.plan import WIDEST, Plan, plan_extend, plan_gather
from multistep_triton.kernels.stream import TYPES, coded, tile_frames
from multistep_triton.kernels.window import bfloat16_bits, power, window, window_steps
from multistep_triton.ring import Ring, find_place


@triton.jit
def _write_windows(
    program, outputs, stream, flags, rows, emitted, n, gamma,
    UNROLLED: tl.constexpr, ENDS: tl.constexpr,
    TIME_MAJOR: tl.constexpr, LENGTH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tile_frames(program, rows, emitted, TIME_MAJOR, LENGTH, BLOCK_F)
    row, frame, live = tile
    # One frame ahead, even if n is 1, tells where a trajectory goes on.
    steps = window_steps(tile, stream, flags, n, 2 if UNROLLED == 1 else UNROLLED, ENDS)
    nonterminal = steps > 1
    steps = tl.minimum(steps, n)
    place = row.to(tl.int64) * emitted + frame
    steps_ptr, discount_ptr, nonterminal_ptr = outputs
    tl.store((steps_ptr << 2 >> 4).to(tl.pointer_type(tl.int64)) + place, steps.to(tl.int64), mask=live)
    discount = power(gamma.reshape(1), steps, 5 if UNROLLED > 0 else 31).to(tl.float32)
    tl.store((discount_ptr << 2 >> 4).to(tl.pointer_type(tl.float32)) + place, discount, mask=live)
    tl.store((nonterminal_ptr << 2 >> 4).to(tl.pointer_type(tl.int8)) + place, nonterminal.to(tl.int8), mask=live)


@triton.jit
def _write_returns(
    program, reward, stream, flags, rows, emitted, n, gamma,
    UNROLLED: tl.constexpr, ENDS: tl.constexpr,
    TIME_MAJOR: tl.constexpr, LENGTH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr, RETURN: tl.constexpr,
    ITEM_BYTES: tl.constexpr, D: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tile = tile_frames(program // chunks, rows, emitted, TIME_MAJOR, LENGTH, BLOCK_F)
    row, frame, live = tile
    item = program % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    source, returns_ptr = reward
    _, returns = window(
        tile, stream, flags, source, item, n, gamma, UNROLLED, ENDS, TYPE, SUM, ITEM_BYTES, D, RUN
    )  # fmt: skip
    place = (row.to(tl.int64) * emitted + frame)[:, None] * D + item[None, :]
    mask = live[:, None] & (item < D)[None, :]
    if TYPES[RETURN] == tl.bfloat16:
        tl.store((returns_ptr << 2 >> 4).to(tl.pointer_type(tl.int16)) + place, bfloat16_bits(returns), mask=mask)
    else:
        pointer = (returns_ptr << 2 >> 4).to(tl.pointer_type(TYPES[RETURN])) + place
        tl.store(pointer, returns.to(TYPES[RETURN]), mask=mask)


@triton.jit
def pick(values, which):
    """One of a tuple of scalars."""
    value = values[0]
    for k in tl.static_range(1, len(values)):
        value = tl.where(which == k, values[k], value)
    return value


@triton.jit(do_not_specialize=["rows", "carried", "known", "emitted", "n", "stay"])
def _n_step_extend_kernel(
    starts, sizes, rows, carried, known, emitted, n, stay, ring, to, gamma: tl.float64,
    flags, steps, windows, rewards, leaves,
    WINDOWS: tl.constexpr, RETURNS: tl.constexpr, COPIES: tl.constexpr,
    UNROLLED: tl.constexpr, ENDS: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Every program finds its job by the first program of each, ``starts``; alike leaves share one, and its code."""
    program = tl.program_id(0)
    gamma = tl.full((1, 1), gamma, tl.float64)
    stream = (carried, known, sizes, ring)
    for j in tl.static_range(len(WINDOWS)):
        if program < (starts[j + 1] << 2 >> 4):
            _write_windows(program, windows, stream, flags, rows, emitted, n, gamma, UNROLLED, ENDS, *WINDOWS[j])
    for j in tl.static_range(len(RETURNS)):
        first = starts[len(WINDOWS) + j] << 2 >> 4
        if (program >= first) & (program < (starts[len(WINDOWS) + j + 1] << 2 >> 4)):
            _write_returns(
                (program - first).to(tl.int32), rewards[j], stream, flags, rows, emitted, n, gamma, UNROLLED, ENDS,
                *RETURNS[j],
            )  # fmt: skip
    for j in tl.static_range(len(COPIES)):
        first = starts[len(WINDOWS) + len(RETURNS) + j] << 2 >> 4
        if (program >= first) & (program < (starts[len(WINDOWS) + len(RETURNS) + j + 1] << 2 >> 4)):
            place, data, carry, out, held = leaves[j]
            strides, outer = place
            local = (program - first).to(tl.int32)
            each = ((starts[len(WINDOWS) + len(RETURNS) + j + 1] << 2 >> 4) - first).to(tl.int32) // len(data)
            which = local // each
            source = (pick(data, which), pick(carry, which), strides, outer)
            leaf = (source, pick(out, which), pick(held, which))
            copy_rows(
                local % each, leaf, stream, flags, steps, rows, emitted, n, stay, to, UNROLLED, ENDS, READ, *COPIES[j]
            )  # fmt: skip


NUM_WARPS = 4
INTERPRETED = not isinstance(_n_step_extend_kernel, triton.JITFunction)


def launch_n_step_extend(
    carry: Ring | None,
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
) -> tuple[dict[Hashable, Tensor], dict[Hashable, Tensor], Tensor, Tensor, Tensor, Ring | None]:
    """Computes :func:`multistep_triton.functional.n_step_extend`."""
    device, carried = data[done_key].device, carry.count if carry else 0
    place = find_place(carry, data.values(), data[done_key].shape[time_dim], n_steps) if hold else None
    described, addresses, copied = [], {}, []  # copies are kept until the launch
    for key, leaf in data.items():
        if leaf.is_neg() or leaf.is_conj():
            leaf = _as_it_lies(leaf)
            copied.append(leaf)
        new, old = leaf.data_ptr(), 0
        if carry:
            old = carry.leaves[key].data_ptr()
        described.append((key, leaf.shape, leaf.stride(), leaf.dtype, (new | old) % WIDEST))
        addresses[key] = coded(new), coded(old)
    plan = plan_extend(
        tuple(described),
        time_dim,
        tuple(reward_keys),
        frozenset(gathered_keys),
        done_key,
        mask_key,
        traj_key,
        carried,
        n_steps,
        place and place[1:],
        torch.get_default_dtype(),
    )

    empty = torch.empty_strided
    outputs = [empty(shape, strides, dtype=dtype, device=device) for shape, strides, dtype in plan.windows]
    windows = tuple([coded(output.data_ptr()) for output in outputs])
    returns, rewards = {}, []
    for key, (shape, strides, dtype) in plan.returns.items():
        returns[key] = out = empty(shape, strides, dtype=dtype, device=device)
        rewards.append(((*addresses[key], *plan.places[key]), coded(out.data_ptr())))
    leaves, held, copies = dict(data), {}, []
    for lies, group in plan.copies:
        news, olds, outs, kepts = [], [], [], []
        for key, shape, strides, held_shape, held_strides, dtype in group:
            leaves[key] = out = empty(shape, strides, dtype=dtype, device=device)
            if carry and place and place.stay:
                held[key] = kept = carry.leaves[key]
            else:
                held[key] = kept = empty(held_shape, held_strides, dtype=dtype, device=device)
            new, old = addresses[key]
            news.append(new)
            olds.append(old)
            outs.append(coded(out.data_ptr()))
            kepts.append(coded(kept.data_ptr()))
        copies.append((lies, tuple(news), tuple(olds), tuple(outs), tuple(kepts)))
    flags = tuple([(*addresses[key], *plan.places[key]) for key in (done_key, mask_key, traj_key) if key is not None])
    steps = (windows[0], windows[0], *plan.steps)
    _, rows, carried, known, emitted, *_ = plan.scalars
    ring = place.ring(held, emitted, known) if place else None
    rings = _slots(carry, rows), _slots(ring, rows)
    _run(plan, device, *rings, gamma, flags, steps, windows, tuple(rewards), tuple(copies))
    return leaves, returns, outputs[0], outputs[1], outputs[2], ring


def launch_gather_future(value: Tensor, steps: Tensor) -> Tensor:
    """Computes :func:`multistep_triton.gather_future`; a window that leaves its row is cut at the row's end."""
    value, steps = _as_it_lies(value), _as_it_lies(steps)
    new, lengths = value.data_ptr(), steps.data_ptr()
    plan = plan_gather(
        (value.shape, value.stride(), value.dtype, new % WIDEST), (steps.shape, steps.stride(), steps.dtype)
    )
    gathered = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    out = (coded(gathered.data_ptr()),)
    copy = plan.places["value"], (coded(new),), (coded(0),), out, out
    windows = coded(lengths), coded(0), *plan.steps
    _run(plan, value.device, (), (), 0.0, (), windows, (), (), (copy,))
    return gathered


def _as_it_lies(tensor: Tensor) -> Tensor:
    """A tensor whose bytes are its values; a view can be a conjugate or a negative that is still to be taken."""
    return tensor.resolve_neg().resolve_conj()


def _slots(ring: Ring | None, rows: int) -> tuple[int, ...]:
    """Where slots lie one after the other in memory: how many there are, the first one, and their rows; coded."""
    return (coded(ring.capacity), coded(ring.first), coded(rows)) if ring and ring.time_first else ()


def _run(plan: Plan, device: torch.device, *sources: Any) -> None:
    with _current(device):
        for launch in plan.launches:
            if not launch.programs:
                continue
            arguments = launch.starts, *plan.scalars, *sources, *launch.constants
            compiled = launch.compiled.get(device)
            if compiled is None:
                # Fused multiply-adds may be used in the recursion; the reference's are the compiler's choice, too.
                kernel = _n_step_extend_kernel[(launch.programs,)]
                launch.compiled[device] = kernel(*arguments, num_warps=NUM_WARPS, enable_fp_fusion=True)
            else:
                # A plan compiles to one kernel: no need to look for it again among all that were compiled.
                compiled[(launch.programs, 1, 1)](*arguments)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes the device the current one, on which Triton launches."""
    if device.type == "cpu" or device.index == torch.accelerator.current_device_index():
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
