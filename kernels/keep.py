"""Keep: stores the observations after ends and after the newest frames, of a ring that keeps observations once.

See ``multistep_triton.ends``. A call's frames count from 0; frame -1 lies in the slot ``before``, whose old flags, in
an empty ring, at most keep a row that no frame reads. ``sizes`` is ``(frames, envs)``, ``flags`` is
``(dones, masks, ids)``, each leaf a pair of data and ring. Data lies ``[envs, frames]`` if TIME_LAST, else transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multistep_triton.kernels.rows import as_bytes, converted, either_pointer, find_units

# Lanes of a program that counts ends, and the most lanes that it has for one environment.
TILE, MOST_FRAMES = 512, 128


@triton.jit
def find_before(written_ptr, slot, slots):
    """Returns the slot of frame 0, the write count modulo ``slots`` if there is one, and the slot of frame -1."""
    if written_ptr is not None:
        slot = (tl.load(written_ptr) % slots).to(tl.int32)
    return slot, tl.where(slot == 0, slots, slot) - 1


@triton.jit
def place_of(frame, env, envs, slot, slots):
    """Returns the row of a frame in the ring, int64; frame 0 lies in ``slot``."""
    at = frame + slot
    return tl.where(at < slots, at, at - slots).to(tl.int64) * envs + env


@triton.jit
def has_ended(frame, env, mask, before, sizes, flags, TIME_LAST: tl.constexpr, WIDTHS: tl.constexpr):
    """Returns whether the trajectory of ``frame``, which is -1 or any of the call's but its newest, ends with it."""
    dones, masks, ids = flags
    frames, envs = sizes
    held = frame < 0
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
def count_before(count_ptr, env, mask, before, envs):
    """Loads how many ends came before frame -1, which is its number if it is an end itself."""
    return tl.load(count_ptr + before.to(tl.int64) * envs + env, mask=mask, other=0)


@triton.jit(do_not_specialize=["frames", "envs", "slot", "slots"])
def count_ends_kernel(
    flags, written_ptr, count_ptr, frames, envs, slot, slots, WIDTHS: tl.constexpr, TIME_LAST: tl.constexpr,
    FRAMES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Stores how many ends came before each frame of TILE // FRAMES environments, FRAMES frames of each at a time."""
    slot, before = find_before(written_ptr, slot, slots)
    env = tl.program_id(0) * (TILE // FRAMES) + tl.arange(0, TILE // FRAMES)[:, None]
    there = env < envs
    count = count_before(count_ptr, env, there, before, envs)
    for first in range(0, frames, FRAMES):
        frame = first + tl.arange(0, FRAMES)[None, :]
        mask = there & (frame < frames)
        ended = has_ended(frame - 1, env, mask, before, (frames, envs), flags, TIME_LAST, WIDTHS).to(tl.int32)
        tl.store(count_ptr + place_of(frame, env, envs, slot, slots), count + tl.cumsum(ended, 1), mask=mask)
        count += tl.sum(ended, 1)[:, None]


@triton.jit
def keep_tile(
    tile, rows, data_ptr, kept_ptr, count_ptr, slot, before, slots, end_slots, sizes, flags,
    ITEM: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, TIME_LAST: tl.constexpr,
    WIDTHS: tl.constexpr, COUNTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Keeps a tile of TILE units of ``data``, the observations after ``rows`` frames; for units see ``rows.copy_tile``.

    ``kept`` has rows ``[end_slots + 1, envs]``. What follows the newest frame goes to the last; what lay there goes to
    row ``number % end_slots`` if frame -1 is an end, as does what follows other ends, which a launch before COUNTED.
    """
    frames, envs = sizes
    _, top, unit, row, inside = find_units(tile, rows, WIDTH, TILE)
    row += top
    frame, env = (row // envs.to(tl.uint32)).to(tl.int32), (row % envs.to(tl.uint32)).to(tl.int32)
    is_newest = inside & (frame == frames - 1)
    ended = inside & (frame < 0)
    if COUNTED:
        is_other = inside & (frame < frames - 1)
        own = tl.load(count_ptr + place_of(frame, env, envs, slot, slots), mask=is_other, other=0)
        ended = own != tl.load(count_ptr + place_of(frame + 1, env, envs, slot, slots), mask=is_other, other=0)
    if tl.max((ended | is_newest).to(tl.int32), 0) > 0:
        number = count_before(count_ptr, env, is_newest, before, envs)
        if COUNTED:
            total = tl.load(count_ptr + place_of(frame * 0 + frames - 1, env, envs, slot, slots), mask=inside, other=0)
            first = tl.load(count_ptr + place_of(frame * 0, env, envs, slot, slots), mask=is_newest, other=0)
            # If there are more ends than rows, only the newest ends are kept.
            ended &= total - own <= end_slots
            held_ended = is_newest & (number != first) & (total - number <= end_slots)
        else:
            held_ended = has_ended(frame * 0 - 1, env, is_newest, before, sizes, flags, TIME_LAST, WIDTHS)
        column = (unit * PARTS).to(tl.int32)[:, None] + tl.arange(0, PARTS)[None, :]
        kept = as_bytes(kept_ptr).to(tl.pointer_type(OUT), bitcast=True)
        newest = kept + ((end_slots * envs + env).to(tl.int64) * (WIDTH * PARTS))[:, None] + column
        if tl.max(held_ended.to(tl.int32), 0) > 0:
            held = tl.load(newest, mask=held_ended[:, None], other=0)
            to = kept + ((number % end_slots * envs + env).to(tl.int64) * (WIDTH * PARTS))[:, None] + column
            tl.store(to, held, mask=held_ended[:, None])
        source = (env * frames + frame if TIME_LAST else row.to(tl.int32)).to(tl.int64)
        origin = as_bytes(data_ptr).to(tl.pointer_type(ITEM), bitcast=True)
        mask = (ended | is_newest)[:, None]
        value = tl.load(origin + (source * (WIDTH * PARTS))[:, None] + column, mask=mask, other=0)
        if COUNTED:
            to = tl.where(is_newest, end_slots, own % end_slots)
            newest = kept + ((to * envs + env).to(tl.int64) * (WIDTH * PARTS))[:, None] + column
        tl.store(newest, converted(value, OUT), mask=mask)
