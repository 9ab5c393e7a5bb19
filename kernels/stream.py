"""The stream that the kernels read: the frames of the carry, then those of the data, each where it lies.

Where frames are sampled, the data is a ring, whose frames are counted from the oldest on; what a program then takes on
is not all frames, but those that were picked.

Owns how a kernel finds a frame in memory and how a launcher describes memory to it; no maths.

Launchers pass addresses and strides as integers in tuples. Triton specializes every integer in a tuple on being 1 and
on being a multiple of 16, so that another length of the data would compile another kernel; :func:`coded` makes all of
them look alike. What alignment gains is not lost: rows are copied in units that all their addresses are multiples of,
and the kernels are told so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# By the names that torch has for them; bools are bytes. Kernels are told a position in this list.
_ELEMENTS = {
    "bool": tl.int8,
    "int8": tl.int8,
    "int16": tl.int16,
    "int32": tl.int32,
    "int64": tl.int64,
    "uint8": tl.uint8,
    "uint16": tl.uint16,
    "uint32": tl.uint32,
    "uint64": tl.uint64,
    "float16": tl.float16,
    "bfloat16": tl.bfloat16,
    "float32": tl.float32,
    "float64": tl.float64,
}
ELEMENTS = {getattr(torch, name): position for position, name in enumerate(_ELEMENTS)}
TYPES = tl.constexpr(tuple(_ELEMENTS.values()))


def coded(value: int) -> int:
    """A non-negative integer below 2**58 as one that is neither 1, nor a multiple of 16, nor an int32.

    In a kernel, ``x << 2 >> 4`` is the value.
    """
    return value << 2 | 1 << 62 | 2


@triton.jit
def tile_frames(program, rows, frames, stream, TIME_MAJOR: tl.constexpr, LENGTH: tl.constexpr, BLOCK_F: tl.constexpr):
    """Row and frame of each of the BLOCK_F places of a tile over ``[rows, frames]``, int32, and which are inside.

    Neighbouring places are neighbours in memory. Mostly a tile is a stretch of frames, that of a row or of several.
    Where the neighbours of a frame are those of the rows beside it, the tile is a rectangle: LENGTH frames at most,
    and as many rows as is left of BLOCK_F, so that both what it reads and what it writes are stretches of memory.
    Of frames that were picked, a tile is a stretch, wherever they lie; and there are two things more, in tuples that
    else are empty: which of them each is and whether it is one, and, where every one has an n of its own, this. A frame
    that was picked where there is none is not inside, and comes out blank.
    """
    _, known, _, _, picked = stream
    if len(picked) > 0:
        index, sizes, own, count, first = picked
        place = program * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = place < (count << 2 >> 4)
        slot = load_index(index[0], place, inside)
        # Nothing else is read, whatever the indices.
        inside &= (slot >= 0) & (slot < known)
        frame = slot.to(tl.int32) - (first << 2 >> 4).to(tl.int32)
        frame = tl.where(frame < 0, frame + known, frame)
        row = tl.zeros([BLOCK_F], tl.int32)
        for d in tl.static_range(1, len(index)):
            size = sizes[d] << 2 >> 4
            dim = load_index(index[d], place, inside)
            inside &= (dim >= 0) & (dim < size)
            row = row * size.to(tl.int32) + dim.to(tl.int32)
        places = (place.to(tl.int64), place < (count << 2 >> 4))
        limits = own
        if len(own) > 0:
            limits = (tl.minimum(load_index(own[0], place, inside), known).to(tl.int32),)
    elif TIME_MAJOR:
        across = tl.cdiv(frames, LENGTH)
        length = tl.cdiv(frames, across)
        height = BLOCK_F // length
        place = tl.arange(0, BLOCK_F)
        row = program // across * height + place % height
        frame = program % across * length + place // height
        inside = (place // height < length) & (row < rows) & (frame < frames)
    else:
        begin = program.to(tl.int64) * BLOCK_F
        place = (begin % frames).to(tl.int32) + tl.arange(0, BLOCK_F)
        row = (begin // frames).to(tl.int32) + place // frames
        frame = place % frames
        inside = row < rows
    if len(picked) == 0:
        places = ()  # type: ignore[assignment]
        limits = ()
    return row, frame, inside, places, limits


@triton.jit
def load_index(address, place, inside):
    """What a list of int64 holds at a place."""
    pointers = (address << 2 >> 4).to(tl.pointer_type(tl.int64)) + place
    return tl.load(pointers, mask=inside, other=0)


@triton.jit
def written(tile):
    """Which places of a tile are written: those that are inside and, of what was picked, those of no frame, too."""
    _, _, inside, places, _ = tile
    return places[1] if len(places) > 0 else inside


@triton.jit
def output_places(tile, emitted):
    """Where in ``[rows, emitted]``, or of what was picked, the frames of a tile are; int64."""
    row, frame, _, places, _ = tile
    return places[0] if len(places) > 0 else row.to(tl.int64) * emitted + frame


def count_tiles(rows: int, frames: int, time_major: bool, length: int, block: int) -> int:
    """How many tiles cover ``[rows, frames]``; see :func:`tile_frames`."""
    if not rows or not frames:
        return 0
    if not time_major:
        return -(-rows * frames // block)
    across = -(-frames // length)
    return across * -(-rows // (block // -(-frames // across)))


@triton.jit
def strided_offset(index, sizes, strides, FIRST: tl.constexpr):
    """Bytes from the beginning to an index over dimensions of these sizes, whose strides begin at FIRST."""
    offset = 0
    for d in tl.static_range(len(sizes) - 1, 0, -1):
        size = (sizes[d] << 2 >> 4).to(tl.int32)
        # int64 before the multiplication
        offset += (index % size).to(tl.int64) * (strides[FIRST + d] << 2 >> 4)
        index = index // size
    return offset + index.to(tl.int64) * (strides[FIRST] << 2 >> 4)


@triton.jit
def slot_addresses(memory, row, frame, count, ring, ROW_BYTES: tl.constexpr):
    """Where ``count`` frames held back lie: row by row or, in a ring, slot by slot from its first one on."""
    if len(ring) == 0:
        place = row.to(tl.int64) * count + frame
    else:
        slots = (ring[0] << 2 >> 4).to(tl.int32)
        slot = frame + (ring[1] << 2 >> 4).to(tl.int32)
        slot = tl.where(slot < slots, slot, slot - slots)
        place = slot.to(tl.int64) * (ring[2] << 2 >> 4) + row
    return (memory << 2 >> 4) + place * ROW_BYTES


@triton.jit
def frame_addresses(source, row, frame, stream, ROW_BYTES: tl.constexpr):
    """Where frames of the stream lie: the first ``carried`` in the carry's ring, then in the data.

    Data from which frames were picked is a ring itself, of which ``known`` slots hold frames.
    """
    data, carry, strides, _ = source
    carried, known, sizes, ring, picked = stream
    slot = frame - carried
    if len(picked) > 0:
        slot += (picked[-1] << 2 >> 4).to(tl.int32)
        slot = tl.where(slot < known, slot, slot - known)
    address = (data << 2 >> 4) + slot.to(tl.int64) * (strides[0] << 2 >> 4)
    address += strided_offset(row, sizes, strides, 1)
    if len(picked) == 0:
        held = slot_addresses(carry, row, frame, carried, ring, ROW_BYTES)
        address = tl.where(frame < carried, held, address)
    return address


@triton.jit
def row_pointers(address, TYPE: tl.constexpr, UNIT: tl.constexpr):
    """Pointers to where rows begin, which the launcher, and not the compiler, knows to be multiples of UNIT bytes."""
    tl.device_assert(address % UNIT == 0, "a row begins at no multiple of its unit")
    return tl.multiple_of(address.to(tl.pointer_type(TYPES[TYPE])), [UNIT])


@triton.jit
def item_pointers(
    source, row, frame, item, stream,
    TYPE: tl.constexpr, ITEM_BYTES: tl.constexpr, UNIT: tl.constexpr, D: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Pointers [BLOCK_F, BLOCK_D] to items of frames; rows of D items begin at multiples of UNIT bytes.

    The items of a row lie one after the other, but in the data, where it has outer dimensions, in runs of RUN.
    """
    _, _, strides, outer = source
    carried, _, sizes, _, _ = stream
    begin = frame_addresses(source, row, frame, stream, D * ITEM_BYTES)
    begin = row_pointers(begin, TYPE, UNIT)
    offset = item[None, :]
    if len(outer) > 0:
        apart = item % RUN + strided_offset(item // RUN, outer, strides, 1 + len(sizes)) // ITEM_BYTES
        offset = tl.where((frame < carried)[:, None], item[None, :], apart[None, :])
    return begin[:, None] + offset
