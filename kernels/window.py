"""The window: boundaries, lengths and n-step returns, back from the window's end.

The recursion of the reference, for a tile of frames: it selects at boundaries and never multiplies by a flag.
"""

from __future__ import annotations

import triton
import triton.language as tl

from multistep_triton.kernels.stream import TYPES, frame_addresses, item_pointers


@triton.jit
def load_flag(source, row, frame, live, stream):
    address = frame_addresses(source, row, frame, stream, 1)
    return tl.load(address.to(tl.pointer_type(tl.int8)), mask=live, other=0) != 0


@triton.jit
def load_any(source, row, frame, live, stream):
    """Whether any of some flags that lie alike is set: as far from the first one's address, at those of the others."""
    data, carry, strides, outer = source
    address = frame_addresses((data[0], carry[0], strides, outer), row, frame, stream, 1)
    flag = tl.load(address.to(tl.pointer_type(tl.int8)), mask=live, other=0)
    for k in tl.static_range(1, len(data)):
        apart = (data[k] << 2 >> 4) - (data[0] << 2 >> 4)
        if len(stream[4]) == 0:
            apart = tl.where(frame < stream[0], (carry[k] << 2 >> 4) - (carry[0] << 2 >> 4), apart)
        flag |= tl.load((address + apart).to(tl.pointer_type(tl.int8)), mask=live, other=0)
    return flag != 0


@triton.jit
def load_reward(pointers, mask):
    """What lies there; bfloat16 as float32, by its bits, as the interpreter cannot convert subnormals."""
    if pointers.dtype.element_ty == tl.bfloat16:
        bits = tl.load(pointers.to(tl.pointer_type(tl.int16), bitcast=True), mask=mask, other=0)
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(pointers, mask=mask, other=0)


@triton.jit
def step_back(
    steps, returns, valid, traj, i, tile, stream, flags, reward, item, n, gamma,
    ENDS: tl.constexpr, TYPE: tl.constexpr, ITEM_BYTES: tl.constexpr, D: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """From the windows that begin at frame ``t + i + 1`` to those that begin at ``t + i``.

    A window ends at a boundary: a frame that is done by any flag, or invalid, or followed by an invalid one or by one
    of another trajectory. ENDS holds what there is: in how many ways done flags lie, whether a mask, and the type of
    trajectory ids, -1 for none; and how many steps a loop takes in a turn.
    """
    row, frame, live, _, _ = tile
    known = stream[1]
    here = frame + i
    live &= here < known
    DONES: tl.constexpr = ENDS[0]
    MASK: tl.constexpr = ENDS[1]
    TRAJ: tl.constexpr = ENDS[2]
    ends = (here + 1 >= known) | (i + 1 >= n)
    for k in tl.static_range(DONES):
        ends |= load_any(flags[k], row, here, live, stream)
    if MASK:
        followed = valid
        valid = load_flag(flags[DONES], row, here, live, stream)
        ends |= ~(valid & followed)
    if TRAJ >= 0:
        following = traj
        address = frame_addresses(flags[DONES + MASK], row, here, stream, TYPES[TRAJ].primitive_bitwidth // 8)
        traj = tl.load(address.to(tl.pointer_type(TYPES[TRAJ])), mask=live, other=0)
        ends |= traj != following
    steps = tl.where(ends, 1, steps + 1)
    if TYPE is not None:
        pointers = item_pointers(reward, row, here, item, stream, TYPE, ITEM_BYTES, 1, D, RUN)
        value = load_reward(pointers, live[:, None] & (item < D)[None, :]).to(returns.dtype)
        returns = tl.where(ends[:, None], value, value + gamma * returns)
    return steps, returns, valid, traj


@triton.jit
def window(
    tile, stream, flags, reward, item, n, gamma, UNROLLED: tl.constexpr, ENDS: tl.constexpr,
    TYPE: tl.constexpr, SUM: tl.constexpr, ITEM_BYTES: tl.constexpr, D: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Frames in the windows, int32 [BLOCK_F], and their n-step returns, SUM [BLOCK_F, BLOCK_D], unless TYPE is None.

    Back from the window's end: ``R = r(t + i) + gamma * R``, or ``r(t + i)`` alone where the window ends. A window of
    a tile that has limits is no longer than its own.
    """
    limits = tile[4]
    steps = tl.zeros_like(tile[1])
    returns = tl.zeros([tile[1].shape[0], item.shape[0]], TYPES[SUM])
    valid = tile[2]
    traj = tl.zeros([tile[1].shape[0]], TYPES[ENDS[2]] if ENDS[2] >= 0 else tl.int8)
    if TYPE is not None:
        gamma = gamma.to(TYPES[SUM])
    if UNROLLED > 0:
        for j in tl.static_range(UNROLLED):
            steps, returns, valid, traj = step_back(
                steps, returns, valid, traj, UNROLLED - 1 - j, tile, stream, flags, reward, item,
                limits[0] if len(limits) > 0 else UNROLLED, gamma, ENDS, TYPE, ITEM_BYTES, D, RUN,
            )  # fmt: skip
    else:
        turn: tl.constexpr = ENDS[3]
        i = tl.cdiv(n, turn) * turn
        while i > 0:
            for _ in tl.static_range(turn):
                i -= 1
                steps, returns, valid, traj = step_back(
                    steps, returns, valid, traj, i, tile, stream, flags, reward, item,
                    limits[0] if len(limits) > 0 else n, gamma, ENDS, TYPE, ITEM_BYTES, D, RUN,
                )  # fmt: skip
    return steps, returns


@triton.jit
def window_steps(tile, stream, flags, n, UNROLLED: tl.constexpr, ENDS: tl.constexpr):
    """Frames in the windows, int32 [BLOCK_F]."""
    steps, _ = window(tile, stream, flags, None, tl.arange(0, 1), n, None, UNROLLED, ENDS, None, 0, 0, 0, 0)
    return steps


@triton.jit
def power(gamma, steps, BITS: tl.constexpr):
    """``gamma ** steps`` in float64, by squaring."""
    result = tl.full(steps.shape, 1.0, tl.float64)
    for _ in tl.static_range(BITS):
        result = tl.where((steps & 1) != 0, result * gamma, result)
        steps = steps >> 1
        gamma = gamma * gamma
    return result


@triton.jit
def bfloat16_bits(value):
    """The nearest bfloat16 of a float32, ties to even, as int16; the interpreter's conversion cuts the rest off."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFF + ((bits >> 16) & 1)
    return (tl.where(value == value, rounded, bits | 0x400000) >> 16).to(tl.int16)
