"""Small kernels of tiles, memory and jumps, compiled by Triton and executed by the machine, and what they are refused.

For processes in which Triton is not interpreted, after ``ptx_driver.install_as(...)``.
"""

from __future__ import annotations

import gc

import numpy as np
import torch
import triton
import triton.language as tl
from ptx_kernels import FLOATS, GENERATOR, INTEGERS, N, any_bits, numbers, plain, refused, same


@triton.jit
def reduce_kernel(x_ptr, outs, AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None])
    i = tl.arange(0, ROWS if AXIS == 1 else COLUMNS)
    tl.store(outs[0] + i, tl.sum(x, AXIS))
    tl.store(outs[1] + i, tl.min(x, AXIS))
    tl.store(outs[2] + i, tl.max(x, AXIS))
    tl.store(outs[3] + i, tl.argmax(x, AXIS))
    tl.store(outs[4] + i, tl.sum((x > 0).to(tl.int32), AXIS) > 2)
    tl.store(outs[5] + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None], tl.cumsum(x, AXIS))


SHAPES = [(4, 64), (16, 16), (64, 4), (1, 128), (32, 2), (32, 32)]


def two_shapes(k, axis):
    """For the k-th dtype, one along both axes, and one along one of them."""
    return [SHAPES[k % 6], SHAPES[(k + 2) % 6]][: 2 - (k + axis) % 2]


def reductions():
    for k, dtype in enumerate(INTEGERS + FLOATS):
        for axis in (0, 1):
            for rows, columns in two_shapes(k, axis):
                x = numbers(dtype, (rows, columns), 1)
                length = columns if axis == 0 else rows
                dtypes = dtype, dtype, dtype, torch.int32, torch.bool
                outs = *[torch.empty(length, dtype=each) for each in dtypes], torch.empty_like(x)
                reduce_kernel[(1,)](x, outs, axis, rows, columns, num_warps=4 if k % 3 else 1)
                a = plain(x)
                several = (a > 0).sum(axis) > 2
                expected = [a.sum(axis), a.min(axis), a.max(axis), a.argmax(axis), several, a.cumsum(axis)]
                for which, (out, each) in enumerate(zip(outs, expected, strict=True)):
                    same(out, each, f"{dtype}, {rows} x {columns}, axis {axis}, output {which}")


@triton.jit
def gather_kernel(x_ptr, index_ptr, outs, AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None]
    x, index = tl.load(x_ptr + i), tl.load(index_ptr + i)
    tl.store(outs[0] + i, tl.gather(x, index, AXIS))
    tl.store(outs[1] + tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None], tl.trans(x))


def gathers():
    dtypes = [torch.bool, *INTEGERS, *FLOATS]
    for k, dtype in enumerate(dtypes):
        for axis in (0, 1):
            for rows, columns in two_shapes(k, axis):
                x = numbers(dtype, (rows, columns), 1 if dtype == torch.bool else 100)
                index = torch.randint((rows, columns)[axis], (rows, columns), generator=GENERATOR)
                index = index.to(torch.int32 if k % 2 else torch.int64)
                outs = torch.empty_like(x), torch.empty(columns, rows, dtype=dtype)
                gather_kernel[(1,)](x, index, outs, axis, rows, columns, num_warps=4 if k % 3 else 1)
                expected = np.take_along_axis(plain(x), index.numpy(), axis)
                same(outs[0], expected, f"{dtype}, {rows} x {columns}, axis {axis}")
                same(outs[1], plain(x).T, f"{dtype}, {rows} x {columns}, transposed")


@triton.jit
def rows_kernel(table_ptr, source_ptr, out_ptr, rows, UNIT: tl.constexpr, UNITS: tl.constexpr, BLOCK: tl.constexpr):
    """Copies rows of units of so many bytes, from tensors whose addresses are in a table; one program per tile."""
    kind: tl.constexpr = tl.int64 if UNIT >= 8 else tl.int32 if UNIT == 4 else tl.int16 if UNIT == 2 else tl.int8
    VEC: tl.constexpr = 2 if UNIT == 16 else 1
    data_ptr = tl.multiple_of(tl.load(table_ptr + tl.program_id(1)).to(tl.pointer_type(kind)), UNIT)
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = unit // UNITS
    live = row < rows
    source = tl.load(source_ptr + row, mask=live, other=0, eviction_policy="evict_last")
    offset = (source.to(tl.int64) * UNITS + unit % UNITS) * VEC
    part = tl.arange(0, VEC)
    at_ptr = data_ptr + offset[:, None] + part[None]
    copied = tl.load(at_ptr, mask=live[:, None], other=0, eviction_policy="evict_first")
    to = tl.program_id(1).to(tl.int64) * rows * UNITS + unit
    tl.store(out_ptr.to(tl.pointer_type(kind)) + (to * VEC)[:, None] + part[None], copied, mask=live[:, None])


def rows():
    for unit in (1, 2, 4, 8, 16):
        for units in (1, 3):
            data = [any_bits(torch.uint8, 50 * unit * units).view(50, -1) for _ in range(2)]
            source = torch.randint(50, (200,), generator=GENERATOR).to(torch.int32)
            out = torch.empty(2, 200, unit * units, dtype=torch.uint8)
            table = torch.tensor([each.data_ptr() for each in data])
            grid = (triton.cdiv(200 * units, 128), 2)
            rows_kernel[grid](table, source, out, 200, unit, units, 128)
            same(out, torch.stack([each[source.long()] for each in data]), f"{units} units of {unit} bytes")
            # Every byte is asked for once, and so is every number of a row, per unit.
            counts = triton.runtime.driver.active.launches[-1]
            assert counts.store_bytes == out.nbytes, counts
            assert counts.load_bytes >= out.nbytes + 2 * 4 * 200, counts
            assert counts.bus_bytes >= 2 * 200 * unit * units, counts
            assert min(counts.microseconds().values()) > 0


@triton.jit
def control_kernel(x_ptr, out_ptr, rounds, n, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    i = program * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for step in range(rounds + program):
        total += tl.load(x_ptr + (i + step) % n) * step
    if program % 2 == 1:
        total = -total
        if program == 3:
            total += 1
    left = program
    while left > 0:
        total = total * 2
        left -= 2
    if tl.max(total, 0) > 1e5:
        return
    tl.store(out_ptr + i, total, mask=i < n)


def control():
    x, out = numbers(torch.float32).abs(), torch.full((N,), -1.0)
    control_kernel[(5,)](x, out, 3, N, 64)
    for program in range(5):
        i = torch.arange(program * 64, min(program * 64 + 64, N))
        total = sum(x[(i + step) % N] * step for step in range(3 + program)) * (-1 if program % 2 else 1)
        total = (total + (program == 3)) * 2 ** ((program + 1) // 2)
        every = torch.arange(program * 64, program * 64 + 64) % N
        assert len(every)
        same(out[i], total, f"program {program}")


@triton.jit
def copy_kernel(address, out_ptr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    x_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), ALIGNED)
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


def faults():
    x, out = torch.arange(1 << 20, dtype=torch.int32), torch.empty(512, dtype=torch.int32)

    def copy(address, aligned=4):
        copy_kernel[(1,)](torch.tensor(address).item(), out, aligned, 512)
        return out.tolist()

    assert copy(x.data_ptr() + 4) == list(range(1, 513))
    # What is alive, and was moved among the objects that Python looks at seldom, is alive.
    y = x + 1
    address = y.data_ptr()
    gc.collect()
    assert copy(address) == list(range(1, 513))
    refused("misaligned access of 16 bytes", lambda: copy(x.data_ptr() + 4, 16))
    refused("outside of every tensor", lambda: copy(x.data_ptr() + x.nbytes - 512 * 4 + 4))
    refused("outside of every tensor", lambda: copy(x.data_ptr() - 4))
    refused("outside of every tensor", lambda: copy(1 << 40))
    view = y[100:200]
    del y
    assert copy(address) == list(range(1, 513))
    del view
    refused("outside of every tensor", lambda: copy(address))
