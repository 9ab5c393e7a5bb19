"""What the threads of a warp do together, on programs written by hand."""

import numpy as np
import pytest
from ptx_assembly import per_thread

LANE = "mov.u32 %r2, %tid.x;"
ONES = (1 << 32) - 1


SHUFFLES = [
    ("idx", 5, 31, lambda t: 5),
    ("idx", 33, 31, lambda t: 1),
    ("bfly", 3, 31, lambda t: t ^ 3),
    ("bfly", 16, 31, lambda t: t ^ 16),
    ("up", 1, 0, lambda t: max(t - 1, 0) if t else 0),
    ("up", 4, 0, lambda t: t - 4 if t >= 4 else t),
    ("down", 4, 31, lambda t: t + 4 if t < 28 else t),
    # Segments of 8 threads: the upper two bits of a thread's number are its segment.
    ("idx", 5, 0x181F, lambda t: t // 8 * 8 + 5),
    ("up", 3, 0x1800, lambda t: t - 3 if t % 8 >= 3 else t),
    ("down", 3, 0x181F, lambda t: t + 3 if t % 8 < 5 else t),
    ("bfly", 9, 0x181F, lambda t: t ^ 9 if t & 8 else t),
    ("idx", 20, 11, lambda t: t),
]


@pytest.mark.parametrize(("how", "by", "clamp", "source"), SHUFFLES)
def test_shuffles(how, by, clamp, source):
    body = f"{LANE} add.s32 %r3, %r2, 100; shfl.sync.{how}.b32 %r1|%p1, %r3, {by}, {clamp}, -1;"
    expected = [source(t) % 32 for t in range(32)]
    assert per_thread(body) == [100 + each for each in expected]
    moved = per_thread(f"{body} selp.b32 %r1, 1, 0, %p1;")
    assert [t for t in range(32) if expected[t] != t and not moved[t]] == []
    if (how, by) not in (("idx", 5), ("idx", 33)):
        assert [t for t in range(32) if expected[t] == t and moved[t]] == []


def test_a_shuffle_is_within_a_warp_and_by_each_threads_own_number():
    body = f"{LANE} sub.s32 %r3, 31, %r2; shfl.sync.idx.b32 %r1, %r2, %r3, 31, -1;"
    assert per_thread(body, threads=64) == [*reversed(range(32)), *reversed(range(32, 64))]


REDUCTIONS = [
    ("add.s32", sum(range(32)) - 32 * 5),
    ("min.s32", -5),
    ("max.s32", 26),
    ("min.u32", 0),
    ("max.u32", ONES),
    ("and.b32", 0),
    ("or.b32", ONES),
    ("xor.b32", np.bitwise_xor.reduce(np.arange(32) - 5)),
]


@pytest.mark.parametrize(("how", "expected"), REDUCTIONS)
def test_reductions(how, expected):
    body = f"{LANE} sub.s32 %r3, %r2, 5; mov.b32 %r4, -1; redux.sync.{how} %r1, %r3, %r4;"
    assert per_thread(body) == [expected & ONES] * 32
    assert per_thread(body, threads=64)[:32] == [expected & ONES] * 32


def test_reductions_of_groups():
    body = f"""{LANE} setp.lt.u32 %p1, %r2, 16; selp.b32 %r4, 0xFFFF, 0xFFFF0000, %p1;
        redux.sync.add.s32 %r1, %r2, %r4;"""
    assert per_thread(body) == [sum(range(16))] * 16 + [sum(range(16, 32))] * 16


def test_votes():
    body = f"{LANE} setp.lt.u32 %p1, %r2, 5; vote.sync.ballot.b32 %r1, %p1, -1;"
    assert per_thread(body, threads=64) == [31] * 32 + [0] * 32
    for bound, everyone, anyone in ((5, 0, 1), (32, 1, 1), (0, 0, 0)):
        vote = f"{LANE} setp.lt.u32 %p1, %r2, {bound};"
        assert per_thread(f"{vote} vote.sync.all.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;") == [everyone] * 32
        assert per_thread(f"{vote} vote.sync.any.pred %p2, %p1, -1; selp.b32 %r1, 1, 0, %p2;") == [anyone] * 32
    assert per_thread("activemask.b32 %r1;") == [ONES] * 32


def matrix_items(lane, transposed):
    """The two numbers, row times 8 plus column, that a thread holds of a matrix."""
    pairs = [(lane // 4, 2 * (lane % 4) + k) for k in range(2)]
    return [8 * column + row if transposed else 8 * row + column for row, column in pairs]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices(count, transposed):
    """Row r of matrix m lies at 16 (r + 8 m), as items whose number is 64 m + 8 r + column."""
    trans = ".trans" if transposed else ""
    names = ", ".join(f"%r{k}" for k in range(10, 10 + count))
    rows = "shl.b32 %r3, %r2, 4;"
    fill = f"{LANE} shl.b32 %r5, %r2, 1;" + "".join(
        f"add.s32 %r6, %r2, {32 * k}; cvt.u16.u32 %rs2, %r6; st.shared.b16 [%r5+{64 * k}], %rs2;" for k in range(8)
    )
    load = f"{rows} ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{names}}}, [%r3];"
    for matrix in range(count):
        expected = [[64 * matrix + each for each in matrix_items(t, transposed)] for t in range(32)]
        held = per_thread(f"{fill} {load} mov.b32 %r1, %r{10 + matrix};")
        assert held == [low | high << 16 for low, high in expected]
    # What was loaded is stored elsewhere, up to the end, and read there in order.
    store = f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r3+{2048 - 128 * count}], {{{names}}};"
    for k in range(2 * count):
        read = f"shl.b32 %r5, %r2, 1; ld.shared.b16 %rs3, [%r5+{2048 - 128 * count + 64 * k}]; cvt.u32.u16 %r1, %rs3;"
        assert per_thread(f"{fill} {load} {store} {read}", shared_bytes=2048) == [32 * k + t for t in range(32)]
