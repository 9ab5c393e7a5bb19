"""Reads the text of a kernel in PTX, as Triton writes it: instructions, their operands, labels and parameters.

One kernel per text, no functions beside it. Imports nothing but ``Fault``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ptx_numbers import Fault

SHARED = "global_smem"
DECLARED = re.compile(r"\.reg\s+\.(pred|[bsuf]\d+)\s+(.*)")
PARAMETER = re.compile(r"\.param\s+\.(\w+)(?:\s+\.ptr[^,\n]*?)?\s+([\w$]+)\s*(?=,|\n|\))")
INSTRUCTION = re.compile(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]")


@dataclass(frozen=True, slots=True)
class Register:
    """Where in the machine a register is kept, and its width; a predicate has 1 bit."""

    name: str
    slot: int
    bits: int


@dataclass(frozen=True, slots=True)
class Immediate:
    """A constant: bits that are as wide as whoever reads them wants, unless ``bits`` says how wide."""

    value: int
    bits: int | None = None


@dataclass(frozen=True, slots=True)
class Name:
    """What is no register and no constant: ``%tid.x``, a label, a parameter, the shared memory, or ``_``."""

    name: str


@dataclass(frozen=True, slots=True)
class Group:
    """Operands in braces, or the two of ``p|q``."""

    operands: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Address:
    base: Operand
    offset: int


Operand = Register | Immediate | Name | Group | Address


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction: run by the threads for which ``predicate`` is true, or false if it is ``negated``."""

    opcode: str
    operands: tuple[Operand, ...]
    predicate: Register | None
    negated: bool
    text: str


@dataclass
class Kernel:
    """The text of a kernel, parsed.

    Attributes:
        parameters: The types by name, in the order of the arguments.
        threads: Of a program.
        labels: Which instruction follows a label.
        registers: How many slots its registers take.
    """

    name: str
    parameters: dict[str, str]
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: int = 0


def parse(text: str) -> Kernel:
    """Reads the PTX of one kernel."""
    head, body = re.sub(r"//[^\n]*", "", text).split("\n{", 1)
    if ".func" in head:
        raise Fault("functions are unknown")
    name = re.search(r"\.entry\s+([\w$]+)", head)
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)(?:, 1, 1)?\s*$", head, re.M)
    if not name or not threads:
        raise Fault("a kernel needs a name and a number of threads in one dimension")
    parameters = {each: kind for kind, each in PARAMETER.findall(head)}
    kernel = Kernel(name.group(1), parameters, int(threads.group(1)))
    body = body.split(".section")[0]
    reader = _Reader(kernel)
    for statement in re.split(r"[;\n]", body[: body.rindex("}")]):
        # A block of its own, for what is written as assembly, opens before its first statement.
        reader.read(statement.strip().lstrip("{}").strip())
    kernel.registers = len(reader.slots)
    return kernel


class _Reader:
    """Reads one statement after the other."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.bits: dict[str, int] = {}
        self.slots: dict[tuple[str, int], int] = {}

    def read(self, statement: str) -> None:
        if label := re.fullmatch(r"(\$?[\w$]+):", statement):
            self.kernel.labels[label.group(1)] = len(self.kernel.instructions)
        elif declared := DECLARED.match(statement):
            self.declare(*declared.groups())
        elif statement and not statement.startswith("."):
            self.kernel.instructions.append(self.instruction(statement))

    def declare(self, kind: str, names: str) -> None:
        """``.reg .b32 %r<9>`` declares ``%r0`` to ``%r8``."""
        bits = 1 if kind == "pred" else int(kind[1:])
        for name in names.replace(" ", "").split(","):
            several = re.fullmatch(r"([%\w]+)<(\d+)>", name)
            for each in [f"{several.group(1)}{k}" for k in range(int(several.group(2)))] if several else [name]:
                self.bits[each] = bits

    def instruction(self, statement: str) -> Instruction:
        found = INSTRUCTION.fullmatch(statement)
        if not found:
            raise Fault(f"cannot read: {statement}")
        negated, predicate, opcode, rest = found.groups()
        operands = tuple(self.operand(each.strip()) for each in OPERAND.findall(rest))
        register = self.operand(predicate) if predicate else None
        if predicate and not (isinstance(register, Register) and register.bits == 1):
            raise Fault(f"the predicate is no predicate: {statement}")
        return Instruction(opcode, operands, register, bool(negated), statement)

    def operand(self, text: str) -> Operand:
        if text in self.bits:
            bits = self.bits[text]
            return Register(text, self.slots.setdefault((text, bits), len(self.slots)), bits)
        if text.startswith("{"):
            return Group(tuple(self.operand(each.strip()) for each in text.strip("{}").split(",")))
        if found := ADDRESS.fullmatch(text):
            return Address(self.operand(found.group(1)), int(found.group(2) or "0", 0))
        if "|" in text:
            return Group(tuple(self.operand(each.strip()) for each in text.split("|")))
        if found := re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", text):
            return Immediate(int(found.group(2), 16), 32 if found.group(1) == "f" else 64)
        if re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.fullmatch(r"[%$]?[\w$.]+", text):
            return Name(text)
        raise Fault(f"cannot read: {text}")
