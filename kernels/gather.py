"""The masked gather: rows of a leaf as raw bytes, from the frames at the ends of the windows or from their own."""

from __future__ import annotations

import triton
import triton.language as tl

from multistep_triton.kernels.stream import (
    frame_addresses,
    item_pointers,
    output_places,
    row_pointers,
    slot_addresses,
    tile_frames,
    written,
)
from multistep_triton.kernels.window import window_steps


@triton.jit
def copy_rows(
    program, leaf, stream, flags, steps, rows, emitted, n, stay, to,
    UNROLLED: tl.constexpr, ENDS: tl.constexpr, READ: tl.constexpr,
    TIME_MAJOR: tl.constexpr, LENGTH: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
    GATHERED: tl.constexpr, TYPE: tl.constexpr, ITEM_BYTES: tl.constexpr, UNIT: tl.constexpr,
    D: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Copies a tile of one leaf: frames before ``emitted`` to the output, the others to the ring ``to``.

    The first ``stay`` frames that are held back lie there already, and are in no tile. A row is D items of ITEM_BYTES;
    the rows of source and destination begin at multiples of UNIT bytes.
    """
    _, known, sizes, ring, picked = stream
    chunks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row, frame, live, places, limits = tile_frames(
        program // chunks, rows, known - stay, stream, TIME_MAJOR, LENGTH, BLOCK_F
    )  # fmt: skip
    early = live
    if len(places) == 0:
        frame += tl.where(frame < emitted, 0, stay)
        early = live & (frame < emitted)
    tile = row, frame, early, places, limits
    item = program % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    source, out, held = leaf
    future = frame
    if GATHERED:
        if READ:
            if len(places) > 0:
                address = (steps[0] << 2 >> 4) + output_places(tile, emitted) * 8
            else:
                address = frame_addresses(steps, row, frame, (0, known, sizes, ring, picked), 0)
            length = tl.load(address.to(tl.pointer_type(tl.int64)), mask=early, other=1)
            length = tl.minimum(tl.maximum(length, 1), known - frame).to(tl.int32)
        else:
            length = window_steps(tile, stream, flags, n, UNROLLED, ENDS)
        future += tl.where(early, length - 1, 0)
    inside = live[:, None] & (item < D)[None, :]
    pointers = item_pointers(source, row, future, item, stream, TYPE, ITEM_BYTES, UNIT, D, RUN)
    value = tl.load(pointers, mask=inside, other=0)
    to_out = (out << 2 >> 4) + output_places(tile, emitted) * (D * ITEM_BYTES)
    if len(places) == 0:
        to_held = slot_addresses(held, row, frame - emitted, known - emitted, to, D * ITEM_BYTES)
        to_out = tl.where(frame < emitted, to_out, to_held)
    pointers = row_pointers(to_out, TYPE, UNIT)
    wanted = written((row, frame, live, places, limits))[:, None] & (item < D)[None, :]
    tl.store(pointers[:, None] + item[None, :], value, mask=wanted)
