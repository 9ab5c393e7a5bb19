"""Numbers as PTX has them: how the bits of a register are read, and the arithmetic that numpy lacks.

Registers are unsigned arrays of two dimensions, programs by threads, either of which may be 1. Imports numpy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
BFLOAT16_NAN = np.uint16(0x7FFF)
FLOAT16_NAN = np.uint16(0x7FFF)
SMALLEST_NORMAL = np.finfo(np.float32).tiny


class Fault(RuntimeError):
    """What a program must not do, or the machine does not know."""


@dataclass(frozen=True)
class Kind:
    """A type of PTX, such as ``s32``, ``bf16x2`` or ``pred``."""

    letters: str
    bits: int
    packed: int = 1

    @property
    def is_float(self) -> bool:
        return self.letters in ("f", "bf")

    @property
    def register(self) -> type:
        return np.bool_ if self.letters == "pred" else UNSIGNED[self.bits * self.packed]

    def decode(self, bits: Array) -> Array:
        """The numbers that the bits of a register are; those of 16-bit floats come as float32, exactly."""
        if self.packed > 1:
            bits = np.ascontiguousarray(bits)[..., None].view(UNSIGNED[self.bits])
        if self.letters == "s":
            return bits.view(SIGNED[self.bits])
        if self.letters == "bf":
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if self.letters == "f":
            return bits.view(np.float16).astype(np.float32) if self.bits == 16 else bits.view(FLOAT[self.bits])
        return bits

    def encode(self, numbers: Array) -> Array:
        """The bits of numbers, which are rounded to nearest, ties to even, if the kind is a float."""
        if self.letters == "pred":
            return numbers
        if self.letters == "bf":
            bits = round_to_bfloat16(numbers)
        elif self.letters == "f" and self.bits == 16:
            bits = np.where(np.isnan(numbers), FLOAT16_NAN, numbers.astype(np.float16).view(np.uint16))
        elif self.letters == "f":
            bits = numbers.astype(FLOAT[self.bits], copy=False).view(UNSIGNED[self.bits])
        else:
            bits = numbers.view(UNSIGNED[self.bits])
        if self.packed > 1:
            bits = np.ascontiguousarray(bits).view(UNSIGNED[self.bits * self.packed])[..., 0]
        return bits


def parse_kind(name: str) -> Kind | None:
    if name == "pred":
        return Kind("pred", 1)
    packed = 2 if name.endswith("x2") else 1
    letters, digits = name.removesuffix("x2").rstrip("0123456789"), name.removesuffix("x2").lstrip("subf")
    widths = {"s": (8, 16, 32, 64), "u": (8, 16, 32, 64), "b": (8, 16, 32, 64), "f": (16, 32, 64), "bf": (16,)}
    if not digits.isdigit() or int(digits) not in widths.get(letters, ()) or (packed > 1 and digits != "16"):
        return None
    return Kind(letters, int(digits), packed)


def round_to_bfloat16(numbers: Array) -> Array:
    """Bits, rounded once: what float32 cannot hold is first rounded to odd there, which leaves the second one right."""
    single = numbers.astype(np.float32)
    if numbers.dtype == np.float64:
        single = _to_odd(single, np.abs(single) > np.abs(numbers), single != numbers)
    bits = single.view(np.uint32)
    odd = bits >> np.uint32(16) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(numbers), BFLOAT16_NAN, rounded)


def _to_odd(nearest: Array, too_large: Array, inexact: Array) -> Array:
    """Rounds to the neighbour whose last bit is 1, from that to which the exact number was rounded."""
    bits = nearest.view(UNSIGNED[nearest.itemsize * 8])
    one = bits.dtype.type(1)
    return np.where(inexact, (bits - (too_large & inexact)) | one, bits).view(nearest.dtype)


def as_double(integers: Array) -> Array:
    """Float64, rounded to odd where an integer has more than 53 bits, so that a second rounding is the right one."""
    wide = integers.dtype.type
    if integers.itemsize < 8:
        return integers.astype(np.float64)
    low = integers & wide(0x7FF)
    sticky = (integers ^ low) | ((low != 0).astype(wide) << wide(11))
    large = integers >= wide(1 << 53)
    if wide is np.int64:
        large |= integers <= wide(-(1 << 53))
    return np.where(large, sticky, integers).astype(np.float64)


def flush(numbers: Array) -> Array:
    """Zero, of the same sign, for what is below the smallest normal float32."""
    return np.where(np.abs(numbers) < SMALLEST_NORMAL, np.copysign(numbers.dtype.type(0), numbers), numbers)


def high_product(a: Array, b: Array) -> Array:
    """The upper half of the bits of a product."""
    if a.itemsize < 8:
        bits = a.itemsize * 8
        wide = (SIGNED if a.dtype.kind == "i" else UNSIGNED)[64]
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    low, half = np.uint64((1 << 32) - 1), np.uint64(32)
    x, y = a.view(np.uint64), b.view(np.uint64)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + ((middle & low) + x0 * y1 >> half)
    if a.dtype == np.int64:
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    return high.view(a.dtype)


def fused_multiply_add(a: Array, b: Array, c: Array) -> Array:
    """``a * b + c`` in float64, rounded once; to odd where the operands are narrower, so that it may be rounded again.

    By Boldo and Melquiond, "Emulation of FMA and correctly rounded sums" (2008). Where a product of float64 nears the
    ends of their range, its error is lost, and it is rounded twice.
    """
    if a.dtype == np.float32:
        product = a.astype(np.float64) * b.astype(np.float64)
        return _sum_to_odd(product, c.astype(np.float64))
    product, product_error = _two_product(a, b)
    low, low_error = _two_sum(c, product_error)
    high, high_error = _two_sum(product, low)
    once = high + _sum_to_odd(high_error, low_error)
    return np.where(np.isfinite(once), once, a * b + c)


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """A sum and its error, exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """A product and its error, exactly, unless it leaves the range (Dekker)."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: Array) -> tuple[Array, Array]:
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def _sum_to_odd(a: Array, b: Array) -> Array:
    total, error = _two_sum(a, b)
    inexact = np.isfinite(error) & (error != 0)
    return _to_odd(total, (error < 0) == (total > 0), inexact)
