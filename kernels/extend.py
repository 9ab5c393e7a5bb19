"""The whole extend in one launch, or in two where the windows are long.

A program takes one job on one tile of frames: the windows (steps, discount, nonterminal), the n-step return of one
reward key, or the rows of one leaf. A job that needs the windows of its frames computes them again, from flags that
lie in the cache; beyond ``UNROLLED_STEPS`` that costs more than a launch, and the rows come in a second one, which
reads the steps that the first one wrote. ``n_step_return`` and ``gather_future`` are the same kernel with fewer jobs;
where frames are sampled, it is the same on those that were picked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multistep_triton.kernels.gather import copy_rows
from multistep_triton.kernels.stream import TYPES, output_places, tile_frames, written
from multistep_triton.kernels.window import bfloat16_bits, power, window, window_steps


@triton.jit
def _write_windows(
    program, outputs, stream, flags, rows, emitted, n, gamma,
    UNROLLED: tl.constexpr, ENDS: tl.constexpr,
    TIME_MAJOR: tl.constexpr, LENGTH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tile = tile_frames(program, rows, emitted, stream, TIME_MAJOR, LENGTH, BLOCK_F)
    row, frame, live, places, limits = tile
    place = output_places(tile, emitted)
    # One frame ahead, even if n is 1, tells where a trajectory goes on.
    if len(limits) > 0:
        tile = row, frame, live, places, (tl.maximum(limits[0], 2),)
    steps = window_steps(tile, stream, flags, n, 2 if UNROLLED == 1 else UNROLLED, ENDS)
    nonterminal = live & (steps > 1)
    steps = tl.where(live, tl.minimum(steps, limits[0] if len(limits) > 0 else n), 0)
    live = written(tile)
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
    tile = tile_frames(program // chunks, rows, emitted, stream, TIME_MAJOR, LENGTH, BLOCK_F)
    item = program % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    source, returns_ptr = reward
    _, returns = window(
        tile, stream, flags, source, item, n, gamma, UNROLLED, ENDS, TYPE, SUM, ITEM_BYTES, D, RUN
    )  # fmt: skip
    returns = tl.where(tile[2][:, None], returns, float("nan"))
    place = output_places(tile, emitted)[:, None] * D + item[None, :]
    mask = written(tile)[:, None] & (item < D)[None, :]
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
def n_step_extend_kernel(
    starts, sizes, rows, carried, known, emitted, n, stay, ring, to, picked, gamma: tl.float64,
    flags, steps, windows, rewards, leaves,
    WINDOWS: tl.constexpr, RETURNS: tl.constexpr, COPIES: tl.constexpr,
    UNROLLED: tl.constexpr, ENDS: tl.constexpr, READ: tl.constexpr,
):  # fmt: skip
    """Every program finds its job by the first program of each, ``starts``; alike leaves share one, and its code."""
    program = tl.program_id(0)
    gamma = tl.full((1, 1), gamma, tl.float64)
    stream = (carried, known, sizes, ring, picked)
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


INTERPRETED = not isinstance(n_step_extend_kernel, triton.JITFunction)
