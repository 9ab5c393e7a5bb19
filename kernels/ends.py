"""Ends: finds lost ends and the observations after windows, of a ring that keeps observations once.

See ``multistep_triton.ends`` and, for arguments, ``windows``. Frames are counted from the oldest on. Rows of the final
observations, ``[E + 1, envs]``, are negative, counted from their end; the last ``envs`` follow the newest frames.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multistep_triton.kernels.ring import row_of_slot
from multistep_triton.kernels.rows import NOWHERE


@triton.jit
def count_at(count_ptr, row, mask, agents, DATA: tl.constexpr):
    """Loads how many ends came before the frame in ``row``; with DATA[2], ``agents`` consecutive rows share a count."""
    return tl.load(count_ptr + (row // agents if DATA[2] else row), mask=mask, other=0)


@triton.jit
def any_of(condition):
    return tl.max(tl.max(condition.to(tl.int32), 1), 0) > 0


@triton.jit
def read_total(count_ptr, env, begin, live, known, slots, agents, data, DATA: tl.constexpr):
    """Returns ``counted``: the counts of ends, that of the environment's newest frame, and ``slots``, which is E."""
    newest = row_of_slot(env, begin * 0 + known - 1, data, DATA[0], DATA[1])
    return count_ptr, count_at(count_ptr, newest, live, agents, DATA), slots


@triton.jit
def is_lost(env, frame, mask, known, counted, agents, data, DATA: tl.constexpr):
    """Returns which frames are ends, of any group, whose final observation was overwritten, and the frames' counts."""
    count_ptr, total, slots = counted
    own_row = row_of_slot(env, frame, data, DATA[0], DATA[1])
    after_row = row_of_slot(env, frame + 1, data, DATA[0], DATA[1])
    followed = mask & (frame + 1 < known)
    own = count_at(count_ptr, own_row, followed, agents, DATA)
    gone = followed & (total - own > slots)
    return gone & (count_at(count_ptr, after_row, gone, agents, DATA) != own), own


@triton.jit
def find_lost(env, begin, live, known, counted, agents, data, DATA: tl.constexpr):
    """Returns which frames ``begin`` are lost ends, and for each the frame that is sampled in its place."""
    lost, own = is_lost(env, begin, live, known, counted, agents, data, DATA)
    # The frame before stands in, unless it is an end, which is older and so lost, too: then the newest frame does.
    before_row = row_of_slot(env, begin - 1, data, DATA[0], DATA[1])
    other = count_at(counted[0], before_row, lost & (begin > 0), agents, DATA)
    return lost, tl.where((begin == 0) | (other != own), known - 1, begin - 1)


@triton.jit
def find_following(env, lane, last, mask, known, counted, envs, agents, data, DATA: tl.constexpr):
    """Returns the row of the observation after lane 0's window: of the next frame, or of the final observations."""
    last = tl.sum(tl.where(lane == 0, last, 0), 1)[:, None]
    count_ptr, total, slots = counted
    followed = mask & (last + 1 < known)
    row = row_of_slot(env, last + 1, data, DATA[0], DATA[1])
    own = count_at(count_ptr, row_of_slot(env, last, data, DATA[0], DATA[1]), followed, agents, DATA)
    kept = (own != count_at(count_ptr, row, followed, agents, DATA)) & (total - own <= slots)
    end = tl.where(last + 1 < known, own % slots, slots)
    row = tl.where(kept | (last + 1 >= known), (end - slots - 1) * envs + env, row)
    return tl.where(mask, row, NOWHERE)
