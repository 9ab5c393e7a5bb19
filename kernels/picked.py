"""Picked: which frames of a ring are sampled, and where frames lie."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of_slot(env, slot, ring, NESTED: tl.constexpr, TURNS: tl.constexpr):
    """The row of the slot after so many from the first one on; a ring that does not TURN begins with slot 0."""
    first, slots, inner = ring
    if TURNS:
        slot += first
        slot = tl.where(slot < slots, slot, slot - slots)
    if NESTED:
        return (env // inner * slots + slot) * inner + env % inner
    else:  # environments are all inner ones or all outer ones
        return slot * inner + env * tl.where(inner == 1, slots, 1)


@triton.jit
def find_picked(block, exists, picked, others, envs, known, first, DRAWN: tl.constexpr):
    """Environment, slot and frame of each picked frame, and whether there is one; for no other is anything read.

    Picked is an index for every dimension or, if they were DRAWN, a row of those that hold frames, as a number of them
    or a share in [0, 1).
    """
    index = tl.load(picked[0] + block, mask=exists, other=0)
    if DRAWN:
        rows = known * envs
        if index.dtype.is_floating():
            index = tl.minimum((index * rows).to(tl.int64), rows - 1)
        live = exists & (index >= 0) & (index < rows)
        row = tl.where(live, index, 0).to(tl.int32)
        slot = row // envs
        env = row - slot * envs
    else:
        slot = index.to(tl.int32)
        env = block * 0
        live = exists & (index >= 0) & (index < known)
        outermost = envs
        for d in tl.static_range(len(others)):
            outermost = outermost // others[d]
        for d in tl.static_range(1, len(picked)):
            size = outermost if d == 1 else others[d - 2]
            index = tl.load(picked[d] + block, mask=exists, other=0)
            live &= (index >= 0) & (index < size)
            env = env * size + index.to(tl.int32)
    begin = slot - first
    return env, slot, tl.where(begin < 0, begin + known, begin), live


@triton.jit
def find_live(written_ptr, slots):
    """The slot from which the oldest frame is the next one, and how many hold frames, of that many ever written."""
    written = tl.load(written_ptr)
    return (written % slots).to(tl.int32), tl.minimum(written, slots).to(tl.int32)


@triton.jit
def store_index(index_ptr, place, slot, env, others, mask, DIMS: tl.constexpr):
    """Where frames lie, ``[N, DIMS]``; ``others`` are the sizes of the dimensions after the first two."""
    pointers = index_ptr + place.to(tl.int64) * DIMS
    tl.store(pointers, slot.to(tl.int64), mask=mask)
    for d in tl.static_range(len(others)):
        size = others[len(others) - 1 - d]
        outer = env // size
        tl.store(pointers + (DIMS - 1 - d), (env - outer * size).to(tl.int64), mask=mask)
        env = outer
    if DIMS > 1:
        tl.store(pointers + 1, env.to(tl.int64), mask=mask)
