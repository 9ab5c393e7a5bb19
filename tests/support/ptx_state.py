"""Registers and memory of programs that are executed together, and how operands are read from and written to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from ptx_costs import WARP, Counter
from ptx_numbers import SIGNED, UNSIGNED, Array, Fault
from ptx_text import SHARED, Immediate, Instruction, Kernel, Name, Operand, Register

# What is in a register before anything is.
POISON = 0xDEADDEADDEADDEAD
POISONED_BYTE = 0xA5
Read = Callable[["State"], Array]
Write = Callable[["State", Array], None]


class State:
    """Programs that are executed together.

    Attributes:
        programs: Their numbers, a column.
        at: The instruction to begin with.
        registers: By slot, arrays of programs by threads, either of which may be 1; None before they are written.
        shared: A row of bytes per program.
        parted: The programs that have jumped just now, while the others have not.
    """

    def __init__(
        self,
        kernel: Kernel,
        programs: Array,
        grid: tuple[int, int, int],
        arguments: Sequence[float],
        shared_bytes: int,
        check: Callable[[Array, int], None] | None,
        counter: Counter | None,
    ) -> None:
        self.threads, self.programs, self.grid, self.arguments = kernel.threads, programs, grid, arguments
        self.check, self.counter, self.shared_bytes = check, counter, shared_bytes
        self.registers: list[Array | None] = [None] * kernel.registers
        self.at = 0
        self._shared: Array | None = None
        self.parted: State | None = None

    @property
    def shared(self) -> Array:
        if self._shared is None:
            self._shared = np.full((len(self.programs), self.shared_bytes), POISONED_BYTE, np.uint8)
        return self._shared

    def mask(self, instruction: Instruction) -> Array:
        """Which threads execute a predicated instruction."""
        mask = self.registers[instruction.predicate.slot]
        if mask is None:
            raise Fault(f"{instruction.predicate.name} is read before it is written")
        return ~mask if instruction.negated else mask

    def part(self, which: Array, at: int) -> None:
        """Parts programs from the others, to be executed from another instruction on."""
        other = object.__new__(State)
        other.__dict__.update(self.__dict__)
        other._keep(which)
        other.at, other.parted = at, None
        self._keep(~which)
        self.parted = other

    def _keep(self, which: Array) -> None:
        several = len(self.programs) > 1
        self.registers = [
            each[which] if each is not None and several and len(each) > 1 else each for each in self.registers
        ]
        if self._shared is not None:
            self._shared = self._shared[which]
        self.programs = self.programs[which]


def _special(name: str) -> Read | None:
    """Registers that the hardware sets."""
    if name == "_":
        return None
    axis = "xyz".find(name[-1])
    if name == "%laneid":
        return lambda state: np.arange(state.threads, dtype=np.uint32)[None] % np.uint32(WARP)
    if name.startswith("%tid."):
        return lambda state: np.arange(state.threads if axis == 0 else 1, dtype=np.uint32)[None]
    if name.startswith("%ntid."):
        return lambda state: np.full((1, 1), state.threads if axis == 0 else 1, np.uint32)
    if name.startswith("%nctaid."):
        return lambda state: np.full((1, 1), state.grid[axis], np.uint32)
    if name.startswith("%ctaid."):

        def number(state: State) -> Array:
            below = np.uint32(np.prod(state.grid[:axis], dtype=np.int64))
            return state.programs // below % np.uint32(state.grid[axis])

        return number
    if name == SHARED:
        return lambda state: np.zeros((1, 1), np.uint32)
    return None


def reader(kernel: Kernel, operand: Operand, bits: int, lax: bool = False) -> Read:
    """Reads the low bits of an operand; of a register that nobody wrote, it is ``lax`` to read some."""
    if isinstance(operand, Register):
        if operand.bits < bits or (operand.bits == 1) != (bits == 1):
            raise Fault(f"{operand.name} has other than {bits} bits")
        slot, name = operand.slot, operand.name
        narrow = None if operand.bits == bits else UNSIGNED[bits]

        def read(state: State) -> Array:
            value = state.registers[slot]
            if value is None:
                if not lax:
                    raise Fault(f"{name} is read before it is written")
                value = np.full((1, 1), POISON & (1 << operand.bits) - 1, UNSIGNED[operand.bits])
            return value if narrow is None else value.astype(narrow)

        return read
    if isinstance(operand, Immediate):
        if operand.bits not in (None, bits):
            raise Fault(f"a constant has other than {bits} bits")
        value = np.full((1, 1), operand.value != 0) if bits == 1 else _constant(operand.value, bits)
        return lambda state: value
    special = _special(operand.name) if isinstance(operand, Name) else None
    if special is None or bits == 1:
        raise Fault("unknown operand")
    return special if bits == 32 else lambda state: special(state).astype(UNSIGNED[bits])


def _constant(value: int, bits: int) -> Array:
    return np.full((1, 1), value & (1 << bits) - 1, UNSIGNED[bits])


def writer(operand: Operand, bits: int, instruction: Instruction, signed: bool = False) -> Write:
    """Writes bits to a register, extended where it is wider, by the threads for which the predicate holds."""
    if isinstance(operand, Name) and operand.name == "_":
        return lambda state, value: None
    if not isinstance(operand, Register) or operand.bits < bits or (operand.bits == 1) != (bits == 1):
        raise Fault("unknown operand")
    slot, own, predicate = operand.slot, operand.bits, instruction.predicate

    def write(state: State, value: Array) -> None:
        if value.dtype != np.bool_ and value.itemsize * 8 < own:
            value = (value.view(SIGNED[value.itemsize * 8]) if signed else value).astype(UNSIGNED[own])
        if predicate is not None:
            old = state.registers[slot]
            if old is None:
                old = np.zeros((1, 1), bool) if own == 1 else _constant(POISON, own)
            value = np.where(state.mask(instruction), value, old)
        state.registers[slot] = value

    return write
