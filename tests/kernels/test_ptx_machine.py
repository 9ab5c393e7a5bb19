"""The machine on programs written by hand: memory, jumps, what warps do together, what it counts, what it refuses."""

import numpy as np
import ptx_costs
import pytest
from ptx_assembly import execute, per_thread
from ptx_costs import Counts
from ptx_machine import AT_ONCE, Program
from ptx_numbers import Fault
from ptx_text import parse

LANE = "mov.u32 %r2, %tid.x;"
ONES = (1 << 32) - 1


def array(*numbers, dtype="u4"):
    """Memory that begins at a multiple of 64 bytes."""
    data = np.array(numbers, dtype)
    memory = np.zeros(data.nbytes + 64, np.uint8)
    memory = memory[-memory.ctypes.data % 64 :][: data.nbytes]
    memory[:] = data.view(np.uint8)
    return memory.view(dtype)


def test_special_registers():
    assert per_thread("mov.u32 %r1, %tid.x;", threads=64) == list(range(64))
    assert per_thread("mov.u32 %r1, %laneid;", threads=64) == [*range(32), *range(32)]
    assert per_thread("mov.u32 %r1, %ntid.x;", threads=64) == [64] * 64
    assert per_thread("mov.u32 %r1, %ntid.y;", threads=64) == [1] * 64
    assert per_thread("mov.u32 %r1, %tid.y;") == [0] * 32
    assert per_thread("mov.u32 %r1, %nctaid.x;", programs=3) == [[3] * 32] * 3
    assert per_thread("mov.u32 %r1, %ctaid.x;", programs=3) == [[k] * 32 for k in range(3)]


def test_programs_of_a_grid_of_three_dimensions():
    out = np.zeros(2 * 4 * 3, np.uint32)
    body = """
        mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %ctaid.z; mov.u32 %r4, %nctaid.y;
        mad.lo.s32 %r5, %r3, %r4, %r2; mad.lo.s32 %r5, %r5, 2, %r1; mad.wide.u32 %rd1, %r5, 4, %rd0;
        mul.lo.s32 %r6, %r2, 10; mad.lo.s32 %r6, %r3, 100, %r6; add.s32 %r6, %r6, %r1; st.global.b32 [%rd1], %r6;
    """
    execute(body, out, grid=(2, 4, 3))
    assert out.tolist() == [100 * z + 10 * y + x for z in range(3) for y in range(4) for x in range(2)]


def test_more_programs_than_go_at_once():
    count = AT_ONCE + 3
    assert [row[0] for row in per_thread("mov.u32 %r1, %ctaid.x;", programs=count)] == list(range(count))


def test_constants():
    assert per_thread("mov.b32 %r1, -1;")[0] == ONES
    assert per_thread("mov.b32 %r1, 0x10U;")[0] == 16
    assert per_thread("mov.b32 %r1, 0f3F800000;")[0] == 0x3F800000
    assert per_thread("mov.b64 %rd1, 0d3FF0000000000000;", bits=64)[0] == 0x3FF0 << 48
    assert per_thread("mov.pred %p1, -1; selp.b32 %r1, 7, 8, %p1;")[0] == 7


def test_arguments_of_each_type():
    assert per_thread("ld.param.b64 %rd1, [p1];", -5, bits=64)[0] == (1 << 64) - 5
    assert per_thread("ld.param.b32 %r1, [p2];", 1, 7)[0] == 7
    assert per_thread("ld.param.b64 %rd1, [p1];", 1.5, bits=64)[0] == 0x3FF8 << 48
    assert per_thread("ld.param.s8 %rd1, [p1];", 0x80, bits=64)[0] == (1 << 64) - 128
    assert per_thread("ld.param.u8 %rd1, [p1];", 0x80, bits=64)[0] == 128
    single = ".entry k(\n.param .f32 p0,\n.param .u64 .ptr .global .align 1 p1\n)\n.reqntid 32\n{\n.reg .b32 %r<2>;"
    single += ".reg .b64 %rd<2>; ld.param.b32 %r1, [p0]; ld.param.b64 %rd1, [p1]; st.global.b32 [%rd1], %r1; ret;\n}\n"
    out = np.zeros(1, np.float32)
    Program(parse(single)).run([0.1, out.ctypes.data])
    assert out[0] == np.float32(0.1)


def test_loads_of_each_width():
    memory = array(0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, dtype="u1")

    def loaded(body, bits=32):
        return per_thread(f"ld.param.b64 %rd1, [p1]; {body}", memory, bits=bits)[0]

    assert loaded("ld.global.b8 %rs2, [%rd1+1]; cvt.u32.u16 %r1, %rs2;") == 0x81
    assert loaded("ld.global.s8 %r1, [%rd1+1];") == ONES - 0x7E
    assert loaded("ld.global.b16 %rs1, [%rd1 + 2];", 16) == 0x8382
    assert loaded("add.s64 %rd1, %rd1, 8; ld.global.nc.b32 %r1, [%rd1+-4];") == 0x87868584
    assert loaded("ld.global.L1::evict_last.b64 { %rd1 }, [ %rd1 + 0 ];", 64) == 0x8786858483828180


@pytest.mark.parametrize(("vector", "bits"), [(2, 16), (2, 32), (4, 32), (2, 64), (8, 16), (8, 32)])
def test_vectors(vector, bits):
    """Each thread reads a vector and writes it, reversed, where the thread opposite read."""
    items = array(*range(1, 32 * vector + 1), dtype=f"u{bits // 8}")
    out = array(*[0] * len(items), dtype=items.dtype.str)
    letter = {16: "%rs", 32: "%r", 64: "%rd"}[bits]
    names = [f"{letter}{k}" for k in range(4, 4 + vector)]
    size = vector * bits // 8
    execute(
        f"""{LANE} ld.param.b64 %rd2, [p1]; mad.wide.u32 %rd2, %r2, {size}, %rd2;
        ld.global.v{vector}.b{bits} {{{", ".join(names)}}}, [%rd2];
        sub.s32 %r3, 31, %r2; mad.wide.u32 %rd3, %r3, {size}, %rd0;
        st.global.v{vector}.b{bits} [ %rd3 + 0 ], {{ {", ".join(names[::-1])} }};""",
        out,
        items,
    )
    assert out.tolist() == items.tolist()[::-1]


def test_what_is_off_is_neither_read_nor_written():
    """Threads 3 and 5 have addresses of nothing."""
    memory, out = array(*range(100, 132)), array(*[7] * 32)
    body = f"""{LANE} ld.param.b64 %rd2, [p1]; mad.wide.u32 %rd3, %r2, 4, %rd2; mad.wide.u32 %rd4, %r2, 4, %rd0;
        setp.ne.b32 %p1, %r2, 3; setp.ne.b32 %p2, %r2, 5; and.pred %p3, %p1, %p2; not.pred %p4, %p3;
        selp.b64 %rd3, %rd3, 1, %p3; selp.b64 %rd4, %rd4, 1, %p3;
        mov.u32 %r3, 0x5; @%p3 ld.global.b32 {{ %r3 }}, [ %rd3 + 0 ]; @!%p4 st.global.b32 [ %rd4 + 0 ], {{ %r3 }};"""
    execute(body, out, memory)
    assert out.tolist() == [7 if k in (3, 5) else 100 + k for k in range(32)]
    # A register keeps what was in it.
    kept = per_thread(f"{LANE} setp.eq.b32 %p1, %r2, 3; mov.b32 %r1, 5; @%p1 mov.b32 %r1, 6;")
    assert kept == [5, 5, 5, 6] + [5] * 28
    body = f"{LANE} setp.eq.b32 %p1, %r2, 3; @%p1 mov.pred %p2, -1; @%p1 mov.b32 %r3, 6; selp.b32 %r1, %r3, 0, %p2;"
    assert per_thread(body) == [0, 0, 0, 6] + [0] * 28
    assert per_thread(f"{LANE} setp.eq.b32 %p1, %r2, 99; mov.b32 %r1, 5; @%p1 ld.global.b32 %r1, [%rd0];") == [5] * 32


def test_one_address_for_all_threads():
    """The last one of them is the one that stays."""
    out = array(0, 0)
    execute(f"{LANE} st.global.b32 [%rd0+4], %r2;", out)
    assert out.tolist() == [0, 31]


def test_parts_of_registers():
    assert per_thread("mov.b32 %r2, 0x12345678; mov.b32 {%rs2, %rs1}, %r2;", bits=16)[0] == 0x1234
    assert per_thread("mov.b32 %r2, 0x12345678; mov.b32 {%rs1, _}, %r2;", bits=16)[0] == 0x5678
    assert per_thread("mov.b16 %rs2, 1; mov.b16 %rs3, 2; mov.b32 %r1, {%rs2, %rs3};")[0] == 0x20001
    assert per_thread("mov.b32 %r2, 5; mov.b64 %rd1, {%r2, 6};", bits=64)[0] == (6 << 32) + 5
    assert per_thread("mov.b64 %rd2, 0x600000005; mov.b64 {_, %r1}, %rd2;")[0] == 6
    # A half that nobody wrote is there, though nothing is in it.
    assert per_thread("mov.b16 %rs2, 1; mov.b32 %r1, {%rs2, %rs3};")[0] & 0xFFFF == 1
    assert per_thread("mov.b32 %r2, 0x89ABCDEF; prmt.b32 %r1, %r2, %r3, 0x3210;")[0] == 0x89ABCDEF
    # What is wider is cut where it is read.
    assert per_thread("mov.b32 %r2, 0x12345678; cvt.u16.u32 %rs1, %r2; cvt.s8.s32 %rs1, %r2;", bits=16)[0] == 0x78
    assert per_thread("mov.b32 %r2, 0x87; cvt.s8.s32 %rs1, %r2;", bits=16)[0] == 0xFF87


def test_registers_of_a_block_of_assembly():
    body = """{
        .reg .b32 l<3>; and.b32 l0, %r2, 3; add.s32 %r1, l0, 10;
        }
        { .reg .b32 h; mov.b32 h, 100; add.s32 %r1, %r1, h; }"""
    assert per_thread(f"{LANE} {body}")[:6] == [110, 111, 112, 113, 110, 111]


def test_loops_of_whole_programs():
    """Program k adds k, k - 1 and so on to 1."""
    body = """mov.u32 %r2, %ctaid.x; mov.b32 %r1, 0;
        $L__loop:
        setp.eq.b32 %p1, %r2, 0;
        @%p1 bra $L__end;
        add.s32 %r1, %r1, %r2; sub.s32 %r2, %r2, 1;
        bra.uni $L__loop;
        $L__end:
        bar.sync 0;"""
    assert [row[5] for row in per_thread(body, programs=6)] == [0, 1, 3, 6, 10, 15]


def test_programs_that_part_keep_their_registers_and_shared_memory():
    """Each thread's number is kept in shared memory over a jump that some programs take; some return before the end."""
    body = f"""{LANE} mov.u32 %r3, %ctaid.x; mad.lo.s32 %r4, %r3, 100, %r2; shl.b32 %r5, %r2, 2;
        mov.b32 %r6, global_smem; add.s32 %r5, %r5, %r6; st.shared.b32 [%r5], %r4; mov.b32 %r7, 1;
        and.b32 %r8, %r3, 1; setp.ne.b32 %p1, %r8, 0; @%p1 bra $L__odd;
        mov.b32 %r7, 2;
        $L__odd:
        setp.eq.b32 %p2, %r3, 3; @%p2 ret;
        ld.shared.b32 %r9, [%r5]; mad.lo.s32 %r1, %r9, 10, %r7;"""
    rows = per_thread(body, programs=4)
    assert rows[:3] == [[(100 * k + t) * 10 + (1 if k % 2 else 2) for t in range(32)] for k in range(3)]
    assert rows[3] == [0] * 32


def test_shared_memory_is_of_a_program():
    body = f"""{LANE} mov.u32 %r3, %ctaid.x; mad.lo.s32 %r4, %r3, 100, %r2; shl.b32 %r5, %r2, 3;
        st.shared.v2.b32 [%r5], {{%r4, %r3}}; bar.sync 0; xor.b32 %r5, %r5, 8; ld.shared.b32 %r1, [%r5];"""
    assert per_thread(body, programs=2) == [[100 * k + (t ^ 1) for t in range(32)] for k in range(2)]
    assert per_thread(body.replace("%r5, 8;", "%r5, 12;"), programs=2) == [[k] * 32 for k in range(2)]
    # Two at once, of which the second one is at the end.
    assert per_thread(f"{body} ld.shared.v2.b32 {{%r6, %r1}}, [%r5];", programs=2, shared_bytes=256)[1] == [1] * 32
    body = f"""{LANE} setp.lt.u32 %p1, %r2, 4; shl.b32 %r3, %r2, 1; cvt.u16.u32 %rs2, %r2; mov.b16 %rs1, 9;
        @%p1 st.shared::cta.b16 [ %r3 + 0 ], %rs2; @%p1 ld.shared.b16 %rs1, [%r3];"""
    assert per_thread(body, bits=16) == [0, 1, 2, 3] + [9] * 28
    body = "mov.b16 %rs2, -1; st.shared.b8 [global_smem+5], %rs2; ld.shared.s8 %r1, [global_smem+5];"
    assert per_thread(body)[0] == ONES
    # Nobody wrote it.
    assert per_thread("ld.shared.b32 %r1, [global_smem];")[0] == 0xA5A5A5A5


COPY = f"""{LANE} mul.wide.u32 %rd2, %r2, 8; add.s64 %rd3, %rd0, %rd2;
    ld.param.b64 %rd4, [p1]; add.s64 %rd4, %rd4, %rd2;
    setp.lt.u32 %p1, %r2, 20; @%p1 ld.global.b64 %rd5, [%rd4]; @%p1 st.global.b64 [%rd3], %rd5;"""


def test_what_a_launch_costs():
    """Of 2 warps, the first one copies 20 items of 8 bytes, which begin at a sector; the second one nothing."""
    out, memory = array(*[0] * 64, dtype="u8"), array(*range(64), dtype="u8")
    counts = execute(COPY, out, memory, threads=64, grid=(3, 1, 1))
    assert (counts.name, counts.programs) == ("by_hand", 3)
    assert (counts.load_requests, counts.store_requests) == (3, 3)
    assert (counts.load_sectors, counts.store_sectors) == (15, 15)
    assert (counts.load_bytes, counts.store_bytes) == (480, 480)
    assert counts.bus_bytes == 2 * 160
    # 2 parameters and a register of the hardware at 0.3, 2 sums of 64 bits at 2, 5 more
    assert counts.warp_instructions == 3 * 2 * 10
    assert counts.machine_instructions == pytest.approx(3 * 2 * (3 * 0.3 + 2 * 2 + 5))
    assert counts.shared_requests == 0
    assert execute(COPY, out, memory, threads=64, counted=False).load_requests == 0


def test_sectors_of_a_request_are_distinct():
    """All threads read one item, then each an item 64 bytes from the next one's."""
    memory = array(*range(512))
    out = array(0)
    counts = execute("ld.param.b64 %rd1, [p1]; ld.global.b32 %r1, [%rd1+128];", out, memory)
    assert (counts.load_requests, counts.load_sectors, counts.load_bytes, counts.bus_bytes) == (1, 1, 128, 32)
    body = f"{LANE} ld.param.b64 %rd1, [p1]; mad.wide.u32 %rd1, %r2, 64, %rd1; ld.global.b32 %r1, [%rd1];"
    counts = execute(body, out, memory)
    assert (counts.load_sectors, counts.bus_bytes) == (32, 32 * 32)
    counts = execute(f"{LANE} shl.b32 %r3, %r2, 2; st.shared.b32 [%r3], %r2;", out)
    assert (counts.shared_requests, counts.bus_bytes) == (1, 0)


def test_lower_bounds_of_the_time():
    sectors = np.arange(1_500_000, dtype=np.uint64)
    counts = Counts(read=sectors, written=sectors, load_sectors=3_000_000, store_sectors=2_500_000,
                    machine_instructions=897_600, load_requests=224_000, store_requests=400)  # fmt: skip
    assert counts.microseconds() == pytest.approx({"memory": 32, "L2": 32, "issue": 1, "requests": 1})


@pytest.mark.parametrize(
    ("opcode", "least", "most"), [("add.s32", 1, 1), ("add.s64", 2, 2), ("mul.lo.s64", 4, 4), ("div.s64", 40, 200),
                                  ("rem.u32", 5, 40), ("ld.global.b64", 1, 1), ("mov.b64", 0, 0.5)]
)  # fmt: skip
def test_about_what_the_assembler_makes(opcode, least, most):
    assert least <= ptx_costs.machine_instructions(opcode) <= most


FAULTS = {
    "unknown instruction": ("tanh.approx.f32 %r1, %r2;", "unknown instruction: tanh.approx.f32"),
    "unknown memory": ("ld.local.b32 %r1, [%r2];", "unknown instruction: ld.local"),
    "an unknown way to load": ("ld.global.b32.frobnicate %r1, [%rd0];", "unknown instruction"),
    "atomics": ("atom.shared.add.u32 %r1, [%r2], 1;", "unknown instruction: atom"),
    "an operand more": ("mov.b32 %r2, 1; add.s32 %r1, %r2, %r2, %r2;", "unknown instruction"),
    "unknown operand": ("mov.u32 %r1, %clock;", "unknown operand"),
    "a register before it is written": ("add.s32 %r1, %r2, 1;", "%r2 is read before it is written: add.s32"),
    "a predicate before it is written": ("@%p1 mov.b32 %r1, 1;", "%p1 is read before it is written"),
    "a register that is too narrow": ("mov.b16 %rs2, 1; add.s32 %r1, %rs2, 1;", "%rs2 has other than 32 bits"),
    "a result that is too wide": ("mov.b32 %r2, 1; mul.wide.u32 %r1, %r2, %r2;", "unknown operand"),
    "a constant that is too narrow": ("mov.b64 %rd1, 0f3F800000;", "a constant has other than 64 bits"),
    "threads that part ways": (
        f"{LANE} setp.eq.b32 %p1, %r2, 5; @%p1 bra $L; $L:\n",
        "threads of a program part ways: @%p1 bra",
    ),
    "threads that return": (f"{LANE} setp.eq.b32 %p1, %r2, 5; @%p1 ret;", "threads of a program part ways"),
    "no such label": ("bra $L__nowhere;", "unknown instruction"),
    "a misaligned load": ("ld.global.b32 %r1, [%rd0+2];", "misaligned access of 4 bytes: ld.global"),
    "a misaligned vector": ("ld.global.v4.b32 {%r1,%r2,%r3,%r4}, [%rd0+8];", "misaligned access of 16 bytes"),
    "a misaligned store": ("mov.b32 %r1, 1; st.global.b32 [%rd0+1], %r1;", "misaligned access of 4 bytes: st.global"),
    "misaligned shared memory": ("mov.b32 %r1, 2; ld.shared.b32 %r2, [%r1];", "misaligned access"),
    "beyond shared memory": ("mov.b32 %r1, 4094; ld.shared.v2.b8 {%rs1,%rs2}, [%r1+2];", "outside of shared memory"),
    "a matrix beyond shared memory": (
        "mov.b32 %r1, 4096; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1];",
        "outside of shared memory",
    ),
    "a misaligned matrix": (
        "mov.b32 %r1, 8; stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r1], {%r1};",
        "misaligned row of a matrix",
    ),
    "a matrix of unknown shape": ("ldmatrix.sync.aligned.m16n16.x1.shared.b8 {%r2}, [%r1];", "unknown instruction"),
    "a shuffle of a few": (f"{LANE} shfl.sync.idx.b32 %r1, %r2, 0, 31, 15;", "some threads of a warp stay away"),
    "a shuffle for a few": (
        f"{LANE} setp.eq.b32 %p1, %r2, 5; @%p1 shfl.sync.idx.b32 %r1, %r2, 0, 31, -1;",
        "some threads of a warp stay away",
    ),
    "a vote of a few": (
        f"{LANE} setp.eq.b32 %p1, %r2, 5; vote.sync.ballot.b32 %r1, %p1, 15;",
        "some threads of a warp stay away",
    ),
    "a reduction of others": (f"{LANE} redux.sync.add.s32 %r1, %r2, 15;", "not in its own group"),
    "an unknown shuffle": (f"{LANE} shfl.sync.rotate.b32 %r1, %r2, 0, 31, -1;", "unknown instruction"),
    "an unknown reduction": (f"{LANE} redux.sync.mul.s32 %r1, %r2, -1;", "unknown instruction"),
    "parameters at once": ("ld.param.v2.b32 {%r1, %r2}, [p0];", "unknown instruction"),
    "a parameter that is written": ("mov.b32 %r1, 0; st.param.b32 [p0], %r1;", "unknown instruction"),
    "more matrices than registers": (
        "mov.b32 %r1, 0; ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r2}, [%r1];",
        "unknown instruction",
    ),
    "a mask of another width": ("activemask.b64 %rd1;", "unknown instruction"),
    "two results of one": ("mov.b32 %r2, 1; setp.eq.s32 %p1|%p2, %r2, %r2;", "unknown operand"),
    "a parameter in part": ("ld.param.b32 %r1, [p0+4];", "unknown instruction"),
}


@pytest.mark.parametrize(("body", "message"), FAULTS.values(), ids=FAULTS)
def test_faults(body, message):
    with pytest.raises(Fault) as caught:
        execute(body, array(*range(64)))
    assert message in str(caught.value)


def test_a_fault_that_is_not_reached_is_none():
    execute("bra $L__end; tanh.approx.f32 %r1, %r2;\n$L__end:\n", array(0))


def test_what_may_be_touched_is_asked_for_each_access():
    asked = []

    def check(addresses, size):
        asked.append((sorted(set((addresses - np.uint64(out.ctypes.data)).ravel().tolist())), size))
        if (addresses == out.ctypes.data + 24).any():
            raise Fault("not there")

    out = array(*range(16))
    body = f"""{LANE} setp.lt.u32 %p1, %r2, 3; mad.wide.u32 %rd1, %r2, 8, %rd0;
        @%p1 ld.global.v2.b32 {{%r4, %r5}}, [%rd1];"""
    execute(body, out, check=check)
    assert asked == [([0, 8, 16], 8)]
    with pytest.raises(Fault, match=r"not there: @%p1 ld\.global"):
        execute(body.replace("%r2, 3", "%r2, 4"), out, check=check)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (".func f()\n.entry k(\n)\n.reqntid 32\n{\nret;\n}", "functions"),
        (".entry k(\n)\n{\nret;\n}", "number of threads"),
        (".entry k(\n)\n.reqntid 32\n{\n.reg .b32 %r<2>;\n@%r1 ret;\n}", "the predicate is no predicate"),
        (".entry k(\n)\n.reqntid 32\n{\n.reg .b32 %r<2>;\nadd.s32 %r1, %r1, (3);\n}", "cannot read"),
        (".entry k(\n)\n.reqntid 32\n{\n(3);\n}", "cannot read"),
    ],
)
def test_a_text_that_is_not_read(text, message):
    with pytest.raises(Fault, match=message):
        parse(text)


def test_a_kernel_without_an_end_is_a_fault():
    with pytest.raises(Fault, match="ends without ret"):
        Program(parse(".entry k(\n)\n.reqntid 32\n{\n.reg .b32 %r<2>;\nmov.b32 %r1, 1;\n}")).run([])
