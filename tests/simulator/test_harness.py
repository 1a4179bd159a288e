"""The simulator itself: it computes like the hardware, counts costs, and reports the mistakes that it is made for."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from tests.support.simulator import building, harness
from tests.support.simulator.harness import Result, Settings

pytestmark = pytest.mark.skipif(bool(building.missing()), reason=building.missing() or "g++ is there")

ORDERS = {
    "ascending": Settings(order=0),
    "descending": Settings(order=1),
    "shuffled": Settings(order=2, seed=3),
}


def words(count: int) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.int32)


def launch(name: str, *arguments: int, threads: int = 64, shared_bytes: int = 4096, **settings: int) -> Result:
    data, output = words(4096), torch.zeros(4096, dtype=torch.int32)
    return harness.selftest(
        name, data, output, *arguments, threads=threads, shared_bytes=shared_bytes, settings=Settings(**settings)
    )


# ---- Matrices


def fragments(dtype: torch.dtype, values: Tensor) -> Tensor:
    """A matrix as words: 8 per row."""
    return values.to(dtype).contiguous().view(torch.int32)


def truncated(values: Tensor) -> Tensor:
    """fp32 values as tf32: the low 13 bits cut off."""
    return (values.view(torch.int32) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32"])
def test_multiply_add(dtype: str) -> None:
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}[dtype]
    depth = 8 if dtype == "tf32" else 16
    a, b, c = torch.randn(16, depth), torch.randn(8, depth), torch.randn(16, 8)
    if dtype == "fp16":
        a[0, :4], b[:, :4] = 3e-6, 7e-7  # subnormals are not flushed
    if dtype == "tf32":
        a, b = truncated(a), truncated(b)
    data = torch.cat([fragments(torch_dtype, part).flatten() for part in (a, b)] + [c.view(torch.int32).flatten()])
    output = torch.empty(16, 8)
    result = harness.selftest(f"multiply_{dtype}", data, output.view(torch.int32))
    assert result.error == ""
    a, b = a.to(torch_dtype).double(), b.to(torch_dtype).double()
    exact = a @ b.T + c.double()
    # Sums of 17 terms in fp32, in any order.
    bound = 17 * 2**-24 * (a.abs() @ b.abs().T + c.double().abs())
    assert ((output.double() - exact).abs() <= bound).all()
    assert (exact - c).norm() > 1


@pytest.mark.parametrize("place", [5, 16 * 8 + 5])
def test_products_of_numbers_that_were_not_rounded(place: int) -> None:
    """In tf32 both operands must be rounded before."""
    data = torch.ones(16 * 8 + 8 * 8 + 16 * 8).view(torch.int32)
    data[place] += 0x1000
    result = harness.selftest("multiply_tf32", data, torch.empty(16 * 8, dtype=torch.int32))
    assert "a product of a number that was not rounded to tf32" in result.error


@pytest.mark.parametrize("name", ["matrices", "matrices_lean"])
def test_load_matrices(name: str) -> None:
    data, output = torch.randint(2**31, (32, 4), dtype=torch.int32), torch.zeros(32, 4, dtype=torch.int32)
    assert harness.selftest(name, data, output).error == ""
    # Lane i gets word i % 4 of row i / 4 of each matrix.
    assert torch.equal(output, data.view(4, 8, 4).permute(1, 2, 0).reshape(32, 4))


def test_load_matrices_shifted_is_seen() -> None:
    data = words(128).view(32, 4)
    output = torch.zeros(32, 4, dtype=torch.int32)
    result = harness.selftest("matrices", data, output, settings=Settings(shift_load_matrices=16))
    assert "uninitialized read" in result.error  # it read the padding between rows


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_threads(order: str) -> None:
    data, output = words(1), torch.full((96,), -1, dtype=torch.int32)
    assert harness.selftest("order", data, output, threads=96, settings=ORDERS[order]).error == ""
    found = output.tolist()
    assert sorted(found) == list(range(96))
    assert (found == sorted(found)) == (order == "ascending")
    assert (found == sorted(found)[::-1]) == (order == "descending")


# ---- Numbers


def converted(kind: int, data: Tensor) -> Tensor:
    output = torch.zeros(data.numel(), dtype=torch.int32)
    result = harness.selftest("convert", data, output, data.numel(), kind, threads=128)
    assert result.error == ""
    return output


def floats() -> Tensor:
    """The bits of fp32 numbers: random ones, and those around every rounding boundary of the 16-bit formats."""
    every16 = torch.arange(2**16, dtype=torch.int32)
    boundaries = [
        (every16 << 16) + offset for offset in (-1, 0, 1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001, 0x3000)
    ]
    halves = every16.to(torch.int16).view(torch.float16).float().view(torch.int32)
    ties = [halves + offset for offset in (-1, 0, 1, 0x0FFF, 0x1000, 0x1001)]  # half a unit of normal numbers
    small = torch.arange(-8192, 8192).double().mul(2.0**-26).float().view(torch.int32)  # quarters of 2^-24
    random = torch.randint(-(2**31), 2**31, (100_000,), dtype=torch.int64).to(torch.int32)
    return torch.cat([*boundaries, *ties, small, small + 1, small - 1, random])


@pytest.mark.parametrize(("kind", "dtype"), [(0, torch.bfloat16), (1, torch.float16)])
def test_narrow_rounds_to_nearest_even(kind: int, dtype: torch.dtype) -> None:
    data = floats()
    found = converted(kind, data).to(torch.int16)
    values = data.view(torch.float32)
    expected = values.to(dtype).view(torch.int16)
    expected[values.isnan()] = 0x7FFF  # CUDA's NaN
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("kind", "dtype"), [(5, torch.bfloat16), (6, torch.float16)])
def test_narrow_pair(kind: int, dtype: torch.dtype) -> None:
    """The first number is in the low half of the word."""
    data = floats()
    found = converted(kind, data).view(torch.int16).view(-1, 2)
    values = data.view(torch.float32)
    for half, expected in enumerate((values.to(dtype), (-values).to(dtype))):
        bits = expected.view(torch.int16).clone()
        bits[values.isnan()] = 0x7FFF
        assert torch.equal(found[:, half], bits)


@pytest.mark.parametrize(
    ("kind", "dtype", "high"),
    [
        (7, torch.float32, 6),
        (8, torch.bfloat16, 6),
        (9, torch.float16, 6),
        (10, torch.bfloat16, torch.inf),
        (11, torch.float16, torch.inf),
    ],
)
def test_clamps(kind: int, dtype: torch.dtype, high: float) -> None:
    """The same as clamping before rounding; a NaN stays a NaN."""
    data = floats()
    values, found = data.view(torch.float32), converted(kind, data).view(dtype).view(len(data), -1)
    for part, clamped in zip(found.T, (values, -values), strict=False):
        assert torch.equal(part.isnan(), values.isnan())
        assert torch.equal(part[~values.isnan()], clamped[~values.isnan()].clamp(0, high).to(dtype))


@pytest.mark.parametrize(("kind", "dtype"), [(3, torch.bfloat16), (4, torch.float16)])
def test_widen(kind: int, dtype: torch.dtype) -> None:
    data = torch.arange(2**16, dtype=torch.int32)
    found, expected = converted(kind, data).view(torch.float32), data.to(torch.int16).view(dtype).float()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()].view(torch.int32), expected[~expected.isnan()].view(torch.int32))


def test_round_to_tf32() -> None:
    data = floats()
    values, found = data.view(torch.float32), converted(2, data).view(torch.float32)
    assert (found.view(torch.int32)[~values.isnan()] & 0x1FFF == 0).all()
    assert torch.equal(found.isnan(), values.isnan())
    assert torch.equal(found[values.isinf()], values[values.isinf()])
    finite = values.isfinite() & found.isfinite()
    unit = truncated(values.abs()).view(torch.int32).add(0x2000).view(torch.float32).double() - truncated(values.abs())
    error = found.double().abs() - values.double().abs()
    finite &= unit.isfinite()
    # The error is at most half a unit in the last place, and ties go away from zero.
    assert (error.abs() <= unit / 2)[finite].all() and (error != -unit / 2)[finite].all()


# ---- Shared memory: values, and mistakes that must be reported


@pytest.mark.parametrize(("name", "bytes_"), [("copy_4", 4), ("copy_8", 8), ("copy_16", 16), ("copy_lean", 16)])
@pytest.mark.parametrize("order", ORDERS)
def test_copies_arrive(order: str, name: str, bytes_: int) -> None:
    data = words(64 * 2 * bytes_ // 4)
    output = torch.zeros_like(data)
    result = harness.selftest(name, data, output, 3, threads=64, settings=ORDERS[order])
    assert result.error == ""
    expected = data.view(64, -1).clone()
    expected[::3] = 0  # those copies are not valid
    assert torch.equal(output.view(64, -1), expected)


def test_skipping_the_zero_fill_changes_the_result() -> None:
    data, output = words(128), torch.zeros(128, dtype=torch.int32)
    result = harness.selftest("copy_4", data, output, 3, threads=64, settings=Settings(skip_zero_fill=True))
    assert result.error == ""
    assert (output.view(64, 2)[::3] == 0xDEADBEEF - 2**32).all()  # the old contents


@pytest.mark.parametrize("order", (0, 1, 2))
@pytest.mark.parametrize("reads_first", (0, 1))
@pytest.mark.parametrize(
    ("wait", "other_warp", "caught"),
    [(0, 0, True), (0, 1, True), (1, 0, False), (1, 1, True), (2, 0, False), (2, 1, False)],
)
def test_races(wait: int, other_warp: int, caught: bool, reads_first: int, order: int) -> None:
    result = launch("exchange", wait, 1, other_warp, reads_first, order=order)
    assert ("race" in result.error) == caught, result.error
    assert ("selftest.cpp:" in result.error) == caught
    if not caught:
        threads = torch.arange(64)
        expected = (threads + 32) % 64 if other_warp else threads // 32 * 32 + (threads + 1) % 32
        assert torch.equal(result.output[:64], expected.int())


@pytest.mark.parametrize(("wait", "name"), [(1, "kStagingWritten"), (2, "kChunk")])
@pytest.mark.parametrize("reads_first", (0, 1))
def test_a_skipped_barrier_is_a_race(wait: int, name: str, reads_first: int) -> None:
    number = harness.barriers()[name]
    assert launch("exchange", wait, 1, 0, reads_first).report["barriers"][str(number)] > 0
    assert "race" in launch("exchange", wait, 1, 0, reads_first, skip_barrier=number).error
    other = harness.barriers()["kDepthwise"]
    assert launch("exchange", wait, 1, 0, reads_first, skip_barrier=other).error == ""


def test_own_accesses_do_not_race() -> None:
    assert launch("exchange", 0, 0, 0, 0).error == ""
    assert launch("exchange", 0, 0, 0, 1).error == ""


def test_halves_of_a_word_are_apart() -> None:
    assert launch("halves", 1).error == ""
    assert "race" in launch("halves", 0).error


@pytest.mark.parametrize("epochs", (3, 10_000))
def test_many_epochs(epochs: int) -> None:
    """More barriers than the bits of an epoch can count cause no false alarm, and the last race is still seen."""
    result = launch("many_epochs", epochs, 0)
    assert result.error == ""
    assert (result.output[:64] == epochs).all()
    assert "race" in launch("many_epochs", epochs, 1).error


@pytest.mark.parametrize("case", range(3))
def test_uninitialized_reads(case: int) -> None:
    assert "uninitialized read" in launch("uninitialized", case, threads=32).error


@pytest.mark.parametrize("order", (0, 1, 2))
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (0, "^$"),
        (1, "under way"),
        (2, "race|under way"),
        (3, "race|under way"),
        (4, "never waited for"),
        (5, "under way"),
        (6, "race at byte .*(copy_async, which thread .* read|load_shared, which thread .* wrote)"),
        (7, "under way"),
        (8, "race at byte 0 .*copy_async, which thread .* wrote"),
    ],
)
def test_asynchronous_copies(mistake: int, message: str, order: int) -> None:
    assert re.search(message, launch("copies", mistake, order=order).error)


def test_ignored_waits_are_seen() -> None:
    assert "under way" in launch("copies", 0, ignore_waits=1).error


# ---- Threads


@pytest.mark.parametrize(
    ("case", "message"),
    [*((case, "deadlock") for case in (0, 1, 2, 5)), (3, "different instructions"), (4, "different barriers")],
)
@pytest.mark.parametrize("order", (0, 1, 2))
def test_threads_that_never_meet(case: int, message: str, order: int) -> None:
    result = launch("deadlock", case, order=order)
    assert message in result.error and result.code != 0
    if case == 1:
        assert "63 threads wait in barrier" in result.error and "1 have ended" in result.error
    assert launch("exchange", 2, 1).error == ""  # the next launch is not affected


def test_lanes_may_diverge_between_meetings() -> None:
    result = launch("divergent", threads=32)
    assert result.error == ""
    assert torch.equal(result.output[:32], torch.arange(32).mul(torch.arange(1, 33)).div(2).int())


# ---- Bounds


@pytest.mark.parametrize(
    ("case", "message"),
    {
        0: "shared memory has 64 bytes",
        1: "shared memory has 64 bytes",
        2: "not aligned",
        3: "outside of every tensor: at byte 64 of in",
        4: "not aligned",
        5: "outside of every tensor",
        6: "copy_async of 16 bytes at byte 8 of in: not aligned",
        7: "copy_async of 16 bytes at offset 8 of shared memory: not aligned",
        8: "outside of every tensor",
    }.items(),
)
def test_accesses_outside(case: int, message: str) -> None:
    storage = torch.zeros(4096, dtype=torch.int32)  # `in` and `out` lie far apart in one storage
    data, output = storage[64:80], storage[2064:2080]
    result = harness.selftest("outside", data, output, case, 64, shared_bytes=64)
    assert message in result.error


def test_copies_that_are_not_valid_read_nothing() -> None:
    data, output = words(16), torch.full((32,), 7, dtype=torch.int32)
    result = harness.selftest("outside", data, output, 9, 64, shared_bytes=512)
    assert result.error == "" and (output == 0).all()
    assert result.traffic("in")["bytes"] == 0


# ---- Counters


@pytest.mark.parametrize(
    ("bytes_", "stride", "ways"),
    [
        (2, 2, 1),  # two lanes share a word
        (2, 64, 16),
        (4, 0, 1),  # one word for all
        (4, 4, 1),
        (4, 8, 2),
        (4, 64, 16),
        (4, 128, 32),
        (4, 132, 1),
        (8, 8, 1),  # half a warp is served at a time
        (8, 16, 2),
        (8, 72, 1),
        (16, 16, 1),  # eight lanes are served at a time
        (16, 32, 2),
        (16, 128, 8),
        (16, 80, 1),
    ],
)
def test_bank_conflicts(bytes_: int, stride: int, ways: int) -> None:
    result = launch("strided_shared", bytes_, stride, 0, 32, threads=32, shared_bytes=8192)
    assert result.error == ""
    assert result.worst_conflict("load_shared") == ways
    assert result.worst_conflict("load_shared", "primitives.cuh") == 0  # no access is attributed to that file
    if stride >= bytes_:
        assert result.worst_conflict("store_shared", "selftest.cpp") == ways


@pytest.mark.parametrize(("stride", "ways"), [(16, 1), (32, 2), (64, 4), (128, 8), (80, 1), (144, 1), (272, 1), (0, 1)])
def test_bank_conflicts_of_load_matrices(stride: int, ways: int) -> None:
    result = launch("matrix_rows", stride, threads=32, shared_bytes=32 * stride + 16)
    assert result.error == ""
    assert result.worst_conflict("load_matrices") == ways
    (entry,) = [entry for entry in result.report["conflicts"] if entry["primitive"] == "load_matrices"]
    assert (entry["phases"], entry["ways"]) == (4, 4 * ways)


@pytest.mark.parametrize(
    ("bytes_", "stride", "offset", "lanes", "sectors"),
    [
        (2, 2, 0, 32, 2),
        (4, 4, 0, 32, 4),
        (4, 4, 16, 32, 5),  # off by half a sector
        (4, 8, 0, 32, 8),
        (4, 32, 0, 32, 32),
        (4, 4, 0, 9, 2),
        (8, 8, 0, 32, 8),
        (16, 16, 0, 32, 16),
        (16, 16, 0, 1, 1),
        (16, 64, 0, 32, 32),
    ],
)
def test_sectors(bytes_: int, stride: int, offset: int, lanes: int, sectors: int) -> None:
    result = launch("strided_global", bytes_, stride, offset, lanes, threads=32)
    assert result.error == ""
    for tensor, kind in (("in", "read"), ("out", "written")):
        expected = {"bytes": bytes_ * lanes, "distinct_bytes": bytes_ * lanes, "most": 1, "least": 0}
        assert result.traffic(tensor, kind) == {**expected, "sectors": sectors, "requests": 1}
    assert result.traffic("in", "written")["bytes"] == 0


@pytest.mark.parametrize("order", (0, 1, 2))
def test_instructions_of_lanes_that_skip_some(order: int) -> None:
    """Lane i loads i words: 31 load instructions, not 496, and the store that follows is one for all lanes."""
    result = launch("divergent", threads=32, order=order)
    assert result.traffic("in")["requests"] == 31
    assert result.traffic("in")["bytes"] == 4 * 496
    assert (result.traffic("out", "written")["requests"], result.traffic("out", "written")["sectors"]) == (1, 4)
    # In each of 4 rounds all lanes do one load and every second lane three; a load reads 4 sectors.
    result = launch("guarded", threads=32, order=order)
    assert (result.traffic("in")["requests"], result.traffic("in")["sectors"]) == (16, 64)
    assert (result.traffic("out", "written")["requests"], result.traffic("out", "written")["sectors"]) == (4, 16)


def test_the_shifted_tensor_only() -> None:
    result = launch("strided_global", 4, 4, 0, 32, threads=32, shift_buffer=0)
    assert torch.equal(result.output[:32], torch.arange(2, 34, dtype=torch.int32))
    last = launch("strided_global", 4, 4, 4 * 4064, 32, threads=32, shift_buffer=0)
    assert last.error == "" and last.output[-1] == 4095  # the shift does not leave the tensor
    other = launch("strided_global", 4, 4, 0, 32, threads=32, shift_buffer=1)
    assert torch.equal(other.output[:32], torch.arange(1, 33, dtype=torch.int32))


def test_limits_of_a_launch() -> None:
    assert launch("exchange", 2, 1, threads=33).code == 9  # cudaErrorInvalidConfiguration
    assert launch("exchange", 2, 1, threads=2048).code == 9
    assert launch("exchange", 2, 1, shared_bytes=100_000, shared_limit=99_000).code == 1  # cudaErrorInvalidValue
