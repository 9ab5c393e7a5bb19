"""Rows: copies rows of all leaves, bit for bit, from where lists say to the outputs and to the frames held back.

A row is what a leaf holds of one frame. The kernel copies units, the widest of 1, 2, 4, 8 or 16 bytes that divide a
row and its address. A tile is TILE units in a line, whatever rows they are of, so that every thread has work.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# What a list of rows has where there is no row to copy, and zeros come out.
NOWHERE: tl.constexpr = tl.constexpr(-(2**31))
# Units of a program: 8 for each of 128 threads, which has the loads of all 8 under way at once.
TILE = 1024
# With at most so many registers per thread, eight programs share a multiprocessor.
MOST_REGISTERS = 64


@triton.jit
def either_pointer(condition, one, other):
    """Returns ``one`` or ``other``, chosen as integers: for AMD, Triton does not compile a choice of pointers."""
    return tl.where(condition, one.to(tl.int64), other.to(tl.int64)).to(one.dtype)


@triton.jit
def as_bytes(pointer):
    return pointer.to(tl.pointer_type(tl.int8), bitcast=True)


@triton.jit
def find_units(tile, rows, WIDTH: tl.constexpr, TILE: tl.constexpr):
    """Returns the tile's first unit, that unit's row, each lane's unit within its row, its row less that, the mask."""
    begin = tile * TILE
    offset = tl.arange(0, TILE)
    inside = offset < tl.minimum(rows * WIDTH - begin, TILE).to(tl.int32)
    top = begin // WIDTH
    unit = begin - top * WIDTH + offset.to(tl.uint32)
    row = unit // WIDTH
    return begin, top, unit - row * WIDTH, row, inside


@triton.jit
def converted(value, OUT: tl.constexpr):
    """Converts as torch does, which rounds float64 to 16 bits by way of float32."""
    if value.dtype == tl.float64 and OUT.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(OUT)


@triton.jit
def copy_tile(
    tile, rows, data_ptr, carry_ptr, carry_rows, source_ptr, out_ptr, first, slots,
    ITEM: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, OUT: tl.constexpr, CARRIED: tl.constexpr,
    LISTED: tl.constexpr, RING: tl.constexpr, TILE: tl.constexpr, BLANK: tl.constexpr = False,
):  # fmt: skip
    """Copies one tile: TILE units of ``rows`` rows of WIDTH units, each of PARTS items of type ITEM, converted to OUT.

    If LISTED, row ``i`` comes from row ``source[i]`` of the data. If that is negative, it comes with CARRIED from the
    carry, counted from the end of its ``carry_rows`` rows, and is zeros without CARRIED, or with BLANK if that is
    NOWHERE. Without a list, row ``i`` comes from row ``i`` of the data or, if ``source_ptr`` is ``(frames, envs)``,
    from the same frame of data that lies ``[envs, frames]``; row ``i`` counts ``[frames, envs]``. It goes to row ``i``
    of the output or, with RING, to row ``first + i`` of a ring of ``slots`` rows.
    """
    UNIT: tl.constexpr = PARTS * ITEM.primitive_bitwidth // 8
    OUT_UNIT: tl.constexpr = PARTS * OUT.primitive_bitwidth // 8
    begin, top, unit, row, inside = find_units(tile, rows, WIDTH, TILE)
    offset = tl.arange(0, TILE)
    if LISTED:
        source = tl.load(source_ptr + top + row, mask=inside)
    elif source_ptr is None:
        source = (top + row).to(tl.int32)
    else:
        frames, envs = source_ptr
        source = ((top + row) % envs * frames + (top + row) // envs).to(tl.int32)
    origin = as_bytes(data_ptr)
    read = inside
    if CARRIED:
        carry_end = as_bytes(carry_ptr) + carry_rows.to(tl.int64) * (WIDTH * UNIT)
        origin = either_pointer(source < 0, carry_end, origin)
        if BLANK:
            read &= source != NOWHERE
    else:
        read &= source >= 0
    # In bytes, so that a row is added to an address by one multiplication of 32 bits.
    origin = (origin + source.to(tl.int64) * (WIDTH * UNIT)).to(tl.pointer_type(ITEM), bitcast=True)
    pointers = tl.multiple_of(origin + unit * PARTS, [UNIT])
    part = tl.arange(0, PARTS)[None, :]
    value = tl.load(pointers[:, None] + part, mask=read[:, None], other=None if CARRIED and not BLANK else 0)
    value = converted(value, OUT)
    out_ptr = out_ptr.to(tl.pointer_type(OUT), bitcast=True)
    if RING and LISTED:  # the output is a carry, whose units 32 bits can count
        to = begin + offset.to(tl.uint32) + first.to(tl.uint32) * WIDTH
        to -= tl.where(to < slots.to(tl.uint32) * WIDTH, 0, slots.to(tl.uint32) * WIDTH)
        pointers = tl.multiple_of(out_ptr + to.to(tl.int64) * PARTS, [OUT_UNIT])
    elif RING:
        to = top + row + first.to(tl.uint32)
        to -= tl.where(to < slots.to(tl.uint32), 0, slots.to(tl.uint32))
        pointers = tl.multiple_of(out_ptr + (to.to(tl.int64) * WIDTH + unit) * PARTS, [OUT_UNIT])
    else:
        pointers = tl.multiple_of(out_ptr + begin.to(tl.int64) * PARTS, OUT_UNIT) + offset * PARTS
    tl.store(pointers[:, None] + part, value, mask=inside[:, None])


@triton.jit(do_not_specialize=["rows", "held_rows", "carry_rows", "first", "slots"])
def n_step_rows_kernel(
    data, carry, out, held, rows_ptr, rows, held_rows, carry_rows, first, slots,
    UNITS: tl.constexpr, GATHERED: tl.constexpr, CARRIED: tl.constexpr, TILE: tl.constexpr,
    RETURNS: tl.constexpr,
):  # fmt: skip
    """Copies one tile of one leaf: programs count the tiles of leaf 0, emitted rows and then held ones, of leaf 1, ...

    ``rows_ptr`` has lists of source rows, one after the other: of ``rows`` emitted frames, of ``held_rows`` frames to
    hold back, of the ``rows`` windows' last frames, and of what follows these. Leaf ``k`` emits rows of the first,
    third or fourth list if GATHERED[k] is 0, 1 or 2; if it is 2, ``carry[k]`` has the final observations. Held rows go
    to a ring of ``slots`` rows from row ``first`` on. UNITS is what ``units_of`` returns.
    With RETURNS a program returns after its tile, which Triton does not compile for AMD.
    """
    tile = tl.program_id(0).to(tl.uint32)
    rows = rows.to(tl.uint32)
    held_rows = held_rows.to(tl.uint32)
    first_tile = tile * 0
    for k in tl.static_range(len(UNITS)):
        tiles = tl.cdiv(rows * UNITS[k][2], TILE)
        held_tiles = tl.cdiv(held_rows * UNITS[k][2], TILE)
        mine = tile < first_tile + tiles + held_tiles
        if not RETURNS:
            mine &= tile >= first_tile
        if mine:
            if tile < first_tile + tiles:
                source_ptr = rows_ptr + GATHERED[k] * rows + held_rows if GATHERED[k] else rows_ptr
                copy_tile(
                    tile - first_tile, rows, data[k], carry[k], carry_rows, source_ptr, out[k], first, slots,
                    *UNITS[k], CARRIED or GATHERED[k] == 2, True, False, TILE, GATHERED[k] == 2,
                )  # fmt: skip
            else:
                copy_tile(
                    tile - first_tile - tiles, held_rows, data[k], carry[k], carry_rows, rows_ptr + rows, held[k],
                    first, slots, *UNITS[k], CARRIED, True, True, TILE,
                )  # fmt: skip
            if RETURNS:
                return
        first_tile += tiles + held_tiles


@triton.jit(do_not_specialize=["rows", "frames"])
def future_rows_kernel(steps_ptr, rows_ptr, rows, frames, TILE: tl.constexpr):
    """Stores the row of the last frame of TILE of ``rows`` windows, each cut at the end of its row of ``frames``."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    steps = tl.load(steps_ptr + row, mask=row < rows, other=1)
    steps = tl.minimum(tl.maximum(steps, 1), frames - row % frames).to(tl.int32)
    tl.store(rows_ptr + row, row + steps - 1, mask=row < rows)


TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def units_of(items: int, addresses: tuple[int, int], of: torch.dtype, to: torch.dtype) -> tuple[Any, int, int, Any]:
    """Returns ITEM, PARTS, WIDTH and OUT of :func:`copy_tile`, for rows of ``items`` from one address to the other."""
    if of == to:
        row, address = items * of.itemsize, addresses[0] | addresses[1]
        unit = next(each for each in (16, 8, 4, 2, 1) if row % each == 0 and address % each == 0)
        item = {1: tl.int8, 2: tl.int16, 4: tl.int32}.get(unit, tl.int64)
        return item, max(unit // 8, 1), row // unit, item
    parts = next(
        each
        for each in (4, 2, 1)
        if items % each == 0
        and all(
            address % (each * dtype.itemsize) == 0 and each * dtype.itemsize <= 16
            for address, dtype in zip(addresses, (of, to), strict=True)
        )
    )
    return TYPES[of], parts, items // parts, TYPES[to]
