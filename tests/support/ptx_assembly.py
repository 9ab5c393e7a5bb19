"""Kernels written by hand in PTX, for tests of what executes them."""

from __future__ import annotations

import numpy as np
from ptx_costs import Counts
from ptx_machine import Program
from ptx_text import parse

# Registers that every kernel has: predicates, 16, 32 and 64 bits.
DECLARED = ".reg .pred %p<20>; .reg .b16 %rs<20>; .reg .b32 %r<40>; .reg .b64 %rd<20>;"


def write(body: str, arguments: tuple, threads: int) -> str:
    """A kernel whose parameters are p0, p1 and so on; the address of the first one is in %rd0."""
    kinds = ["f64" if isinstance(each, float) else "u64" for each in arguments]
    parameters = ",\n".join(f"\t.param .{kind} p{k}" for k, kind in enumerate(kinds))
    return (
        f".visible .entry by_hand(\n{parameters}\n)\n.reqntid {threads}\n"
        f"{{\n{DECLARED}\nld.param.b64 %rd0, [p0];\n{body}\nret;\n}}\n"
    )


def execute(body: str, *arguments: object, threads: int = 32, grid: tuple[int, int, int] = (1, 1, 1), **how) -> Counts:
    """Runs it on numpy's arrays and numbers."""
    program = Program(parse(write(body, arguments, threads)), how.pop("shared_bytes", 4096))
    values = [each.ctypes.data if isinstance(each, np.ndarray) else each for each in arguments]
    return program.run(values, grid, **how)


def per_thread(body: str, *more: object, threads: int = 32, bits: int = 32, programs: int = 1, **how) -> list[int]:
    """What each thread has in %r1, or %rd1, in the end."""
    out = np.zeros((programs, threads), f"u{bits // 8}")
    register = {16: "%rs1", 32: "%r1", 64: "%rd1"}[bits]
    end = f"""
        mov.u32 %r30, %tid.x;
        mov.u32 %r31, %ctaid.x;
        mad.lo.s32 %r30, %r31, {threads}, %r30;
        mad.wide.u32 %rd10, %r30, {bits // 8}, %rd0;
        st.global.b{bits} [%rd10], {register};
    """
    execute(body + end, out, *more, threads=threads, grid=(programs, 1, 1), **how)
    return out.tolist() if programs > 1 else out[0].tolist()
