"""What the 32 threads of a warp do together: shuffles, reductions, votes, matrices to and from shared memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ptx_costs import WARP
from ptx_numbers import Array, Fault, parse_kind
from ptx_state import Read, State, reader, writer
from ptx_text import Address, Group, Instruction, Kernel

Step = Callable[[State], None]
LANE = np.arange(WARP)
EVERYONE = np.uint32((1 << WARP) - 1)


def _of_warps(state: State, value: Array) -> Array:
    """Programs, warps, threads of a warp."""
    return np.broadcast_to(value, (len(state.programs), state.threads)).reshape(len(state.programs), -1, WARP)


def _to_threads(value: Array) -> Array:
    return value.reshape(len(value), -1)


def _all_of_them(instruction: Instruction) -> None:
    if instruction.predicate is not None:
        raise Fault("some threads of a warp stay away")


def _bind_shuffle(kernel: Kernel, instruction: Instruction) -> Step:
    """``shfl.sync``: a value of another thread, or a thread's own where that is outside of its segment."""
    _all_of_them(instruction)
    _, *how = instruction.opcode.split(".")
    if len(how) != 3 or how[0] != "sync" or how[1] not in ("idx", "bfly", "up", "down") or how[2] != "b32":
        raise Fault("unknown instruction")
    to, *operands = instruction.operands
    to, found = to.operands if isinstance(to, Group) else (to, None)
    reads = [reader(kernel, each, 32) for each in operands]
    write = writer(to, 32, instruction)
    write_found = writer(found, 1, instruction) if found else None

    def step(state: State) -> None:
        value, by, clamp, members = (_of_warps(state, read(state)) for read in reads)
        if (members != EVERYONE).any():
            raise Fault("some threads of a warp stay away")
        by, clamp = (by & np.uint32(31)).astype(np.int64), clamp.astype(np.int64)
        segment = clamp >> 8 & 31
        most, least = LANE & segment | clamp & 31 & ~segment, LANE & segment
        source = {"idx": least | by & ~segment, "bfly": LANE ^ by, "up": LANE - by, "down": LANE + by}[how[1]]
        inside = source >= most if how[1] == "up" else source <= most
        shuffled = np.take_along_axis(value, np.where(inside, source, LANE), 2)
        write(state, _to_threads(shuffled))
        if write_found:
            write_found(state, _to_threads(inside))

    return step


REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
              "xor": np.bitwise_xor}  # fmt: skip


def _bind_reduction(kernel: Kernel, instruction: Instruction) -> Step:
    """``redux.sync``: over the threads of a warp that a mask of bits names."""
    _all_of_them(instruction)
    _, *how = instruction.opcode.split(".")
    kind = parse_kind(how[-1])
    of_32_bits = kind is not None and kind.bits == 32 and not kind.is_float
    if len(how) != 3 or how[0] != "sync" or how[1] not in REDUCTIONS or not of_32_bits:
        raise Fault("unknown instruction")
    to, value, members = instruction.operands
    read, read_members, write = reader(kernel, value, 32), reader(kernel, members, 32), writer(to, 32, instruction)
    reduce = REDUCTIONS[how[1]]

    def step(state: State) -> None:
        numbers, masks = kind.decode(_of_warps(state, read(state))), _of_warps(state, read_members(state))
        out = np.empty_like(numbers)
        for mask in np.unique(masks):
            group = mask >> LANE.astype(np.uint32) & np.uint32(1) != 0
            if (((masks == mask) != group) & (masks == mask)).any():
                raise Fault("a thread is not in its own group")
            reduced = reduce.reduce(numbers[..., group], -1, keepdims=True, dtype=numbers.dtype)
            out = np.where(masks == mask, reduced, out)
        write(state, kind.encode(_to_threads(out)))

    return step


def _bind_vote(kernel: Kernel, instruction: Instruction) -> Step:
    """``vote.sync``: the threads of a warp for which a predicate holds."""
    _all_of_them(instruction)
    how = instruction.opcode.removeprefix("vote.sync.")
    if how not in ("ballot.b32", "any.pred", "all.pred"):
        raise Fault("unknown instruction")
    to, predicate, members = instruction.operands
    read, read_members = reader(kernel, predicate, 1), reader(kernel, members, 32)
    write = writer(to, 32 if how == "ballot.b32" else 1, instruction)

    def step(state: State) -> None:
        votes = _of_warps(state, read(state))
        if (read_members(state) != EVERYONE).any():
            raise Fault("some threads of a warp stay away")
        if how == "ballot.b32":
            out = (votes.astype(np.uint32) << LANE.astype(np.uint32)).sum(-1, keepdims=True, dtype=np.uint32)
        else:
            out = (votes.any if how == "any.pred" else votes.all)(-1, keepdims=True)
        write(state, _to_threads(np.broadcast_to(out, votes.shape)))

    return step


def _bind_active(kernel: Kernel, instruction: Instruction) -> Step:
    """``activemask``: all, as threads that part ways are a fault."""
    _all_of_them(instruction)
    if instruction.opcode != "activemask.b32":
        raise Fault("unknown instruction")
    write = writer(instruction.operands[0], 32, instruction)
    return lambda state: write(state, np.full((1, 1), EVERYONE))


def _bind_matrix(kernel: Kernel, instruction: Instruction) -> Step:
    """``ldmatrix``, ``stmatrix``: matrices of 8 rows of 8 items of 16 bits.

    The address of row r of matrix m is that of thread 8 m + r of the warp. Thread t holds items 2 (t % 4) and the next
    of row t // 4; of column t // 4 if the matrix is transposed.
    """
    _all_of_them(instruction)
    name, *how = instruction.opcode.split(".")
    counts = {"x1": 1, "x2": 2, "x4": 4}
    known = ["sync", "aligned", "m8n8", how[3] if len(how) > 3 else "", *(["trans"] if "trans" in how else [])]
    space = "shared::cta" if "shared::cta" in how else "shared"
    if how != [*known, space, "b16"] or how[3] not in counts:
        raise Fault("unknown instruction")
    where, values = instruction.operands if name == "stmatrix" else instruction.operands[::-1]
    parts = values.operands if isinstance(values, Group) else (values,)
    if not isinstance(where, Address) or len(parts) != counts[how[3]]:
        raise Fault("unknown instruction")
    base = reader(kernel, where.base, 32)
    offset = np.uint32(where.offset & (1 << 32) - 1)
    transposed = "trans" in how
    ends: list = [(reader if name == "stmatrix" else _into(instruction))(kernel, each, 32) for each in parts]

    def items(state: State, matrix: int) -> tuple[Array, Array]:
        """Where each thread's two items are in shared memory, in units of 16 bits."""
        address = _of_warps(state, base(state) + offset)[:, :, 8 * matrix : 8 * matrix + 8].astype(np.int64)
        if (address % 16).any():
            raise Fault("misaligned row of a matrix")
        if (address + 16 > state.shared_bytes).any():
            raise Fault("access outside of shared memory")
        row, column = LANE[:, None] // 4, 2 * (LANE[:, None] % 4) + np.arange(2)
        row, column = np.broadcast_arrays(*((column, row) if transposed else (row, column)))
        index = address[:, :, row] // 2 + column
        return np.arange(len(index))[:, None, None, None], index

    def step(state: State) -> None:
        view = state.shared.view(np.uint16)
        for matrix, end in enumerate(ends):
            rows, index = items(state, matrix)
            if name == "stmatrix":
                bits = np.ascontiguousarray(_of_warps(state, end(state)))
                view[rows, index] = bits[..., None].view(np.uint16)
            else:
                end(state, _to_threads(np.ascontiguousarray(view[rows, index]).view(np.uint32)[..., 0]))

    return step


def _into(instruction: Instruction) -> Callable[..., Read]:
    return lambda kernel, operand, bits: writer(operand, bits, instruction)


BINDERS = {
    "shfl": _bind_shuffle,
    "redux": _bind_reduction,
    "vote": _bind_vote,
    "activemask": _bind_active,
    "stmatrix": _bind_matrix,
    "ldmatrix": _bind_matrix,
}
