"""Each instruction that the machine knows, on numbers worked out by hand, which notice another one in its place."""

import math
import re
import struct
from dataclasses import replace

import numpy as np
import ptx_conversions
import ptx_instructions
import ptx_numbers
import pytest
from ptx_assembly import execute
from ptx_cases import BITS, COMPARISONS, INTEGERS
from ptx_float_cases import CONVERSIONS, FLOATS
from ptx_instructions import OPERATIONS, resolve
from ptx_numbers import Fault, Kind

CASES = [*INTEGERS, *BITS, *COMPARISONS, *FLOATS, *CONVERSIONS]
FORMATS = {16: "e", 32: "f", 64: "d"}


def bits_of(number, kind: Kind) -> int:
    if isinstance(number, tuple):
        each = Kind(kind.letters, kind.bits)
        return sum(bits_of(part, each) << k * kind.bits for k, part in enumerate(number))
    if not isinstance(number, float):
        return int(number) & (1 << kind.bits) - 1
    if kind.letters == "bf":
        bits = struct.unpack("<I", struct.pack("<f", number))[0]
        assert bits & 0xFFFF == 0 or math.isnan(number), f"{number} is no bfloat16"
        return bits >> 16
    # A number that the kind has not is rounded here, to what is then put in.
    return int.from_bytes(struct.pack(f"<{FORMATS[kind.bits]}", number), "little")


def load(k: int, kind: Kind) -> tuple[str, str]:
    """How parameter k gets into a register, and which."""
    width = max(kind.bits * kind.packed, 16)
    if kind.letters == "pred":
        return f"ld.param.b32 %r{k}, [p{k}]; setp.ne.b32 %p{k}, %r{k}, 0;", f"%p{k}"
    register = {16: "%rs", 32: "%r", 64: "%rd"}[width] + str(k)
    return f"ld.param.b{width} {register}, [p{k}];", register


def computed(opcode: str, operands: tuple) -> list[int]:
    """The bits of what it writes, read back; of two predicates both."""
    # As long as the row of the table is another one's, its types are still known by the opcode.
    resolved = resolve(opcode)
    loads, registers = zip(*[load(k + 1, kind) for k, kind in enumerate(resolved.sources)], strict=True)
    out = np.zeros(2, np.uint64)
    width = max(resolved.result.bits * resolved.result.packed, 16)
    to = "%p10|%p11" if "x2" in opcode and opcode.startswith("setp") else "%p10"
    if resolved.result.letters == "pred":
        end = "selp.b64 %rd10, 1, 0, %p10; st.global.b64 [%rd0], %rd10;"
        end += "selp.b64 %rd10, 1, 0, %p11; st.global.b64 [%rd0+8], %rd10;" if "|" in to else ""
    else:
        to = {16: "%rs", 32: "%r", 64: "%rd"}[width] + "10"
        end = f"st.global.b{width} [%rd0], {to};"
    values = [bits_of(each, kind) for each, kind in zip(operands, resolved.sources, strict=True)]
    execute("\n".join([*loads, f"{opcode} {to}, {', '.join(registers)};", end]), out, *values)
    return out.tolist()


def check(opcode: str, operands: tuple, result: object) -> None:
    kind, (bits, second) = resolve(opcode).result, computed(opcode, operands)
    if kind.letters == "pred":
        assert (bool(bits), bool(second)) == (result if isinstance(result, tuple) else (result, False))
    elif isinstance(result, float) and math.isnan(result):
        assert np.isnan(kind.decode(np.array([[bits]], kind.register))).all()
    else:
        # What is narrower than its register is extended by its sign.
        width = max(kind.bits * kind.packed, 16)
        assert bits == bits_of(result, replace(kind, bits=width) if kind.bits < 16 else kind)


@pytest.mark.parametrize(("opcode", "operands", "result"), CASES)
def test_by_hand(opcode, operands, result):
    check(opcode, operands, result)


def fails(cases: list) -> bool:
    for case in cases:
        try:
            check(*case)
        except Exception:
            return True
    return False


def cases_of(name: str) -> list:
    """Those that a row of the table is for: not those of a longer beginning."""
    longer = [each for each in OPERATIONS if each.startswith(f"{name}.")]
    return [
        case
        for case in CASES
        if case[0].startswith(f"{name}.") and not any(case[0].startswith(f"{each}.") for each in longer)
    ]


@pytest.fixture
def fresh():
    """What was resolved is forgotten, before and after the table is another one."""
    ptx_instructions.resolve.cache_clear()
    yield
    ptx_instructions.resolve.cache_clear()


# Bits have no sign that an absolute value could take away.
SAME = {("mov", "abs"), ("cvta", "abs")}


@pytest.mark.parametrize("name", OPERATIONS)
def test_another_operation_in_its_place_is_noticed(name, fresh, monkeypatch):
    row, cases = OPERATIONS[name], cases_of(name)
    unnoticed = []
    for other, another in OPERATIONS.items():
        alike = len(row.sources) == len(another.sources) and set(row.letters) & set(another.letters)
        if not alike or (row.result == "pred") != (another.result == "pred") or row.compute is another.compute:
            continue
        monkeypatch.setitem(OPERATIONS, name, replace(row, compute=another.compute))
        resolve.cache_clear()
        if not fails(cases) and (name, other) not in SAME:
            unnoticed.append(other)
        monkeypatch.setitem(OPERATIONS, name, row)
    resolve.cache_clear()
    assert cases and not fails(cases)
    assert not unnoticed


SIGNED = [name for name, row in OPERATIONS.items() if {"s", "u"} <= set(row.letters)]
# Two's complement: the lower half of a sum or product has no sign.
WITHOUT_SIGN = {"add", "sub", "mul.lo", "mad.lo", "setp.eq", "setp.ne", "selp", "mov", "cvta"}


def of_the_other_sign(compute):
    def computed(*numbers):
        kinds = {"i": "u", "u": "i"}
        return compute(*[each.view(kinds[each.dtype.kind] + str(each.itemsize)) for each in numbers])

    return computed


@pytest.mark.parametrize("letter", ["s", "u"])
@pytest.mark.parametrize("name", [each for each in SIGNED if each not in WITHOUT_SIGN])
def test_the_other_sign_is_noticed(name, letter, fresh, monkeypatch):
    cases = [case for case in cases_of(name) if re.search(rf"\.{letter}\d+$", case[0])]
    assert cases and not fails(cases)
    row = OPERATIONS[name]
    monkeypatch.setitem(OPERATIONS, name, replace(row, compute=of_the_other_sign(row.compute)))
    resolve.cache_clear()
    assert fails(cases)


ALTERED = {
    "round_to_bfloat16": lambda numbers: (numbers.astype("f4").view("u4") >> np.uint32(16)).astype("u2"),
    "_to_odd": lambda nearest, too_large, inexact: nearest,
    "_two_product": lambda a, b: (a * b, a * 0),
    "_two_sum": lambda a, b: (a + b, a * 0),
    "as_double": lambda integers: integers.astype(np.float64),
    "flush": lambda numbers: numbers,
    "fused_multiply_add": lambda a, b, c: a * b + c,
    "FLOAT16_NAN": np.uint16(0x7E00),
    "BFLOAT16_NAN": np.uint16(0x7FC0),
    "_saturated": ptx_conversions._wrapped,
    "_to_float": lambda numbers, to: numbers.astype(np.float64),
    "_wrapped": ptx_conversions._saturated,
    "ROUNDINGS": dict.fromkeys(ptx_conversions.ROUNDINGS, np.trunc),
}


@pytest.mark.parametrize("name", ALTERED)
def test_another_rounding_is_noticed(name, fresh, monkeypatch):
    for module in (ptx_numbers, ptx_conversions, ptx_instructions):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, ALTERED[name])
    if name == "fused_multiply_add":
        monkeypatch.setitem(OPERATIONS, "fma", replace(OPERATIONS["fma"], compute=ALTERED[name]))
    assert fails(CASES)


@pytest.mark.parametrize(
    "opcode",
    [
        *("add", "add.s32.s32.", "add.cc.u32", "add.sat.s32", "add.b32", "add.rz.f32", "mul.s32", "mul.wide.f32"),
        *("and.s32", "shl.s32", "setp.lt.and.s32", "setp.lt.b32", "setp.lo.s32", "setp.num.s32", "min.xorsign.f32"),
        *("cvt.rz.f32.f64", "cvt.s32.f32", "cvt.rn.relu.f16.f32", "cvt.rn.satfinite.f16.f32", "cvt.b32.f32", "cvt.u32"),
        *(
            "cvt.rn.e4m3x2.f32",
            "cvt.rn.bf16x2.f64",
            "cvt.rn.relu.bf16x2.f32",
            "cvt.rzi.s32.s32",
            "cvt.rzi.f32.f64",
            "tanh.approx.f32",
            "atom.add.s32",
            "abs.u32",
        ),
        *("add.s32x2", "add.f8", "wgmma", "madc.hi.u32", "mad.lo.cc.u32", "bfe.b32", "popc.u32", "lop3.u32"),
    ],
)
def test_what_is_unknown_is_a_fault(opcode):
    with pytest.raises(Fault, match="unknown instruction"):
        resolve(opcode)
