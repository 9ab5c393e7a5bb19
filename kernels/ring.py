"""Ring: finds the sampled frames of a ring, and where frames lie, as rows and as indices."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_of_slot(env, slot, ring, NESTED: tl.constexpr, TURNS: tl.constexpr):
    """Returns the row of ``env`` in slot ``first + slot`` of a ring, beyond whose end slots go on at 0 if it TURNS."""
    first, slots, inner = ring
    if TURNS:
        slot += first
        slot = tl.where(slot < slots, slot, slot - slots)
    if NESTED:
        return (env // inner * slots + slot) * inner + env % inner
    else:  # inner is 1 or the number of all environments
        return slot * inner + env * tl.where(inner == 1, slots, 1)


@triton.jit
def find_sampled(block, exists, indices, others, envs, known, first, DRAWN: tl.constexpr):
    """Returns environment, slot, frame counted from slot ``first`` on, and ``live`` of each sample ``block``.

    ``indices`` has an index for every dimension or, if DRAWN, one number: a row of the ``known * envs`` with frames, or
    a share in [0, 1). Nothing is loaded of what is no frame, where ``live`` is False. ``others``: see ``store_index``.
    """
    index = tl.load(indices[0] + block, mask=exists, other=0)
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
        for d in tl.static_range(1, len(indices)):
            size = outermost if d == 1 else others[d - 2]
            index = tl.load(indices[d] + block, mask=exists, other=0)
            live &= (index >= 0) & (index < size)
            env = env * size + index.to(tl.int32)
    begin = slot - first
    return env, slot, tl.where(begin < 0, begin + known, begin), live


@triton.jit
def find_live(written_ptr, slots):
    """Returns the oldest frame's slot, modulo the slots that hold frames, and how many do, by the write count."""
    written = tl.load(written_ptr)
    return (written % slots).to(tl.int32), tl.minimum(written, slots).to(tl.int32)


@triton.jit
def store_index(index_ptr, place, slot, env, others, mask, DIMS: tl.constexpr):
    """Stores indices of frames in rows ``place`` of ``[N, DIMS]``; ``others`` are the sizes after the first two."""
    pointers = index_ptr + place.to(tl.int64) * DIMS
    tl.store(pointers, slot.to(tl.int64), mask=mask)
    for d in tl.static_range(len(others)):
        size = others[len(others) - 1 - d]
        outer = env // size
        tl.store(pointers + (DIMS - 1 - d), (env - outer * size).to(tl.int64), mask=mask)
        env = outer
    if DIMS > 1:
        tl.store(pointers + 1, env.to(tl.int64), mask=mask)
