"""Keep: what comes after frames of a ring that keeps observations once, written as the frames are stored.

See ``multistep_triton.ends``. Frames of a call are counted from 0 on; frame -1 is the newest of those before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multistep_triton.kernels.ends import any_of
from multistep_triton.kernels.rows import as_bytes, either_pointer


@triton.jit
def has_ended(frame, env, mask, before, sizes, flags, TIME_LAST: tl.constexpr, WIDTHS: tl.constexpr):
    """Whether the trajectory of a frame goes on with no frame of the call; frame -1 lies in the slot ``before``."""
    dones, masks, ids = flags
    frames, envs = sizes
    held = frame < 0
    mask &= (before >= 0) | ~held
    if TIME_LAST:
        row, after = env * frames + frame, env * frames + frame + 1
    else:
        row, after = frame * envs + env, (frame + 1) * envs + env
    row = tl.where(held, before * envs + env, row)
    ended = mask & (row < 0)
    for k in tl.static_range(len(dones)):
        origin = either_pointer(held, dones[k][1], dones[k][0]) + row.to(tl.int64) * WIDTHS[k]
        for item in range(WIDTHS[k]):
            ended |= tl.load(origin + item, mask=mask, other=0) != 0
    for k in tl.static_range(len(masks)):
        valid = tl.load(either_pointer(held, masks[k][1], masks[k][0]) + row, mask=mask, other=1) != 0
        ended |= ~(valid & (tl.load(masks[k][0] + after, mask=mask, other=1) != 0))
    for k in tl.static_range(len(ids)):
        traj = tl.load(either_pointer(held, ids[k][1], ids[k][0]) + row, mask=mask, other=0)
        ended |= traj != tl.load(ids[k][0] + after, mask=mask, other=0)
    return ended & mask


@triton.jit
def count_ended(frame, env, mask, before, sizes, flags, TIME_LAST: tl.constexpr, WIDTHS: tl.constexpr):
    """How many ends there are from frame -1 on before a frame, and before the newest."""
    passed = has_ended(frame * 0 - 1, env, mask, before, sizes, flags, TIME_LAST, WIDTHS).to(tl.int32)
    total = passed
    for other in range(sizes[0] - 1):
        ended = has_ended(frame * 0 + other, env, mask, before, sizes, flags, TIME_LAST, WIDTHS).to(tl.int32)
        passed += tl.where(other < frame, ended, 0)
        total += ended
    return passed, total


@triton.jit
def count_before(count_ptr, env, mask, before, sizes):
    """How many ends were passed on before frame -1 came."""
    return tl.load(count_ptr + before * sizes[1] + env, mask=mask & (before >= 0), other=0)


@triton.jit
def keep_tile(
    tile, rows, data_ptr, kept_ptr, count_ptr, before, slots, sizes, flags,
    ITEM: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, TIME_LAST: tl.constexpr, WIDTHS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Keeps a tile of the units of what comes after ``rows`` rows, each WIDTH units of PARTS items.

    What comes after the newest frame goes to the last row; what lay there goes to that of its number if it comes after
    an end, as what comes after any other end of the call.
    """
    frames, envs = sizes
    begin = tile * TILE
    offset = tl.arange(0, TILE)
    inside = (offset < tl.minimum(rows * WIDTH - begin, TILE).to(tl.int32))[:, None]
    at = (begin + offset.to(tl.uint32))[:, None]
    row = at // WIDTH
    unit = at - row * WIDTH
    frame, env = (row // envs.to(tl.uint32)).to(tl.int32), (row % envs.to(tl.uint32)).to(tl.int32)
    source = env * frames + frame if TIME_LAST else row.to(tl.int32)
    column = unit.to(tl.int64) * PARTS + tl.arange(0, PARTS)[None, :]
    origin = as_bytes(data_ptr).to(tl.pointer_type(ITEM), bitcast=True)
    kept = as_bytes(kept_ptr).to(tl.pointer_type(ITEM), bitcast=True)
    value = tl.load(origin + source.to(tl.int64) * (WIDTH * PARTS) + column, mask=inside, other=0)
    is_newest = frame == frames - 1
    newest = kept + (slots * envs + env).to(tl.int64) * (WIDTH * PARTS) + column
    held_ended = has_ended(frame * 0 - 1, env, inside & is_newest, before, sizes, flags, TIME_LAST, WIDTHS)
    ended = has_ended(frame, env, inside & ~is_newest, before, sizes, flags, TIME_LAST, WIDTHS)
    if any_of(held_ended | ended):
        number = count_before(count_ptr, env, inside, before, sizes)
        passed, total = count_ended(frame, env, inside, before, sizes, flags, TIME_LAST, WIDTHS)
        # Of more ends than there are rows, the newest stay.
        held_ended &= total <= slots
        held = tl.load(newest, mask=held_ended, other=0)
        to = (number % slots * envs + env).to(tl.int64) * (WIDTH * PARTS) + column
        tl.store(kept + to, held, mask=held_ended)
        to = ((number + passed) % slots * envs + env).to(tl.int64) * (WIDTH * PARTS) + column
        tl.store(kept + to, value, mask=ended & (total - passed <= slots))
    tl.store(newest, value, mask=inside & is_newest)
