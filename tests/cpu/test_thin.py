"""Blocks that leave a kernel little to share: a hidden rank of one, one output channel of the core, few pixels in all.

The fused CPU kernels run them by sums over channels, by dot products along the taps, and with factors read unpacked.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import lowrank_ops
from lowrank_ops.ops.extension import _C
from tests.support.budgets import assert_output
from tests.support.problems import DTYPES, Call, Problem

LAYOUTS = (torch.contiguous_format, torch.channels_last)
WINDOWS = {
    "3x3": dict(kernel=(3, 3), padding=(1, 1)),
    "large, stride": dict(kernel=(5, 7), padding=(2, 3), stride=(2, 2)),
    "dilation": dict(kernel=(3, 2), padding=(3, 3), dilation=(3, 3)),
    "stride and dilation": dict(kernel=(3, 3), padding=(2, 2), stride=(2, 2), dilation=(4, 2)),
    "point": dict(h=20, w=150, kernel=(1, 1)),
    "point, padding": dict(kernel=(1, 1), padding=(1, 2)),
    "wide": dict(w=150, kernel=(3, 3), padding=(1, 1)),
    "point, stride": dict(kernel=(1, 1), stride=(2, 2)),
    "row": dict(kernel=(1, 9), padding=(0, 4)),
    "stride longer than a vector": dict(w=90, kernel=(2, 3), stride=(1, 19)),
    "column of one pixel": dict(w=1, kernel=(3, 3), padding=(1, 1)),
    "narrow image": dict(w=3, kernel=(3, 3), padding=(1, 1)),
    "mostly zeros": dict(h=2, w=2, kernel=(3, 3), padding=(4, 4)),
}
RANKS = {
    "first": dict(r1=1, r2=19),
    "second": dict(r1=11, r2=1),
    "both": dict(r1=1, r2=1),
    "second, pair": dict(r1=8, r2=1),
}
FEW_PIXELS = {
    "one pixel": dict(n=1, h=1, w=1, kernel=(3, 3), padding=(1, 1), stride=(2, 2)),
    "batch of pixels": dict(n=8, h=1, w=1, kernel=(3, 3), padding=(1, 1)),
    "2x2": dict(n=2, h=2, w=2, kernel=(3, 3), padding=(1, 1)),
    "2x4, stride": dict(n=1, h=2, w=4, kernel=(3, 3), padding=(1, 1), stride=(1, 2)),
    "line, dilation": dict(n=1, h=1, w=8, kernel=(1, 3), padding=(0, 2), dilation=(1, 2)),
    "stride and dilation": dict(n=1, h=2, w=4, kernel=(3, 3), padding=(4, 4), stride=(4, 4), dilation=(2, 2)),
    "point": dict(n=2, h=2, w=2, kernel=(1, 1)),
    "no tap inside": dict(n=1, h=1, w=1, kernel=(2, 2), padding=(3, 3), stride=(3, 3)),
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    with lowrank_ops.set_policy("fused"):
        yield
    torch.set_num_threads(before)
    _C.set_cpu_teams("auto")


def plan(call: Call) -> dict[str, object]:
    with lowrank_ops.set_policy("fused"):
        (found,) = lowrank_ops.explain(
            getattr(lowrank_ops, call.problem.op), list(call.tensors.values()), verbose=False, **call.problem.options()
        )
    return found.chosen


def thin(op: str, window: str, ranks: str, **options: object) -> Problem:
    sizes = dict(n=2, h=9, w=37, s=19, t=21, bias=True, activation="relu")
    return Problem(op, **{**sizes, **RANKS[ranks], **WINDOWS[window], **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_ranks_of_one(isa: str, window: str, dtype: torch.dtype) -> None:
    for layout in LAYOUTS:
        for s in (1, 3, 19, 64):  # below and above what a dot product needs
            more = dict(
                s=s, t=1 if s == 3 else 21, activation="silu" if s in (3, 64) else "relu", layout=layout, dtype=dtype
            )
            for ranks in RANKS:
                call = thin("tucker_conv2d", window, ranks, **more).make()
                assert_output(call, call.run())
            call = thin("cp_conv2d", window, "both", **more).make()
            assert_output(call, call.run())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("op", ["tucker_conv2d", "cp_conv2d"])
def test_threads_change_no_bit(op: str, ranks: str, layout: torch.memory_format, threads: None) -> None:
    for window in WINDOWS:
        for dtype in DTYPES:
            call = thin(op, window, ranks, s=40, layout=layout, dtype=dtype).make()
            torch.set_num_threads(1)
            alone = call.run()
            for count in (2, 3, 5):
                torch.set_num_threads(count)
                for teams in ("always", "never"):
                    _C.set_cpu_teams(teams)
                    assert torch.equal(call.run(), alone), (window, dtype, count, teams)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
def test_what_lies_next_to_an_image_is_not_read(
    isa: str,
    ranks: str,
    layout: torch.memory_format,
) -> None:
    """An image cut out of NaN gives the bits of its dense copy, for every remainder of a row."""
    for op in ("tucker_conv2d", "cp_conv2d"):
        for w in range(1, 20):
            call = thin(op, "3x3", ranks, n=1, h=5, w=w, layout=layout).make()
            image = call.tensors["input"]
            around = torch.full([size + 2 for size in image.shape], torch.nan).to(memory_format=layout)
            inner = around[1:-1, 1:-1, 1:-1, 1:-1]
            inner.copy_(image)
            dense = call.run()
            call.tensors["input"] = inner
            assert_output(call, call.run())
            call.tensors["input"] = inner.clone(memory_format=layout)
            assert torch.equal(call.run(), dense)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("ranks", RANKS)
def test_an_image_of_a_batch_has_the_bits_that_it_has_alone(
    ranks: str, layout: torch.memory_format, fused_policy: None
) -> None:
    for op in ("tucker_conv2d", "cp_conv2d"):
        call = thin(op, "3x3", ranks, n=3, layout=layout).make()
        batch = call.run()
        for i in range(3):
            call.tensors["input"] = call.tensors["input"].clone(memory_format=torch.preserve_format)
            single = dict(call.tensors, input=call.tensors["input"][i : i + 1])
            alone = getattr(lowrank_ops, op)(*single.values(), **call.problem.options())
            assert torch.equal(alone, batch[i : i + 1])


# ---- few pixels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pixels", FEW_PIXELS)
def test_cp_of_few_pixels(isa: str, pixels: str, dtype: torch.dtype) -> None:
    """Ranks and channels around vectors, and beyond a block of the dot products' depth."""
    for layout in LAYOUTS:
        for s, r1, t in ((1, 1, 1), (17, 5, 30), (70, 64, 33), (1100, 600, 40), (1031, 1025, 3)):
            sizes = dict(FEW_PIXELS[pixels], s=s, r1=r1, t=t, activation="hardswish")
            call = Problem("cp_conv2d", dtype=dtype, layout=layout, **sizes).make()  # type: ignore[arg-type]
            assert str(plan(call)["kernel"]).endswith("_unpacked")
            assert_output(call, call.run())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("pixels", FEW_PIXELS)
def test_threads_change_no_bit_of_few_pixels(pixels: str, layout: torch.memory_format, threads: None) -> None:
    for dtype in DTYPES:
        call = Problem("cp_conv2d", s=700, r1=530, t=300, dtype=dtype, layout=layout, **FEW_PIXELS[pixels]).make()
        torch.set_num_threads(1)
        alone = call.run()
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(call.run(), alone)


def test_which_images_have_few_pixels() -> None:
    """Up to eight pixels of all images, of input and of output."""
    sizes = dict(s=64, r1=32, t=64, kernel=(3, 3), padding=(1, 1))
    for n, h, w, padding, few in ((8, 1, 1, 1, True), (9, 1, 1, 1, False), (1, 2, 4, 1, True), (1, 3, 3, 1, False),
                                  (1, 3, 3, 0, False), (1, 1, 1, 2, False), (2, 1, 4, 1, True)):  # fmt: skip
        call = Problem("cp_conv2d", **{**sizes, "n": n, "h": h, "w": w, "padding": (padding, padding)}).make()
        assert str(plan(call)["kernel"]).endswith("_unpacked") == few


# ---- linear layers with a rank of one


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_rank_of_one(isa: str, dtype: torch.dtype) -> None:
    """Rows by the hundred, contiguous or not, whose hidden value is a dot product; below and above what that needs."""
    for n in (9, 100, 1300):
        for s in (1, 7, 8, 19, 64, 1000):
            for t in (1, 10, 33, 1024):
                call = Problem("lowrank_linear", n=1, h=n, s=s, r1=1, t=t, dtype=dtype, activation="gelu").make()
                assert_output(call, call.run())
            call.tensors["input"] = call.tensors["input"].mT.contiguous().mT
            assert_output(call, call.run())


def test_threads_change_no_bit_of_a_linear_rank_of_one(threads: None) -> None:
    for dtype in DTYPES:
        call = Problem("lowrank_linear", n=1, h=900, s=100, r1=1, t=40, dtype=dtype).make()
        torch.set_num_threads(1)
        alone = call.run()
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(call.run(), alone)


def test_what_lies_next_to_a_row_is_not_read(isa: str) -> None:
    for s in range(8, 41):
        call = Problem("lowrank_linear", n=1, h=50, s=s, r1=1, t=5).make()
        dense = call.run()
        around = torch.full((1, 52, s + 2), torch.nan)
        around[:, 1:-1, 1:-1] = call.tensors["input"]
        call.tensors["input"] = around[:, 1:-1, 1:-1]
        assert torch.equal(call.run(), dense)
