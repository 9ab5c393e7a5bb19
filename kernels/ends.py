"""Ends: of a ring that keeps observations once, which frames stand for others, and where what comes after windows lies.

See ``multistep_triton.ends``. Frames are counted from the oldest one on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multistep_triton.kernels.picked import row_of_slot
from multistep_triton.kernels.rows import NOWHERE


@triton.jit
def count_at(count_ptr, row, mask, agents, DATA: tl.constexpr):
    """How many ends were passed on before the frame of a row; agents share it."""
    return tl.load(count_ptr + (row // agents if DATA[2] else row), mask=mask, other=0)


@triton.jit
def any_of(condition):
    """Whether it holds anywhere in a program."""
    return tl.max(tl.max(condition.to(tl.int32), 1), 0) > 0


@triton.jit
def read_total(count_ptr, env, begin, live, known, slots, agents, data, DATA: tl.constexpr):
    """What tells of an end whether what comes after it is there: counts, all that there were, and rows for so many."""
    newest = row_of_slot(env, begin * 0 + known - 1, data, DATA[0], DATA[1])
    return count_ptr, count_at(count_ptr, newest, live, agents, DATA), slots


@triton.jit
def is_lost(env, frame, mask, known, counted, agents, data, DATA: tl.constexpr):
    """Which frames are ends, of whatever group, that have lost what comes after them; and the counts of frames."""
    count_ptr, total, slots = counted
    own_row = row_of_slot(env, frame, data, DATA[0], DATA[1])
    after_row = row_of_slot(env, frame + 1, data, DATA[0], DATA[1])
    followed = mask & (frame + 1 < known)
    own = count_at(count_ptr, own_row, followed, agents, DATA)
    gone = followed & (total - own > slots)
    return gone & (count_at(count_ptr, after_row, gone, agents, DATA) != own), own


@triton.jit
def find_lost(env, begin, live, known, counted, agents, data, DATA: tl.constexpr):
    """Which frames are lost so, and the frames that stand for those."""
    lost, own = is_lost(env, begin, live, known, counted, agents, data, DATA)
    # What is older than an end that is gone is gone, too.
    before_row = row_of_slot(env, begin - 1, data, DATA[0], DATA[1])
    other = count_at(counted[0], before_row, lost & (begin > 0), agents, DATA)
    return lost, tl.where((begin == 0) | (other != own), known - 1, begin - 1)


@triton.jit
def find_following(env, lane, last, mask, known, counted, envs, agents, data, DATA: tl.constexpr):
    """The row of what comes after the last frame of the window of lane 0."""
    last = tl.sum(tl.where(lane == 0, last, 0), 1)[:, None]
    count_ptr, total, slots = counted
    followed = mask & (last + 1 < known)
    row = row_of_slot(env, last + 1, data, DATA[0], DATA[1])
    own = count_at(count_ptr, row_of_slot(env, last, data, DATA[0], DATA[1]), followed, agents, DATA)
    kept = (own != count_at(count_ptr, row, followed, agents, DATA)) & (total - own <= slots)
    end = tl.where(last + 1 < known, own % slots, slots)
    row = tl.where(kept | (last + 1 >= known), (end - slots - 1) * envs + env, row)
    return tl.where(mask, row, NOWHERE)
