"""Loads and stores: parameters, global memory, shared memory.

Global memory is that of this process. Addresses are checked before they are touched.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np
from ptx_costs import WARP
from ptx_numbers import FLOAT, UNSIGNED, Array, Fault, Kind, parse_kind
from ptx_state import Read, State, reader, writer
from ptx_text import Address, Group, Instruction, Kernel, Name, Operand

SPACES = ("param", "global", "shared", "shared::cta")
# Hints for caches, and how an access is ordered among those of other threads, which go in step here.
HINTS = re.compile(r"nc|volatile|weak|relaxed|ca|cg|cs|cv|wb|wt|L[12]::\w+")
# Addresses of user space on x86-64 and arm64; the first page is never mapped.
FIRST, LAST = 1 << 12, 1 << 48


class _Everything:
    """All of memory, as numpy may index it."""

    def __init__(self, bits: int) -> None:
        self.__array_interface__ = {
            "data": (FIRST, False),
            "shape": ((LAST - FIRST) * 8 // bits,),
            "typestr": f"<u{bits // 8}",
            "version": 3,
        }


@functools.cache
def _memory(bits: int) -> Array:
    return np.asarray(_Everything(bits))


def bind(kernel: Kernel, instruction: Instruction) -> Callable[[State], None]:
    name, *modifiers = instruction.opcode.split(".")
    kind = parse_kind(modifiers[-1]) if modifiers else None
    space = next((each for each in modifiers if each in SPACES), None)
    vector = next((int(each[1:]) for each in modifiers if re.fullmatch(r"v[248]", each)), 1)
    others = [each for each in modifiers[:-1] if each != space and each != f"v{vector}"]
    if kind is None or space is None or kind.packed > 1 or not all(map(HINTS.fullmatch, others)):
        raise Fault("unknown instruction")
    where, values = instruction.operands[:2] if name == "st" else instruction.operands[1::-1]
    parts = values.operands if isinstance(values, Group) else (values,)
    if not isinstance(where, Address) or len(parts) != vector:
        raise Fault("unknown instruction")
    if space == "param":
        if name != "ld" or vector > 1:
            raise Fault("unknown instruction")
        return _bind_parameter(kernel, instruction, kind, where, parts[0])
    access = _Global if space == "global" else _Shared
    bound = access(kernel, instruction, kind, where, parts)
    return bound.load if name == "ld" else bound.store


def _bind_parameter(
    kernel: Kernel, instruction: Instruction, kind: Kind, where: Address, to: Operand
) -> Callable[[State], None]:
    if not isinstance(where.base, Name) or where.base.name not in kernel.parameters or where.offset:
        raise Fault("unknown instruction")
    index, declared = list(kernel.parameters).index(where.base.name), kernel.parameters[where.base.name]
    write = writer(to, kind.bits, instruction, kind.letters == "s")

    def step(state: State) -> None:
        value = state.arguments[index]
        if declared in ("f32", "f64"):
            width = int(declared[1:])
            bits = np.array([[value]], FLOAT[width]).view(UNSIGNED[width])
        else:
            bits = np.array([[int(value) & (1 << 64) - 1]], np.uint64)
        write(state, bits.astype(UNSIGNED[kind.bits]))

    return step


class _Access:
    """A load or store of one or several parts per thread, which lie one after the other."""

    space_bits: int

    def __init__(
        self, kernel: Kernel, instruction: Instruction, kind: Kind, where: Address, parts: tuple[Operand, ...]
    ) -> None:
        self.instruction, self.bits, self.parts = instruction, kind.bits, len(parts)
        self.item, self.size = kind.bits // 8, kind.bits // 8 * len(parts)
        self.base = reader(kernel, where.base, self.space_bits)
        self.offset = UNSIGNED[self.space_bits](where.offset & (1 << self.space_bits) - 1)
        if instruction.opcode.startswith("ld"):
            self.writes = [writer(each, kind.bits, instruction, kind.letters == "s") for each in parts]
        else:
            self.reads: list[Read] = [reader(kernel, each, kind.bits) for each in parts]

    def addresses(self, state: State) -> tuple[Array, Array | None]:
        """One for all threads if they have the same, else as many as they have; and which of them are accessed."""
        address = self.base(state) + self.offset
        on = None
        if self.instruction.predicate is not None:
            mask = state.mask(self.instruction)
            if not mask.all():
                address, on = np.broadcast_arrays(address, mask)
        return address, on

    def aligned(self, active: Array) -> None:
        if (active & active.dtype.type(self.size - 1)).any():
            raise Fault(f"misaligned access of {self.size} bytes")

    def give(self, state: State, loaded: Array, on: Array | None) -> None:
        """Writes what was loaded, its last dimension the parts, to the registers."""
        for k, write in enumerate(self.writes):
            if on is None:
                bits = loaded[..., k]
            else:
                bits = np.zeros(on.shape, loaded.dtype)
                bits[on] = loaded[..., k]
            write(state, bits)

    def take(self, state: State, shape: tuple[int, ...], on: Array | None) -> Array:
        """What is to be stored, its last dimension the parts."""
        values = [np.broadcast_to(read(state), shape) for read in self.reads]
        return np.stack(values if on is None else [each[on] for each in values], -1)

    def whole(self, state: State, address: Array, on: Array | None) -> tuple[Array, Array]:
        """Of all threads."""
        shape = (len(state.programs), state.threads)
        if on is None:
            on = state.mask(self.instruction) if self.instruction.predicate is not None else np.ones((1, 1), bool)
        return np.broadcast_to(address, shape), np.broadcast_to(on, shape)


class _Global(_Access):
    space_bits = 64

    def index(self, state: State, what: str, address: Array, on: Array | None) -> Array:
        """Where in memory as an array each part is, after all checks."""
        active = address if on is None else address[on]
        if state.counter is not None:
            state.counter.count(what, *self.whole(state, address, on), self.size)
        self.aligned(active)
        if state.check is not None and active.size:
            state.check(active, self.size)
        first = (active.astype(np.int64) - FIRST) // self.item
        return first[..., None] + np.arange(self.parts)

    def load(self, state: State) -> None:
        address, on = self.addresses(state)
        index = self.index(state, "load", address, on)
        self.give(state, _memory(self.bits)[index], on)

    def store(self, state: State) -> None:
        address, on = self.addresses(state)
        shape = np.broadcast_shapes(address.shape, *(read(state).shape for read in self.reads))
        address = np.broadcast_to(address, shape)
        on = None if on is None else np.broadcast_to(on, shape)
        index = self.index(state, "store", address, on)
        _memory(self.bits)[index] = self.take(state, shape, on)


class _Shared(_Access):
    space_bits = 32

    def index(self, state: State) -> tuple[Array, Array, Array]:
        """Which threads access it, and the programs' rows and the columns that they access."""
        address, on = self.whole(state, *self.addresses(state))
        active = address[on]
        self.aligned(active)
        if active.size and int(active.max()) + self.size > state.shared_bytes:
            raise Fault(f"access outside of shared memory, at {int(active.max())}")
        if state.counter is not None:
            state.counter.counts.shared_requests += int(on.reshape(-1, WARP).any(1).sum())
        rows = np.broadcast_to(np.arange(len(on))[:, None], on.shape)[on]
        first = active.astype(np.int64) // self.item
        return on, rows[:, None], first[:, None] + np.arange(self.parts)

    def load(self, state: State) -> None:
        on, rows, index = self.index(state)
        self.give(state, state.shared.view(UNSIGNED[self.bits])[rows, index], on)

    def store(self, state: State) -> None:
        on, rows, index = self.index(state)
        state.shared.view(UNSIGNED[self.bits])[rows, index] = self.take(state, on.shape, on)
