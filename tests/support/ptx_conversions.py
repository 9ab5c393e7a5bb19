"""Conversions between the types of PTX, ``cvt``: roundings, saturation, what becomes of NaN. Imports numpy alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ptx_numbers import SIGNED, UNSIGNED, Array, Fault, Kind, as_double, flush

ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


@dataclass(frozen=True)
class Resolved:
    """What an opcode computes, and on which kinds."""

    compute: Callable[..., Array]
    sources: tuple[Kind, ...]
    result: Kind


def resolve_conversion(modifiers: list[str], to: Kind | None, of: Kind) -> Resolved:
    """``cvt``: from one type to another, or of two float32 to a pair of 16-bit floats, the first one its upper half."""
    rounding = {each for each in modifiers if each not in ("ftz", "sat")}
    integral = len(rounding) == 1 and rounding <= ROUNDINGS.keys()
    if to is None or not {to.letters, of.letters} <= {"s", "u", "f", "bf"} or not (integral or rounding <= {"rn"}):
        raise Fault("unknown instruction")
    if to.packed > 1:
        if of != Kind("f", 32) or modifiers != ["rn"]:
            raise Fault("unknown instruction")
        return Resolved(lambda high, low: np.stack(np.broadcast_arrays(low, high), -1), (of, of), to)
    if integral != (of.is_float and (not to.is_float or (integral and of == to))):
        raise Fault("unknown instruction")

    def convert(numbers: Array) -> Array:
        if "ftz" in modifiers and of.bits == 32:
            numbers = flush(numbers)
        if integral:
            numbers = ROUNDINGS[next(iter(rounding))](numbers)
        if to.is_float:
            converted = _to_float(numbers, to)
            if "sat" in modifiers:
                converted = np.where(np.isnan(converted), 0, np.clip(converted, 0, 1)).astype(converted.dtype)
            return flush(converted) if "ftz" in modifiers and to.bits == 32 else converted
        if of.is_float:
            return _to_integer(numbers, of, to)
        return _saturated(numbers, to) if "sat" in modifiers else _wrapped(numbers, to)

    return Resolved(convert, (of,), to)


def _to_float(numbers: Array, to: Kind) -> Array:
    """In a dtype that the kind's rounding starts from; numpy itself rounds to float32 and float64 once."""
    if to.bits > 16:
        return numbers.astype(np.float32 if to.bits == 32 else np.float64)
    return numbers if numbers.dtype.kind == "f" else as_double(numbers)


def _to_integer(numbers: Array, of: Kind, to: Kind) -> Array:
    """The nearest that the type has; NaN is 0, or 1 and zeros if either side has 64 bits."""
    limits = np.iinfo((SIGNED if to.letters == "s" else UNSIGNED)[to.bits])
    nan = 1 << to.bits - 1 if 64 in (of.bits, to.bits) else 0
    # The largest number may round up to one that the type has not; it is put in afterwards.
    above, below = numbers >= float(limits.max), numbers <= float(limits.min)
    inside = np.where(above | below | np.isnan(numbers), 0, numbers).astype(limits.dtype)
    out = np.where(above, limits.dtype.type(limits.max), np.where(below, limits.dtype.type(limits.min), inside))
    return np.where(np.isnan(numbers), np.array(nan, UNSIGNED[to.bits]).view(limits.dtype), out)


def _saturated(numbers: Array, to: Kind) -> Array:
    limits, own = np.iinfo((SIGNED if to.letters == "s" else UNSIGNED)[to.bits]), np.iinfo(numbers.dtype)
    low, high = max(limits.min, own.min), min(limits.max, own.max)
    return _wrapped(np.clip(numbers, numbers.dtype.type(low), numbers.dtype.type(high)), to)


def _wrapped(numbers: Array, to: Kind) -> Array:
    return numbers.astype((SIGNED if to.letters == "s" else UNSIGNED)[to.bits])
