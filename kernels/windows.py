"""Windows: finds each window's length, its n-step return and the rows to copy for it; the first of two launches.

A tile is ``[TILE / LANES, LANES]``: each of its rows is a block, consecutive frames of one environment, and each lane
loads one frame, for all windows of the block. A lane adds to its sum over 1, 2, 4, ... frames the discounted sum of the
lane after these, unless a boundary lies between. A window adds up such sums, the longest first, so that its return
depends on its frames alone, not on where they lie nor on n. Windows of more than 64 frames (LONG) add up pieces of 64.

A ring, ``(first, slots, inner)``, is memory ``[outer, slots, inner]``. ``flags`` is ``(dones, masks, ids, agents)``,
each leaf a pair of data and carry. ``stream`` is ``(carried, known, carry ring, carry rows, data ring)``: the first
``carried`` of ``known`` frames lie in the carry, in negative rows, counted from its end. ``counted`` is empty or from
``read_total``. DATA tells whether the data's ring is NESTED, whether it TURNS, and whether ``agents`` share its marks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multistep_triton.kernels.ends import any_of, find_following, find_lost, is_lost, read_total
from multistep_triton.kernels.ring import find_live, find_sampled, row_of_slot, store_index
from multistep_triton.kernels.rows import either_pointer

# Lanes of a program: with 128 threads, 4 for each.
TILE = 512
# A piece has at most 2**6 frames, so that lanes exchange values within a warp alone.
MOST_PIECE = 6
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def row_of_frame(env, frame, stream, DATA: tl.constexpr):
    """Returns the row of a frame, counted from the oldest one known on, in the carry or in the data."""
    carried, _, carry, carry_rows, data = stream
    held = row_of_slot(env, frame, carry, False, True) - carry_rows
    return tl.where(frame < carried, held, row_of_slot(env, frame - carried, data, DATA[0], DATA[1]))


@triton.jit
def load_row(leaf, row, carry_rows, mask, other, item=0, WIDTH: tl.constexpr = 1):
    data_ptr, carry_ptr = leaf
    origin = either_pointer(row < 0, carry_ptr + carry_rows.to(tl.int64) * WIDTH, data_ptr)
    return tl.load(origin + row.to(tl.int64) * WIDTH + item, mask=mask, other=other)


@triton.jit
def is_boundary(env, frame, row, live, flags, stream, DATA: tl.constexpr):
    """Returns whether no frame of the same trajectory follows ``frame``; loads nothing where ``live`` is False."""
    dones, masks, ids, agents = flags
    known, carry_rows = stream[1], stream[3]
    ends = frame + 1 >= known
    for k in tl.static_range(len(dones)):
        ends |= load_row(dones[k], row, carry_rows, live, 0) != 0
    if len(masks) + len(ids) > 0:
        next_row = row_of_frame(env, frame + 1, stream, DATA)
        if DATA[2]:
            next_row = tl.where(next_row < 0, next_row, next_row // agents)
            row = tl.where(row < 0, row, row // agents)
        followed = live & (frame + 1 < known)
    for k in tl.static_range(len(masks)):
        valid = load_row(masks[k], row, carry_rows, live, 1) != 0
        ends |= ~(valid & (load_row(masks[k], next_row, carry_rows, followed, 1) != 0))
    for k in tl.static_range(len(ids)):
        traj = load_row(ids[k], row, carry_rows, followed, 0)
        ends |= traj != load_row(ids[k], next_row, carry_rows, followed, 0)
    return ends


@triton.jit
def ahead(value, lane, by):
    """Returns the value of the lane ``by`` lanes further on, or of the block's last lane if there is none."""
    lanes: tl.constexpr = value.shape[1]
    return tl.gather(value, tl.broadcast_to(tl.minimum(lane + by, lanes - 1), value.shape), 1)


@triton.jit
def find_ends(
    env, frame, step, live, limit, flags, stream, counted,
    LEVELS: tl.constexpr, LONG: tl.constexpr, DATA: tl.constexpr,
):  # fmt: skip
    """Returns the frames' rows, the first lane from each on at which windows end, or LANES, and the boundaries."""
    row = row_of_frame(env, frame, stream, DATA)
    boundary = is_boundary(env, frame, row, live & (frame < stream[1]), flags, stream, DATA)
    lane = tl.arange(0, 1 << LEVELS)[None, :]
    # Of a sample only lane 0's window is stored: this lane is its frame ``step``, and ``limit`` its own n.
    ends = (boundary | (step + 1 >= limit)) if DATA[1] else boundary
    if len(counted) > 0:
        # A window ends one frame before a lost end.
        lost, _ = is_lost(env, frame, live, stream[1], counted, flags[3], stream[4], DATA)
        ends |= ahead(lost.to(tl.int32), lane, 1) != 0
        if LONG:
            further = tl.max(frame, 1)[:, None] + 1
            lost, _ = is_lost(env, further, live, stream[1], counted, flags[3], stream[4], DATA)
            ends |= (lane == (1 << LEVELS) - 1) & lost
    end = tl.where(ends, lane, 1 << LEVELS)
    for level in tl.static_range(LEVELS):
        end = tl.minimum(end, ahead(end, lane, 1 << level))
    return row, end, boundary


@triton.jit
def find_windows(
    env, begin, lane, live, limit, flags, stream, counted, LEVELS: tl.constexpr, LONG: tl.constexpr, DATA: tl.constexpr
):
    """Returns the frames of blocks and their :func:`find_ends`; a lost sample's begins at the frame in its place."""
    frame = begin + lane
    row, end, boundary = find_ends(env, frame, lane, live, limit, flags, stream, counted, LEVELS, LONG, DATA)
    if len(counted) > 0:
        lost, stands = find_lost(env, begin, live, stream[1], counted, flags[3], stream[4], DATA)
        if any_of(lost):
            frame = tl.where(lost, stands, begin) + lane
            row, end, boundary = find_ends(env, frame, lane, live, limit, flags, stream, counted, LEVELS, LONG, DATA)
    return frame, row, end, boundary


@triton.jit
def count_steps(
    env, frame, lane, end, live, limit, n_steps, flags, stream, counted,
    LEVELS: tl.constexpr, PIECE: tl.constexpr, LONG: tl.constexpr, DATA: tl.constexpr,
):  # fmt: skip
    """Returns the length of each lane's window; ``end`` is the lane where it ends, if it does in its first piece."""
    done = tl.minimum(n_steps, 1 << PIECE)
    steps = tl.minimum(end - lane + 1, done)
    if LONG:
        goes_on = end >= lane + done
        while done < n_steps:
            count = tl.minimum(n_steps - done, 1 << PIECE)
            _, later, _ = find_ends(
                env, frame + done, done + lane, live, limit, flags, stream, counted, LEVELS, LONG, DATA
            )
            steps += tl.where(goes_on, tl.minimum(later - lane + 1, count), 0)
            goes_on &= later >= lane + count
            done += count
    return steps


@triton.jit
def sum_piece(value, end, lane, count, powers_ptr, PIECE: tl.constexpr):
    """Returns each lane's discounted sum over ``count <= 2 ** PIECE`` lanes, or up to lane ``end`` if it is nearer."""
    total = value
    for level in tl.static_range(PIECE):
        # An end selects and never multiplies, so that a NaN beyond it reaches nothing before it.
        goes_on = end >= lane + (1 << level)
        weight = tl.load(powers_ptr + (1 << level)).to(value.dtype)
        if (count >> level) & 1 != 0:
            # The longest of these sums comes first, so that the order depends on a window and not on ``count``.
            if (count & ((1 << level) - 1)) != 0:
                total = tl.where(goes_on, value + weight * ahead(total, lane, 1 << level), value)
            else:
                total = value
        value = tl.where(goes_on, value + weight * ahead(value, lane, 1 << level), value)
    if count == 1 << PIECE:
        total = value
    return total


@triton.jit
def store_returns(
    reward, returns_ptr, place, written, live, env, frame, row, end, steps, limit, n_steps, flags, powers_ptr, stream,
    counted, WIDTH: tl.constexpr, LEVELS: tl.constexpr, PIECE: tl.constexpr, LONG: tl.constexpr, DATA: tl.constexpr,
):  # fmt: skip
    """Stores the n-step returns of one reward key, of WIDTH elements a frame, in rows ``place`` where ``written``."""
    SUM: tl.constexpr = tl.float64 if returns_ptr.dtype.element_ty == tl.float64 else tl.float32
    known, carry_rows = stream[1], stream[3]
    lane = tl.arange(0, 1 << LEVELS)[None, :]
    for item in range(WIDTH):
        done = tl.minimum(n_steps, 1 << PIECE)
        value = load_row(reward, row, carry_rows, live & (frame < known), 0, item, WIDTH).to(SUM)
        total = sum_piece(value, end, lane, done, powers_ptr, PIECE)
        if LONG:
            while done < n_steps:
                count = tl.minimum(n_steps - done, 1 << PIECE)
                later = frame + done
                later_row, later_end, _ = find_ends(
                    env, later, done + lane, live, limit, flags, stream, counted, LEVELS, LONG, DATA
                )
                value = load_row(reward, later_row, carry_rows, live & (later < known), 0, item, WIDTH).to(SUM)
                further = sum_piece(value, later_end, lane, count, powers_ptr, PIECE)
                further = total + tl.load(powers_ptr + done).to(SUM) * further
                total = tl.where(steps > done, further, total)
                done += count
        if DATA[1]:
            total = tl.where(live, total, float("nan"))
        pointers = returns_ptr + place.to(tl.int64) * WIDTH + item
        tl.store(pointers, total.to(returns_ptr.dtype.element_ty), mask=written)


@triton.jit
def list_held(own_ptr, rows, envs, inner, stream, DATA: tl.constexpr, TILE: tl.constexpr):
    """Lists ``rows`` rows of the newest frames known, TILE a program, in the order in which the carry holds them."""
    count = rows // envs
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    size = tl.where(inner == 1, count, envs)
    outer, near = index // size, index % size
    env, slot = tl.where(inner == 1, outer, near), tl.where(inner == 1, near, outer)
    tl.store(own_ptr + index, row_of_frame(env, stream[1] - count + slot, stream, DATA), mask=index < rows)


SIZES = ["envs", "agents", "carried", "known", "emitted", "held_rows", "n_steps", "blocks", "held_inner", "end_slots"]
RINGS = ["carry_first", "carry_slots", "carry_inner", "data_first", "data_slots", "data_inner"]


@triton.jit(do_not_specialize=SIZES + RINGS)
def n_step_windows_kernel(
    dones, masks, ids, rewards, returns, indices, limits, others, index_ptr, written_ptr, count_ptr, steps_ptr,
    discount_ptr, nonterminal_ptr, rows_ptr, powers_ptr, envs, agents, carried, known, emitted, held_rows, n_steps,
    blocks, held_inner, end_slots, carry_first, carry_slots, carry_inner, data_first, data_slots, data_inner,
    WIDTHS: tl.constexpr, LEVELS: tl.constexpr, PIECE: tl.constexpr, LONG: tl.constexpr, TIME_MAJOR: tl.constexpr,
    SAMPLED: tl.constexpr, DRAWN: tl.constexpr, DIMS: tl.constexpr, DATA: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Computes the windows of one tile, ``TILE / LANES`` blocks; :func:`shape_blocks` has LEVELS, PIECE and ``blocks``.

    In a stream, ``blocks`` blocks store the first ``emitted`` windows of an environment; with TIME_MAJOR, neighbouring
    blocks are of neighbouring environments. With SAMPLED, each of ``emitted`` blocks is a sample: ``indices``,
    ``others`` and DRAWN are as in ``find_sampled``, ``limits`` has each sample's n unless all are alike, ``index_ptr``,
    ``[emitted, DIMS]`` or None, gets where samples lie. A write count at ``written_ptr`` says which of ``known`` slots
    hold frames. ``count_ptr`` is ``Ends.count``, with ``end_slots`` final observations; ``powers_ptr`` has
    ``gamma ** k``. With ROWS, ``rows_ptr`` gets lists of rows: of the frames, of ``held_rows`` frames to hold back in a
    ring whose ``inner`` is ``held_inner``, of the windows' last frames and, with ``count_ptr``, of what follows.
    """
    LANES: tl.constexpr = 1 << LEVELS
    if written_ptr is not None:
        data_first, known = find_live(written_ptr, known)
        data_slots = known
    flags = dones, masks, ids, agents
    data = data_first, data_slots, data_inner
    stream = carried, known, (carry_first, carry_slots, carry_inner), carry_slots * envs, data
    lane = tl.arange(0, LANES)[None, :]
    block = tl.program_id(0) * (TILE // LANES) + tl.arange(0, TILE // LANES)[:, None]

    limit, counted = n_steps, ()
    if SAMPLED:
        exists = block < emitted
        env, slot, begin, live = find_sampled(block, exists, indices, others, envs, known, data_first, DRAWN)
        if index_ptr is not None:
            store_index(index_ptr, block, slot, env, others, exists, DIMS)
        if len(limits) > 0:
            limit = tl.minimum(tl.load(limits[0] + block, mask=exists, other=1), n_steps).to(tl.int32)
        if count_ptr is not None:
            counted = read_total(count_ptr, env, begin, live, known, end_slots, agents, data, DATA)
        rows, place = emitted, block + lane * 0
        written = exists & (lane == 0)
    else:
        length = LANES + 1 - tl.minimum(n_steps, 1 << PIECE)
        if TIME_MAJOR:
            env, begin = block % envs, block // envs * length
        else:
            env, begin = block // blocks, block % blocks * length
        live = (env < envs) & (begin < emitted)
        rows = envs * emitted
        place = env * emitted + begin + lane
        written = live & (lane < length) & (begin + lane < emitted)

    frame, row, end, boundary = find_windows(env, begin, lane, live, limit, flags, stream, counted, LEVELS, LONG, DATA)
    steps = count_steps(env, frame, lane, end, live, limit, n_steps, flags, stream, counted, LEVELS, PIECE, LONG, DATA)
    end_row = row_of_frame(env, frame + steps - 1, stream, DATA)
    if SAMPLED:
        # A sample of no frame gets 0 steps, discount 1, NaN as its return, and zeros for all else.
        steps = tl.where(live, steps, 0)
        boundary |= ~live
        row = tl.where(live, row, -1)
        end_row = tl.where(live, end_row, -1)
    tl.store(steps_ptr + place, steps.to(tl.int64), mask=written)
    tl.store(discount_ptr + place, tl.load(powers_ptr + steps).to(tl.float32), mask=written)
    tl.store(nonterminal_ptr + place, ~boundary, mask=written)
    for k in tl.static_range(len(rewards)):
        store_returns(
            rewards[k], returns[k], place, written, live, env, frame, row, end, steps, limit, n_steps, flags,
            powers_ptr, stream, counted, WIDTHS[k], LEVELS, PIECE, LONG, DATA,
        )  # fmt: skip
    if ROWS:
        tl.store(rows_ptr + place, row, mask=written)
        tl.store(rows_ptr + rows + held_rows + place, end_row, mask=written)
        if count_ptr is not None:
            after = find_following(env, lane, frame + steps - 1, live, known, counted, envs, agents, data, DATA)
            tl.store(rows_ptr + 2 * rows + held_rows + block, after, mask=exists)
        # Of 2**32 lanes and more, which wrap around, some list the same rows once more.
        if (tl.program_id(0) * TILE).to(tl.uint32) < held_rows:
            list_held(rows_ptr + rows, held_rows, envs, held_inner, stream, DATA, TILE)


def shape_blocks(n_steps: int, emitted: int, sampled: bool) -> tuple[int, int, int]:
    """Returns LEVELS and PIECE for windows of ``n_steps`` frames, and the blocks of ``emitted`` consecutive windows."""
    # A block has lanes for its last window's frames, too: two pieces in all, unless one piece holds every window.
    piece = min((n_steps - 1).bit_length(), MOST_PIECE)
    longest = min(n_steps, 1 << piece)
    levels = piece if sampled or emitted <= (1 << piece) - longest + 1 else piece + 1
    return levels, piece, max(-(-emitted // ((1 << levels) - longest + 1)), 1)
