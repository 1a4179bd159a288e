"""Tests of benchmarks/studies/machine_code.py and steady_ways.py on small functions in nvdisasm's syntax."""

from __future__ import annotations

import pytest

from benchmarks.studies import machine_code, steady_ways
from benchmarks.studies.machine_code import Function
from benchmarks.studies.steady_ways import Loop

PRODUCT, COPY, VECTOR = "HMMA.16816.F32.BF16 R8, R4, R6, R8", "LDGSTS.E.128 [R2], [R4.64], P0", "STG.E.128 [R2.64], R4"


def assembled(*lines: str) -> Function:
    """A function of these instructions (16 bytes each) and labels (".L_x_0:")."""
    text, address = [".text.kernel:"], 0
    for line in lines:
        if line.endswith(":"):
            text.append(line)
            continue
        text.append(f"        /*{address:04x}*/                   {line} ;")
        address += 16
    return machine_code.read_functions(text)["kernel"]


def loops(*lines: str) -> list[Loop]:
    return steady_ways.loops_of(assembled(*lines, "EXIT"))


def test_instructions_are_read() -> None:
    code = assembled("@!P0 BRA `(.L_x_1)", "IADD3 R1, R1, 0x1, RZ", ".L_x_1:", "EXIT")
    assert [(one.address, one.name, one.conditional) for one in code.instructions] == [
        (0, "BRA", True),
        (16, "IADD3", False),
        (32, "EXIT", False),
    ]
    assert code.labels == {".L_x_1": 2}


@pytest.mark.parametrize(
    ("text", "targets", "goes_on"),
    [
        ("BRA `(.L_x_1)", [".L_x_1"], False),
        ("@P0 BRA `(.L_x_1)", [".L_x_1"], True),
        ("BRA.U UP0, `(.L_x_1)", [".L_x_1"], True),
        ("BRA.DIV ~URZ, `(.L_x_1)", [".L_x_1"], True),
        ('BRX R4 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)', [".L_x_1", ".L_x_2"], False),
        ("CALL.REL.NOINC `(.L_x_1)", [".L_x_1"], False),  # how ptxas leaves some loops
        ("CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64)", [], True),
        ("@P0 EXIT", [], True),
        ("EXIT", [], False),
        ("BSSY B0, `(.L_x_1)", [], True),
    ],
)
def test_branches_are_understood(text: str, targets: list[str], goes_on: bool) -> None:
    one = assembled(text).instructions[0]
    assert (one.targets(), one.goes_on()) == (targets, goes_on)


def test_a_loop_without_alternatives() -> None:
    (loop,) = loops("MOV R1, R2", ".L_x_0:", PRODUCT, PRODUCT, "IADD3 R1", "NOP", "@P0 BRA `(.L_x_0)")
    way = loop.steady
    assert (loop.kind, loop.first, loop.last, loop.depth) == ("steps", 16, 80, 1)
    assert (way.instructions, way.longest, way.count.products, way.per_product) == (4, 4, 2, 2.0)
    assert way.per_copy is way.per_vector is None


CHUNK = (
    ".L_x_0:",
    "ISETP P0",
    "@P0 BRA `(.L_x_3)",  # the stream has ended: no copies
    "@P1 BRA `(.L_x_1)",
    *(COPY, COPY, "IADD3 R1", "IADD3 R1", "BRA `(.L_x_2)"),  # a chunk of two copies ...
    ".L_x_1:",
    *(COPY, "IADD3 R1"),  # ... or of one
    ".L_x_2:",
    "@P2 BRA `(.L_x_3)",
    *("IADD3 R2",) * 10,  # the end of a row
    ".L_x_3:",
    *(PRODUCT,) * 4,
    "@P3 BRA `(.L_x_0)",
)


def test_most_copies_count_with_the_least_bookkeeping() -> None:
    (loop,) = loops(*CHUNK)
    way = loop.steady
    assert (loop.kind, way.count.products, way.count.copies) == ("chunk", 4, 2)
    assert (way.instructions, way.longest, way.without_copies) == (14, 24, 7)
    assert (way.per_product, way.per_copy) == (14 / 4, 7 / 2)
    assert [(one.count.copies, one.instructions) for one in loop.ways] == [(2, 14), (1, 11), (0, 7)]


def test_of_two_factors_the_costlier_counts() -> None:
    (loop,) = loops(
        *(".L_x_0:", "@P0 BRA `(.L_x_1)", COPY, "BRA `(.L_x_2)"),
        *(".L_x_1:", "IADD3 R1", "IADD3 R1", COPY),
        *(".L_x_2:", PRODUCT, "@P1 BRA `(.L_x_0)"),
    )
    assert [one.instructions for one in loop.ways] == [6, 5]


NESTED = (
    *(".L_x_0:", "IADD3 R1", "@P0 BRA `(.L_x_2)"),
    *(".L_x_1:", *(PRODUCT,) * 8, "@P1 BRA `(.L_x_1)"),
    *(".L_x_2:", "@P2 BRA `(.L_x_3)", *(PRODUCT,) * 2),  # the remainder
    *(".L_x_3:", "@P3 BRA `(.L_x_0)"),
)


def test_a_nested_loop_counts_once_and_its_remainder_not() -> None:
    outer, inner = loops(*NESTED)
    assert (outer.depth, inner.depth, inner.steady.instructions, outer.own.products) == (1, 2, 9, 2)
    assert (outer.steady.count.products, outer.steady.instructions) == (8, 2 + 9 + 2)


def test_code_moved_behind_the_end_is_no_loop() -> None:
    """A wait that spins there branches back over everything that lies between."""
    found = loops(
        *(".L_x_0:", "SYNCS P0", "@!P0 BRA `(.L_x_9)", ".L_x_1:", PRODUCT, "@P1 BRA `(.L_x_0)"),
        *("IADD3 R1", "IADD3 R1", "EXIT"),
        *(".L_x_9:", "SYNCS P0", "@!P0 BRA `(.L_x_9)", "BRA `(.L_x_1)"),
    )
    assert [(one.kind, one.steady.instructions, one.depth) for one in found] == [("steps", 4, 1), ("", 2, 2)]


def test_branches_by_a_table_are_followed() -> None:
    (loop,) = loops(
        *(".L_x_0:", 'BRX R4 -0x10 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)'),
        *(".L_x_1:", "IADD3 R1", "IADD3 R1", "BRA `(.L_x_3)"),
        *(".L_x_2:", "IADD3 R1"),
        *(".L_x_3:", PRODUCT, "@P1 CALL.REL.NOINC `(.L_x_4)", "BRA `(.L_x_0)", ".L_x_4:"),
    )
    assert (loop.steady.instructions, loop.steady.longest) == (5, 7)


def test_output_vectors_count_beyond_a_way_without_them() -> None:
    (loop,) = loops(
        *(".L_x_0:", PRODUCT, "@P0 BRA `(.L_x_1)"),
        *("FADD R1", "FFMA R1", VECTOR, "@!P1 ST.E.128 [R2.64], R4", "STG.E.64 [R2.64], R4"),
        *(".L_x_1:", "@P2 BRA `(.L_x_0)"),
    )
    way = loop.steady
    assert (loop.kind, way.count.vectors, way.without_vectors, way.per_vector) == ("output", 2, 3, 2.5)


def test_the_costliest_way_to_write_counts_beyond_the_longest_way_without_vectors() -> None:
    (loop,) = loops(
        *(".L_x_0:", PRODUCT, "@P2 BRA `(.L_x_1)", "IADD3 R1"),  # of all ways alike
        *(".L_x_1:", "@P0 BRA `(.L_x_3)"),
        *("FADD R1", "@P3 BRA `(.L_x_2)", "FMNMX R1", "FMNMX R1"),  # an activation
        *(".L_x_2:", VECTOR, VECTOR),
        *(".L_x_3:", "@P4 BRA `(.L_x_0)"),
    )
    way = loop.steady
    assert (way.instructions, way.longest, way.longest_without_vectors) == (8, 11, 5)
    assert (way.per_vector, way.most_per_vector) == (2.0, 3.0)


def test_staged_vectors_count_where_tma_stores_them() -> None:
    staging = ("STSM.16.M88.4 [R1], R4", "STSM.16.M88.4 [R1], R8", "STSM.16.M88.2 [R1], R4")
    (stores,) = loops(".L_x_0:", *staging, "UTMASTG.4D [UR4], [UR6]", "@P0 BRA `(.L_x_0)")
    (keeps,) = loops(".L_x_0:", *staging, "@P0 BRA `(.L_x_0)")
    assert (stores.steady.count.vectors, keeps.steady.count.vectors) == (2, 0)


def test_wgmma_counts_by_its_columns() -> None:
    names = ("HGMMA.64x104x16.F32.BF16", "HGMMA.64x64x16.F32", "HGMMA.64x8x16.F16")  # the last one commits a group
    (loop,) = loops(".L_x_0:", *(f"{name} R24, gdesc[UR4], R24" for name in names), "@P0 BRA `(.L_x_0)")
    assert (loop.steady.count.products, loop.steady.count.issued) == (13 + 8, 2)


def test_multiply_adds_belong_to_the_way_but_not_to_the_products() -> None:
    (loop,) = loops(
        ".L_x_0:", PRODUCT, "@P0 BRA `(.L_x_1)", *("FFMA R1",) * 4, "LDS R1", "LDS R1", ".L_x_1:", "@P1 BRA `(.L_x_0)"
    )
    way = loop.steady
    assert (way.instructions, way.per_product, way.per_multiply_add) == (9, 3.0, 1.5)


@pytest.mark.parametrize(
    ("text", "divisions"),
    [
        ("I2F.U32.RP R4, R5", 1),
        ("I2F.U32 R4, R5", 0),
        ("MUFU.RCP R4, R5", 0),
        ("CALL.REL.NOINC `($__internal_0_$__cuda_sm20_rem_u64)", 1),
        ("CALL.REL.NOINC `($__internal_0_$__cuda_sm3x_div_rn_noftz_f32_slowpath)", 0),
    ],
)
def test_divisions_of_integers_are_found(text: str, divisions: int) -> None:
    outer, inner = loops(".L_x_0:", "IADD3 R1", ".L_x_1:", text, "@P0 BRA `(.L_x_1)", "@P1 BRA `(.L_x_0)")
    assert (outer.divisions, inner.divisions) == (divisions, divisions)


def test_a_loop_with_two_entries_inside_is_refused() -> None:
    with pytest.raises(
        RuntimeError, match="a loop with one entry is required, got a second one inside the loop at 0x0"
    ):
        loops(
            *(".L_x_0:", "@P0 BRA `(.L_x_2)", ".L_x_1:", "IADD3 R1", ".L_x_2:", "IADD3 R1"),
            *("@P1 BRA `(.L_x_1)", "@P2 BRA `(.L_x_0)"),
        )
