"""The traffic of the CUDA kernels, counted on the simulator: they read every tensor as often as the design says, write
the output once and in full sectors, and have no bank conflicts in shared memory."""

from __future__ import annotations

import pytest
import torch

from tests.support.simulator import building

if building.missing():
    pytest.skip(building.missing(), allow_module_level=True)

from tests.support.simulator.cases import (
    CHANNELS_LAST,
    CONVOLUTIONS,
    LINEAR,
    Case,
    convolution,
    linear_case,
    name_of,
    tile_of,
)
from tests.support.simulator.harness import Cut, Kernel, Result, shape_of

SECTOR = 32


def identify(value: object) -> str | None:
    return name_of(value) if isinstance(value, torch.dtype) else None if isinstance(value, str) else str(value)


def whole_tiles(kernel: Kernel, dtype: torch.dtype, layout: torch.memory_format, stride: int = 1) -> Case:
    """Images of several whole tiles, ranks and channels of whole passes. NCHW: tiles are 16 wide, for whole sectors."""
    shape, (th, tw) = shape_of(kernel), tile_of(kernel)
    if stride == 2:
        th, tw = th // 2, 8
    elif layout != CHANNELS_LAST:
        th, tw = shape.pixels // 16, 16
    vector, rank = 16 // dtype.itemsize, min(shape.columns, 64)
    return convolution(
        kernel,
        dtype,
        (2 * th, 2 * tw),
        Cut(1, th, tw, 3),
        n=2,
        s=8 * vector,
        r1=rank,
        r2=rank,
        t=shape.columns,
        kernel=(3, 3),
        padding=(1, 1),
        stride=(stride, stride),
        layout=layout,
    )


def halo_positions(case: Case) -> int:
    """How many input positions the tiles read in all: each tile's own, and those around it that lie in the image."""
    p, cut = case.call.problem, case.cut

    def along(size: int, out: int, tile: int, axis: int) -> int:
        first = [begin * p.stride[axis] - p.padding[axis] for begin in range(0, out, tile)]
        length = (tile - 1) * p.stride[axis] + p.kernel[axis]
        return sum(0 <= place < size for begin in first for place in range(begin, begin + length))

    oh, ow = case.call.exact().shape[2:]
    return p.n * along(p.h, oh, cut.h, 0) * along(p.w, ow, cut.w, 1)


def assert_written_once(result: Result, size: int) -> None:
    written = result.traffic("output", "written")
    assert (written["bytes"], written["most"], written["least"]) == (size, 1, 1)
    assert written["sectors"] * SECTOR == size, "the output is written in parts of sectors"
    assert result.traffic("output", "read")["bytes"] == 0


def assert_weights_once(result: Result, names: list[str]) -> None:
    for name in names:
        read = result.traffic(name)
        assert (read["most"], read["least"]) == (result.report["ctas"],) * 2, name
        assert read["bytes"] == result.report["ctas"] * result.report["buffers"][name]["size"], name


@pytest.mark.parametrize("layout", (CHANNELS_LAST, torch.contiguous_format), ids=str)
@pytest.mark.parametrize(("kernel", "dtype"), CONVOLUTIONS, ids=identify)
def test_traffic_of_convolutions(kernel: Kernel, dtype: torch.dtype, layout: torch.memory_format) -> None:
    case = whole_tiles(kernel, dtype, layout)
    result = case.run()
    case.assert_right(result)
    problem, report = case.call.problem, result.report
    assert report["launches"] == 1
    # Each position is read once, and once more for each further tile that has it in its halo.
    read, pixels = result.traffic("input"), problem.n * problem.h * problem.w
    halo_share = halo_positions(case) / pixels - 1
    assert halo_share < (case.cut.h + 2) * (case.cut.w + 2) / (case.cut.h * case.cut.w) - 1
    assert read["bytes"] == (1 + halo_share) * pixels * problem.s * dtype.itemsize
    assert (read["least"], read["most"]) == (1, 4)
    if layout == CHANNELS_LAST:
        assert read["sectors"] * SECTOR == read["bytes"]
    assert_weights_once(result, ["in_factor", *(["core"] if "core" in case.call.tensors else []), "out_factor"])
    assert_written_once(result, result.output.numel() * dtype.itemsize)
    for name in case.call.tensors:
        assert result.traffic(name, "written")["bytes"] == 0


@pytest.mark.parametrize(("kernel", "dtype"), LINEAR, ids=identify)
def test_traffic_of_linear(kernel: Kernel, dtype: torch.dtype) -> None:
    case = linear_case("whole tiles", kernel, dtype)
    result = case.run()
    case.assert_right(result)
    read = result.traffic("input")
    assert (read["least"], read["most"]) == (1, 1)
    assert read["sectors"] * SECTOR == read["bytes"] == case.call.tensors["input"].numel() * dtype.itemsize
    assert_weights_once(result, ["in_factor", "out_factor"])
    assert_written_once(result, result.output.numel() * dtype.itemsize)


# At the end of a stage a warp stores its sums to the hidden tile, four lanes per row. Rows that are an odd multiple of
# 16 bytes apart are right for the reads of the main loops, but meet in some banks when a lane stores more than 4 bytes.
# Largest conflict by size of an element:
STAGE_ENDS = {2: 1, 4: 2, 8: 2}
# CP's depthwise stages walk along lines of the hidden tile; a warp has two lines below 64 channels of 2 bytes.
DEPTHWISE = 2


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize(("kernel", "dtype"), CONVOLUTIONS, ids=identify)
def test_bank_conflicts(kernel: Kernel, dtype: torch.dtype, stride: int) -> None:
    """The main loops have none at stride 1, and at most two-way conflicts at stride 2."""
    case = whole_tiles(kernel, dtype, CHANNELS_LAST, stride)
    result = case.run()
    case.assert_right(result)
    loads = {"sm80": "load_matrices", "simt": "load_shared"}[kernel.family]
    assert result.worst_conflict(loads, f"engine_{kernel.family}.cuh") in (1, stride)
    copies = ["stream_lean.cuh"] if kernel.family == "sm80" else ["copy.cuh", "stream.cuh"]
    assert [result.worst_conflict("copy_async", file) for file in copies] == [1] * len(copies)
    for entry in result.report["conflicts"]:
        file = entry["file"].split("/")[-1]
        if (entry["primitive"], file) == ("store_shared", "block.cuh"):
            allowed = STAGE_ENDS[dtype.itemsize]
        elif file == "depthwise.cuh":
            allowed = DEPTHWISE
        else:
            allowed = stride if file.startswith("engine") else 1
        assert entry["most"] <= allowed, entry


@pytest.mark.parametrize(("kernel", "dtype"), CONVOLUTIONS, ids=identify)
def test_bank_conflicts_in_nchw(kernel: Kernel, dtype: torch.dtype) -> None:
    """The products have none, as in channels_last; copies of single elements and staging the output have some."""
    case = whole_tiles(kernel, dtype, torch.contiguous_format)
    result = case.run()
    case.assert_right(result)
    loads = {"sm80": "load_matrices", "simt": "load_shared"}[kernel.family]
    assert result.worst_conflict(loads, f"engine_{kernel.family}.cuh") == 1
    assert result.worst_conflict("copy_async") <= {2: 1, 4: 4, 8: 2}[dtype.itemsize]
    assert result.worst_conflict("store_shared", "copy.cuh") <= 1
    assert result.worst_conflict("load_shared", "epilogue.cuh") <= {2: 4, 4: 4, 8: 8}[dtype.itemsize]
