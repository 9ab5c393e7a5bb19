"""Small kernels of numbers, compiled by Triton and executed by the machine, next to what numpy makes of them.

For processes in which Triton is not interpreted, after ``ptx_driver.install_as(...)``.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from ptx_numbers import Fault

SIGNED = [torch.int8, torch.int16, torch.int32, torch.int64]
UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
INTEGERS = SIGNED + UNSIGNED
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
GENERATOR = torch.Generator().manual_seed(0)
N = 300


def numbers(dtype, shape=(N,), most=100):
    """Whole numbers, from -most, or 0, to most."""
    low = 0 if dtype in (*UNSIGNED, torch.bool) else -most
    return torch.randint(low, most + 1, shape if isinstance(shape, tuple) else (shape,), generator=GENERATOR).to(dtype)


def any_bits(dtype, count=N):
    return torch.randint(256, (count * dtype.itemsize,), dtype=torch.uint8, generator=GENERATOR).view(dtype)


def plain(tensor):
    """As numpy has it; bfloat16 as float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def same(tensor, expected, what):
    if isinstance(expected, np.ndarray):
        with np.errstate(all="ignore"):
            if tensor.dtype == torch.bfloat16:
                expected = torch.from_numpy(np.ascontiguousarray(expected, np.float32)).bfloat16()
            else:
                expected = torch.from_numpy(np.ascontiguousarray(expected.astype(plain(tensor).dtype)))
    torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{what}: {text}")


def refused(text, launch):
    try:
        launch()
    except Fault as fault:
        assert text in str(fault), fault
    else:
        raise AssertionError(f"not refused: {text}")


@triton.jit
def cast_kernel(x_ptr, outs, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    for k in tl.static_range(len(outs)):
        tl.store(outs[k] + i, x.to(outs[k].dtype.element_ty), mask=i < n)


def casts():
    every = [torch.bool, *INTEGERS, *FLOATS]
    for dtype in every:
        small = numbers(dtype, most=1 if dtype == torch.bool else 100)
        # What a large integer rounds to, and what a negative float is without a sign, torch says otherwise.
        cases = [(small, [each for each in every if not (dtype in FLOATS and each in UNSIGNED)])]
        if dtype in INTEGERS:
            cases.append((any_bits(dtype), INTEGERS))
        for data, targets in cases:
            outs = [torch.empty(N, dtype=each) for each in targets]
            cast_kernel[(2,)](data, tuple(outs), N, 256)
            for out in outs:
                same(out, data.to(out.dtype), f"{dtype} to {out.dtype}")


def roundings():
    """To fewer bits, of any pattern: torch rounds to nearest, ties to even, too."""
    for dtype in (torch.float32, torch.float64):
        data = any_bits(dtype, 4096)
        # A float64 is rounded by torch to float32 first.
        outs = [torch.empty(4096, dtype=each) for each in FLOATS if dtype == torch.float32 or each == torch.float32]
        cast_kernel[(8,)](data, tuple(outs), 4096, 512)
        for out in outs:
            same(out, data.to(out.dtype), f"{dtype} to {out.dtype}")
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    for dtype in (torch.float16, torch.bfloat16):
        outs = [torch.empty(1 << 16, dtype=each) for each in (torch.float32, torch.float64, dtype)]
        cast_kernel[(64,)](halves.view(dtype), tuple(outs), 1 << 16, 1024)
        for out in outs:
            same(out, halves.view(dtype).to(out.dtype), f"{dtype} to {out.dtype}")


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, outs, n, INTEGER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0)
    y = tl.load(y_ptr + i, mask=i < n, other=1)
    tl.store(outs[0] + i, x + y, mask=i < n)
    tl.store(outs[1] + i, x - y, mask=i < n)
    tl.store(outs[2] + i, x * y, mask=i < n)
    tl.store(outs[3] + i, tl.minimum(x, y), mask=i < n)
    tl.store(outs[4] + i, tl.maximum(x, y), mask=i < n)
    tl.store(outs[5] + i, tl.where(x < y, x, y), mask=i < n)
    tl.store(outs[6] + i, tl.where((x == y) | (x > y), tl.abs(x), y), mask=i < n)
    if INTEGER:
        if x.dtype.primitive_bitwidth < 64:
            tl.store(outs[7] + i, x // y, mask=i < n)
            tl.store(outs[8] + i, x % y, mask=i < n)
        tl.store(outs[9] + i, (x & y) | (x ^ ~y), mask=i < n)
        tl.store(outs[10] + i, x << (y & 7), mask=i < n)
        tl.store(outs[11] + i, x >> (y & 7), mask=i < n)
        tl.store(outs[12] + i, x // 7 + x % 10, mask=i < n)
    else:
        tl.store(outs[7] + i, tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL), mask=i < n)
        tl.store(outs[8] + i, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL), mask=i < n)
        tl.store(outs[9] + i, tl.where(x != x, y, x), mask=i < n)


def arithmetic():
    for dtype in INTEGERS + FLOATS:
        x, y = (any_bits(dtype) for _ in range(2)) if dtype in INTEGERS else (numbers(dtype) / 7, numbers(dtype) / 3)
        if dtype in FLOATS:
            x[::5], y[::7], x[3], y[4] = torch.nan, torch.nan, 0.0, -0.0
        else:
            # The least number by -1 is undefined, as is 0.
            y = torch.where((y.to(torch.int64) == 0) | (y.to(torch.int64) == -1), torch.tensor(3, dtype=dtype), y)
        outs = [torch.empty(N, dtype=dtype) for _ in range(13)]
        arithmetic_kernel[(2,)](x, y, tuple(outs), N, dtype in INTEGERS, 256, enable_fp_fusion=True)
        a, b = plain(x), plain(y)
        with np.errstate(all="ignore"):
            expected = [a + b, a - b, a * b, np.fmin(a, b), np.fmax(a, b), np.where(a < b, a, b)]
            expected.append(np.where((a == b) | (a > b), np.abs(a), b))
            if dtype in INTEGERS:
                quotient, seventh = trunc(a, b), trunc(a, a.dtype.type(7))
                by = b & a.dtype.type(7)
                expected += [quotient, a - quotient * b, (a & b) | (a ^ ~b), a << by, a >> by]
                expected.append(seventh + a - trunc(a, a.dtype.type(10)) * a.dtype.type(10))
            else:
                expected += [np.minimum(a, b), np.maximum(a, b), np.where(a != a, b, a)]
        for k, each in enumerate(expected):
            if k not in (7, 8) or dtype not in (torch.int64, torch.uint64):
                same(outs[k], each, f"{dtype}, output {k}")


@triton.jit
def quotient_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) // tl.load(y_ptr + i))


def long_division():
    """The compiler divides with 32 bits where a thread's numbers have no more: there, threads part ways."""
    x, out = torch.arange(128) << 28, torch.empty(128, dtype=torch.int64)
    refused("threads of a program part ways", lambda: quotient_kernel[(1,)](x, x + 1, out, 128))
    quotient_kernel[(1,)](x + (1 << 32), torch.full((128,), 3), out, 128)
    same(out, (x + (1 << 32)) // 3, "long")
    quotient_kernel[(1,)](x >> 28, torch.full((128,), 3), out, 128)
    same(out, (x >> 28) // 3, "short")


def trunc(a, b):
    """Rounded to zero."""
    pairs = zip(a.tolist(), np.broadcast_to(b, a.shape).tolist(), strict=True)
    return np.array([abs(p) // abs(q) * (1 if (p < 0) == (q < 0) else -1) for p, q in pairs]).astype(a.dtype)


@triton.jit
def high_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i, mask=i < n, other=0), tl.load(y_ptr + i, mask=i < n, other=0)
    tl.store(out_ptr + i, tl.umulhi(x, y), mask=i < n)


@triton.jit
def power_kernel(steps_ptr, gamma_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    steps = tl.load(steps_ptr + i, mask=i < n, other=0)
    square = tl.load(gamma_ptr) + tl.zeros((BLOCK,), tl.float64)
    power = tl.full((BLOCK,), 1, tl.float64)
    for _ in tl.static_range(8):
        power = tl.where((steps & 1) != 0, power * square, power)
        square = square * square
        steps = steps >> 1
    tl.store(out_ptr + i, power.to(out_ptr.dtype.element_ty), mask=i < n)


def products():
    for dtype in (torch.int32, torch.uint32, torch.int64, torch.uint64):
        x, y, out = any_bits(dtype), any_bits(dtype), torch.empty(N, dtype=dtype)
        high_kernel[(1,)](x, y, out, N, 512)
        bits = 8 * dtype.itemsize
        pairs = zip(x.tolist(), y.tolist(), strict=True)
        high = [((a % (1 << bits)) * (b % (1 << bits)) >> bits) for a, b in pairs]
        assert [each % (1 << bits) for each in out.tolist()] == high, dtype
    steps, gamma = numbers(torch.int64, most=255).abs(), torch.tensor([0.99], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        out = torch.empty(N, dtype=dtype)
        power_kernel[(1,)](steps, gamma, out, N, 512)
        rtol = 1e-13 if dtype == torch.float64 else 1e-7
        torch.testing.assert_close(out, (gamma**steps).to(dtype), rtol=rtol, atol=0)
