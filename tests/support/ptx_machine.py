"""Executes the PTX of a kernel on the memory of this process, in numpy: all threads of many programs at once.

What it checks is what an interpreter cannot: that optimised code computes the right thing, that every access is aligned
to its width, that every byte touched lies in memory that may be touched. An instruction that it does not know is a
:class:`Fault` that names it, and so is one that a GPU would not execute.

The threads of a program go in step, so a race is not seen, and threads that part ways are a fault. No atomics, no
tensor cores. Imports numpy, and neither torch nor Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import ptx_memory
import ptx_warps
from ptx_costs import WARP, Counter, Counts, machine_instructions
from ptx_instructions import resolve
from ptx_numbers import UNSIGNED, Array, Fault
from ptx_state import State, reader, writer
from ptx_text import Group, Instruction, Kernel, Name

# So many programs go at once, for which numpy's arrays stay in a cache.
AT_ONCE = 512
SHARED_BYTES = 64 << 10
NOTHING = ("bar", "barrier", "fence", "membar")
# Where to go to be through.
END = -1


class Check(Protocol):
    """Raises a fault unless so many bytes from each address on may be read, or written."""

    def __call__(self, addresses: Array, size: int) -> None: ...


class Program:
    """A kernel whose instructions are bound to what executes them, once for all launches."""

    def __init__(self, kernel: Kernel, shared_bytes: int = SHARED_BYTES) -> None:
        self.kernel, self.shared_bytes = kernel, shared_bytes
        self.weights = [machine_instructions(each.opcode) for each in kernel.instructions]
        self.steps: list[Callable[[State], int | None]] = []
        for instruction in kernel.instructions:
            try:
                self.steps.append(_bind(kernel, instruction))
            except Fault as fault:
                # It counts when it is reached: no kernel is refused for what it does not do.
                self.steps.append(partial(_raise, str(fault)))

    def run(
        self,
        arguments: Sequence[float],
        grid: tuple[int, int, int] = (1, 1, 1),
        check: Check | None = None,
        counted: bool = True,
    ) -> Counts:
        """Executes a launch; arguments are numbers, in the order of the parameters."""
        count = grid[0] * grid[1] * grid[2]
        counts = Counts(self.kernel.name, count)
        counter = Counter(counts) if counted else None
        executed = [0] * len(self.steps)
        # Numbers overflow as they do on a GPU, without a word.
        with np.errstate(all="ignore"):
            for begin in range(0, count, AT_ONCE):
                programs = np.arange(begin, min(begin + AT_ONCE, count), dtype=np.uint32)[:, None]
                self._run(State(self.kernel, programs, grid, arguments, self.shared_bytes, check, counter), executed)
        warps = self.kernel.threads // WARP
        counts.warp_instructions = warps * sum(executed)
        counts.machine_instructions = warps * sum(map(float.__mul__, map(float, executed), map(float, self.weights)))
        if counter:
            counter.finish()
        return counts

    def _run(self, state: State, executed: list[int]) -> None:
        waiting = [state]
        while waiting:
            state = waiting.pop()
            count, at = len(state.programs), state.at
            try:
                while True:
                    executed[at] += count
                    to = self.steps[at](state)
                    at = at + 1 if to is None else to
                    if at == END:
                        break
                    if state.parted is not None:
                        # Programs that jump wait until those that do not are through.
                        waiting.append(state.parted)
                        state.parted, count = None, len(state.programs)
            except Fault as fault:
                raise Fault(f"{fault}: {self.kernel.instructions[at].text}") from None
            except IndexError:
                if at < len(self.steps):
                    raise
                raise Fault(f"{self.kernel.name} ends without ret") from None


def _bind(kernel: Kernel, instruction: Instruction) -> Callable[[State], int | None]:
    """What executes an instruction: it changes the state, and returns where to go unless that is to the next one."""
    name = instruction.opcode.split(".")[0]
    if name == "bra":
        if not isinstance(instruction.operands[0], Name) or instruction.operands[0].name not in kernel.labels:
            raise Fault("unknown instruction")
        return partial(_jump, instruction, kernel.labels[instruction.operands[0].name])
    if name == "ret":
        return partial(_jump, instruction, END)
    if name in NOTHING:
        return _nothing
    if name in ("ld", "st"):
        return ptx_memory.bind(kernel, instruction)
    if name in ptx_warps.BINDERS:
        return ptx_warps.BINDERS[name](kernel, instruction)
    if name == "createpolicy":
        # A hint for the cache, handed to loads and stores that take no notice of it.
        return partial(writer(instruction.operands[0], 64, instruction), value=np.zeros((1, 1), np.uint64))
    if name == "mov" and any(isinstance(each, Group) for each in instruction.operands):
        return _bind_parts(kernel, instruction)
    return _bind_computation(kernel, instruction)


def _bind_computation(kernel: Kernel, instruction: Instruction) -> Callable[[State], None]:
    resolved = resolve(instruction.opcode)
    to, *operands = instruction.operands
    if len(operands) != len(resolved.sources):
        raise Fault("unknown instruction")
    # The compiler leaves bytes to be permuted of which it reads none.
    lax = instruction.opcode.startswith("prmt")
    sources = [(reader(kernel, each, kind.bits * kind.packed, lax), kind.decode)
               for each, kind in zip(operands, resolved.sources, strict=True)]  # fmt: skip
    compute, encode = resolved.compute, resolved.result.encode
    if isinstance(to, Group) and resolved.sources[0].packed > 1:
        return _bind_two_predicates(compute, sources, to, instruction)
    write = writer(to, resolved.result.bits * resolved.result.packed, instruction, resolved.result.letters == "s")

    def step(state: State) -> None:
        write(state, encode(compute(*[decode(read(state)) for read, decode in sources])))

    return step


def _bind_two_predicates(
    compute: Callable[..., Array], sources: list, to: Group, instruction: Instruction
) -> Callable[[State], None]:
    writes = [writer(each, 1, instruction) for each in to.operands]

    def step(state: State) -> None:
        both = compute(*[decode(read(state)) for read, decode in sources])
        for k, write in enumerate(writes):
            write(state, both[..., k])

    return step


def _bind_parts(kernel: Kernel, instruction: Instruction) -> Callable[[State], None]:
    """``mov`` from one register to several that are narrower, the lowest bits first, or from several to one."""
    to, of = instruction.operands
    total = resolve(instruction.opcode).result
    parts = (to if isinstance(to, Group) else of).operands
    bits = total.bits // len(parts)
    if bits not in UNSIGNED:
        raise Fault("unknown instruction")
    narrow, wide = UNSIGNED[bits], total.register
    if isinstance(to, Group):
        read = reader(kernel, of, total.bits)
        writes = [writer(each, bits, instruction) for each in parts]

        def split(state: State) -> None:
            value = read(state)
            for k, write in enumerate(writes):
                write(state, (value >> wide(k * bits)).astype(narrow))

        return split
    # The compiler leaves a half that nothing reads.
    reads = [reader(kernel, each, bits, True) for each in parts]
    write = writer(to, total.bits, instruction)

    def join(state: State) -> None:
        value = wide(0)
        for k, read in enumerate(reads):
            value = value | read(state).astype(wide) << wide(k * bits)
        write(state, value)

    return join


def _jump(instruction: Instruction, target: int, state: State) -> int | None:
    if instruction.predicate is None:
        return target
    taken = np.broadcast_to(state.mask(instruction), (len(state.programs), state.threads))
    whole = taken.all(1)
    if (taken.any(1) != whole).any():
        raise Fault("threads of a program part ways")
    if whole.all():
        return target
    if whole.any():
        state.part(whole, target)
    return None


def _nothing(state: State) -> None:
    pass


def _raise(text: str, state: State) -> None:
    raise Fault(text)
