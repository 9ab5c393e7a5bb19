"""Ends: of a ring that keeps observations once, which frames stand for others, and where what comes after windows lies.

See ``multistep_triton.ends``. Frames are counted from the oldest one on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multistep_triton.kernels.picked import row_of_slot
from multistep_triton.kernels.rows import NOWHERE


@triton.jit
def count_at(count_ptr, env, frame, mask, agents, data, DATA: tl.constexpr):
    """How many ends were passed on before a frame."""
    return tl.load(count_ptr + row_of_slot(env, frame, data, DATA[0], DATA[1]) // agents, mask=mask, other=0)


@triton.jit
def any_of(condition):
    """Whether it holds anywhere in a program."""
    return tl.max(tl.max(condition.to(tl.int32), 1), 0) > 0


@triton.jit
def stand_in(count_ptr, env, begin, live, known, slots, agents, data, DATA: tl.constexpr):
    """Picked frames or those that stand for them, and whether what comes after the first end from there on is gone."""
    total = count_at(count_ptr, env, begin * 0 + known - 1, live, agents, data, DATA)
    own = count_at(count_ptr, env, begin, live, agents, data, DATA)
    gone = live & (total - own > slots)
    if any_of(gone):
        inner = gone & (begin + 1 < known)
        lost = inner & (count_at(count_ptr, env, begin + 1, inner, agents, data, DATA) != own)
        before = begin - 1
        # What is older than an end that is gone is gone, too.
        other = count_at(count_ptr, env, before, lost & (begin > 0), agents, data, DATA)
        before = tl.where((begin == 0) | (other != own), known - 1, before)
        begin = tl.where(lost, before, begin)
        gone = live & (total - count_at(count_ptr, env, begin, live, agents, data, DATA) > slots)
    return begin, total, gone


@triton.jit
def find_following(count_ptr, env, last, total, mask, known, slots, envs, agents, data, DATA: tl.constexpr):
    """The row of what comes after frames."""
    followed = mask & (last + 1 < known)
    own = count_at(count_ptr, env, last, followed, agents, data, DATA)
    after = count_at(count_ptr, env, last + 1, followed, agents, data, DATA)
    kept = (own != after) & (total - own <= slots)
    end = tl.where(last + 1 < known, own % slots, slots)
    row = row_of_slot(env, last + 1, data, DATA[0], DATA[1])
    row = tl.where(kept | (last + 1 >= known), (end - slots - 1) * envs + env, row)
    return tl.where(mask, row, NOWHERE)
