"""What each instruction of PTX computes: a table of small functions on numbers, by the beginning of the opcode.

Loads, stores, shuffles and jumps are not here but in ``ptx_memory.py``, ``ptx_warps.py`` and ``ptx_machine.py``. The
rules are those of NVIDIA's "Parallel Thread Execution ISA". Approximations of a GPU (``div.full``, ``ex2.approx``) are
computed to the last bit; a GPU may be a few units off. Imports numpy alone.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from ptx_conversions import Resolved, resolve_conversion
from ptx_numbers import SIGNED, UNSIGNED, Array, Fault, flush, fused_multiply_add, high_product, parse_kind

INTEGERS, FLOATS, SIGNLESS, PREDICATES = ("s", "u"), ("f", "bf"), ("b",), ("pred",)
NUMBERS = INTEGERS + FLOATS
ANY = NUMBERS + SIGNLESS + PREDICATES


@dataclass(frozen=True)
class Operation:
    """A row of the table.

    Attributes:
        compute: From the operands, read as their kinds, to what is written.
        letters: Of the types for which the row holds.
        sources: The operands' types; ``t`` is the one at the end of the opcode, ``wide`` one of twice as many bits,
            ``bits`` one of as many, of which nothing is read.
        result: The type of what is written, likewise.
        modifiers: Parts of the opcode that may stand between its beginning and its type, and change nothing here.
    """

    compute: Callable[..., Array]
    letters: tuple[str, ...]
    sources: tuple[str, ...] = ("t", "t")
    result: str = "t"
    modifiers: tuple[str, ...] = ()


def _low_product_sum(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


def _wide_product(a: Array, b: Array) -> Array:
    wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[a.itemsize * 16]
    return a.astype(wide) * b.astype(wide)


def _product_of_24_bits(a: Array, b: Array) -> Array:
    def low(number: Array) -> Array:
        return (number << number.dtype.type(8)) >> number.dtype.type(8)

    return low(a) * low(b)


def _quotient(a: Array, b: Array) -> Array:
    """Rounded to zero; all ones where the divisor is 0. The least number, by -1, is itself."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * safe != a) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, ~b.dtype.type(0), quotient.astype(a.dtype))


def _remainder(a: Array, b: Array) -> Array:
    return a - _quotient(a, b) * b


def _smaller(a: Array, b: Array, larger: bool = False) -> Array:
    """The minimum, or maximum; of a number and NaN the number, of zeros -0, or +0."""
    if a.dtype.kind != "f":
        return (np.maximum if larger else np.minimum)(a, b)
    sign = np.signbit(a) & np.signbit(b) if larger else np.signbit(a) | np.signbit(b)
    zero = np.copysign(a.dtype.type(0), np.where(sign, a.dtype.type(-1), a.dtype.type(1)))
    return np.where((a == 0) & (b == 0), zero, (np.fmax if larger else np.fmin)(a, b))


def _or_nan(compute: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def computed(a: Array, b: Array) -> Array:
        return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), compute(a, b))

    return computed


def _shift_left(a: Array, by: Array) -> Array:
    bits = a.itemsize * 8
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a: Array, by: Array) -> Array:
    bits = a.itemsize * 8
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, a.dtype.type(0))


def _funnel(low: Array, high: Array, by: Array, left: bool = False) -> Array:
    """A shift of 64 bits, of which one half is kept; ``by`` wraps."""
    by = (by & np.uint32(31)).astype(np.uint64)
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return ((both << by) >> np.uint64(32) if left else both >> by).astype(np.uint32)


def _extract(a: Array, at: Array, length: Array) -> Array:
    """A field of bits, extended by its sign if it is signed; bits beyond the number are its sign, or 0."""
    bits = a.itemsize * 8
    at, length = (each & np.uint32(0xFF) for each in (at, length))
    shifted = _shift_right(a, at)
    kept = np.uint32(bits) - np.minimum(length, bits)
    return np.where(length == 0, a.dtype.type(0), _shift_right(_shift_left(shifted, kept), kept))


def _insert(a: Array, into: Array, at: Array, length: Array) -> Array:
    at, length = (each & np.uint32(0xFF) for each in (at, length))
    field = _shift_left(~_shift_left(~a.dtype.type(0), length), at)
    return (_shift_left(a, at) & field) | (into & ~field)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Four bytes of eight, each picked by 4 bits of which the highest asks for the byte's sign instead."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.uint32(0)
    for k in range(4):
        code = selector >> np.uint32(4 * k)
        byte = (both >> (code & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint8)
        byte = np.where(code & np.uint32(8), (byte.view(np.int8) >> np.int8(7)).view(np.uint8), byte)
        out = out | byte.astype(np.uint32) << np.uint32(8 * k)
    return out


def _look_up(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any function of three bits, as the table of its eight results."""
    out = np.zeros_like(a)
    for k in range(8):
        met = (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        out = out | np.where(table >> np.uint32(k) & np.uint32(1), met, np.uint32(0))
    return out


def _count_bits(a: Array) -> Array:
    return np.bitwise_count(a).astype(np.uint32)


def _unchanged(a: Array) -> Array:
    return a


def _select(a: Array, b: Array, which: Array) -> Array:
    return np.where(which, a, b)


def _are_numbers(a: Array, b: Array) -> Array:
    return (a == a) & (b == b)


def _differ(a: Array, b: Array) -> Array:
    """False for NaNs, of which numpy says that they differ."""
    return (a != b) & _are_numbers(a, b) if a.dtype.kind == "f" else a != b


def _unordered(compare: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """True for NaNs, too."""
    return lambda a, b: compare(a, b) | ~_are_numbers(a, b)


def _comparisons() -> dict[str, Operation]:
    rows = {"num": (_are_numbers, FLOATS), "nan": (lambda a, b: ~_are_numbers(a, b), FLOATS)}
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        compare = _differ if name == "ne" else getattr(operator, name)
        rows[name] = (compare, NUMBERS + SIGNLESS if name in ("eq", "ne") else NUMBERS)
        rows[f"{name}u"] = (_unordered(compare), FLOATS)
    for name, same in {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}.items():
        rows[name] = (same, ("u",))
    return {f"setp.{name}": Operation(compare, letters, result="pred") for name, (compare, letters) in rows.items()}


ONE, THREE = ("t",), ("t", "t", "t")
FLAGS = ("rn", "ftz")
OPERATIONS: dict[str, Operation] = {
    "add": Operation(np.add, NUMBERS, modifiers=FLAGS),
    "sub": Operation(np.subtract, NUMBERS, modifiers=FLAGS),
    "mul": Operation(np.multiply, FLOATS, modifiers=FLAGS),
    "mul.lo": Operation(np.multiply, INTEGERS),
    "mul.hi": Operation(high_product, INTEGERS),
    "mul.wide": Operation(_wide_product, INTEGERS, result="wide"),
    "mul24.lo": Operation(_product_of_24_bits, INTEGERS),
    "mad.lo": Operation(_low_product_sum, INTEGERS, THREE),
    "mad.hi": Operation(lambda a, b, c: high_product(a, b) + c, INTEGERS, THREE),
    "mad.wide": Operation(lambda a, b, c: _wide_product(a, b) + c, INTEGERS, ("t", "t", "wide"), "wide"),
    "fma": Operation(fused_multiply_add, FLOATS, THREE, modifiers=FLAGS),
    "div": Operation(_quotient, INTEGERS),
    "div.rn": Operation(np.divide, FLOATS, modifiers=("ftz",)),
    "div.full": Operation(np.divide, FLOATS, modifiers=("ftz",)),
    "rem": Operation(_remainder, INTEGERS),
    "abs": Operation(np.abs, ("s", *FLOATS), ONE, modifiers=("ftz",)),
    "neg": Operation(np.negative, ("s", *FLOATS), ONE, modifiers=("ftz",)),
    "min": Operation(_smaller, NUMBERS, modifiers=("ftz",)),
    "max": Operation(functools.partial(_smaller, larger=True), NUMBERS, modifiers=("ftz",)),
    "min.NaN": Operation(_or_nan(_smaller), FLOATS),
    "max.NaN": Operation(_or_nan(functools.partial(_smaller, larger=True)), FLOATS),
    "sqrt": Operation(np.sqrt, FLOATS, ONE, modifiers=("approx", *FLAGS)),
    "rsqrt": Operation(lambda a: 1 / np.sqrt(a), FLOATS, ONE, modifiers=("approx", "ftz")),
    "rcp": Operation(np.reciprocal, FLOATS, ONE, modifiers=("approx", *FLAGS)),
    "ex2": Operation(np.exp2, FLOATS, ONE, modifiers=("approx", "ftz")),
    "lg2": Operation(np.log2, FLOATS, ONE, modifiers=("approx", "ftz")),
    "and": Operation(np.bitwise_and, SIGNLESS + PREDICATES),
    "or": Operation(np.bitwise_or, SIGNLESS + PREDICATES),
    "xor": Operation(np.bitwise_xor, SIGNLESS + PREDICATES),
    "not": Operation(np.invert, SIGNLESS + PREDICATES, ONE),
    "lop3": Operation(_look_up, SIGNLESS, ("t", "t", "t", "u32")),
    "shl": Operation(_shift_left, SIGNLESS, ("t", "u32")),
    "shr": Operation(_shift_right, INTEGERS + SIGNLESS, ("t", "u32")),
    "shf.l.wrap": Operation(functools.partial(_funnel, left=True), SIGNLESS, ("t", "t", "u32")),
    "shf.r.wrap": Operation(_funnel, SIGNLESS, ("t", "t", "u32")),
    "bfe": Operation(_extract, INTEGERS, ("t", "u32", "u32")),
    "bfi": Operation(_insert, SIGNLESS, ("t", "t", "u32", "u32")),
    "popc": Operation(_count_bits, SIGNLESS, ONE, "u32"),
    "prmt": Operation(_permute, SIGNLESS, ("t", "t", "u32")),
    "selp": Operation(_select, NUMBERS + SIGNLESS, ("bits", "bits", "pred"), "bits"),
    "mov": Operation(_unchanged, ANY, ("bits",), "bits"),
    "cvta": Operation(_unchanged, ANY, ONE, modifiers=("to", "global", "shared")),
    **_comparisons(),
}


@functools.cache
def resolve(opcode: str) -> Resolved:
    """What the opcode of an instruction computes; a fault, if any part of it is unknown."""
    name, *rest = opcode.split(".")
    kind = parse_kind(rest[-1]) if rest else None
    if kind is None:
        raise Fault("unknown instruction")
    if name == "cvt" and len(rest) > 1:
        return resolve_conversion(rest[:-2], parse_kind(rest[-2]), kind)
    for depth in range(len(rest) - 1, -1, -1):
        row = OPERATIONS.get(".".join([name, *rest[:depth]]))
        if row is not None:
            break
    else:
        raise Fault("unknown instruction")
    modifiers = rest[depth:-1]
    if kind.letters not in row.letters or not set(modifiers) <= set(row.modifiers):
        raise Fault("unknown instruction")
    bits = kind if kind.letters == "pred" else replace(kind, letters="b")
    kinds = {"t": kind, "wide": replace(kind, bits=2 * kind.bits), "bits": bits}
    *sources, result = (kinds.get(each) or parse_kind(each) for each in (*row.sources, row.result))
    compute = _flushed(row.compute) if "ftz" in modifiers else row.compute
    return Resolved(compute, tuple(sources), result)


def _flushed(compute: Callable[..., Array]) -> Callable[..., Array]:
    return lambda *numbers: flush(compute(*map(flush, numbers)))
