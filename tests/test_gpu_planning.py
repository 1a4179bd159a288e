"""The planner for GPUs: every named GPU's plans, on any machine (tests of the kernels themselves are elsewhere)."""

from __future__ import annotations

import itertools
import os
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import lowrank_ops
from benchmarks import fit_gpu_cost, gpu_choices
from lowrank_ops._ops import _C

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
CSRC = Path(__file__).parent.parent / "csrc"
KERNELS = _C.gpu_kernels()
GPUS = {gpu["name"]: gpu for gpu in _C.named_gpus()}
OPS = ("tucker_conv2d", "cp_conv2d", "lowrank_linear")
CHAIN = "chain of torch ops"
MOST_CTAS = 2**31 - 1


@pytest.fixture(autouse=True)
def _former_state() -> Iterator[None]:
    policy = lowrank_ops.policy()
    yield
    lowrank_ops.set_policy(policy)
    _C.force_gpu_kernel("")
    _C.forget_measurements()


@dataclass(frozen=True)
class Problem:
    """One call of an op, by its numbers."""

    op: str = "tucker_conv2d"
    dtype: str = "bfloat16"
    channels_last: bool = True
    n: int = 8
    s: int = 64
    h: int = 28
    w: int = 28
    t: int = 96
    r1: int = 32
    r2: int = 32
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    tf32: bool = False

    def described(self) -> tuple[object, ...]:
        """As _C takes it."""
        if self.op == "lowrank_linear":
            sizes, window = [self.n, self.s, 1, 1, self.t, self.r1, self.r1, 1, 1], [1, 1, 0, 0, 1, 1]
        else:
            r2 = self.r1 if self.op == "cp_conv2d" else self.r2
            sizes = [self.n, self.s, self.h, self.w, self.t, self.r1, r2, *self.kernel]
            window = [*self.stride, *self.padding, *self.dilation]
        return (self.op, self.dtype, self.channels_last, sizes, window, self.tf32)

    def output(self) -> tuple[int, int]:
        """Height and width of the output; a linear layer is one line of rows."""
        if self.op == "lowrank_linear":
            return 1, self.n
        sizes = [
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, k, s, p, d in zip(
                (self.h, self.w), self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        return sizes[0], sizes[1]

    def shapes(self) -> list[tuple[int, ...] | None]:
        if self.op == "lowrank_linear":
            return [(self.n, self.s), (self.r1, self.s), (self.t, self.r1)]
        r2 = self.r1 if self.op == "cp_conv2d" else self.r2
        middle = (
            [(self.r1, self.kernel[0]), (self.r1, self.kernel[1])]
            if self.op == "cp_conv2d"
            else [(r2, self.r1, *self.kernel)]
        )
        return [(self.n, self.s, self.h, self.w), (self.r1, self.s), *middle, (self.t, r2)]

    def explain(self, device: str) -> lowrank_ops.Explanation:
        window = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        (found,) = lowrank_ops.explain(
            getattr(lowrank_ops, self.op),
            self.shapes(),
            dtype=getattr(torch, self.dtype),
            device=device,
            memory_format=torch.channels_last if self.channels_last else torch.contiguous_format,
            verbose=False,
            **({} if self.op == "lowrank_linear" else window),
        )
        return found


def drawn(seed: int) -> Problem:
    """A random problem with an output."""
    draw = random.Random(seed)
    while True:
        kernel = (draw.choice((1, 2, 3, 5, 7)), draw.choice((1, 2, 3, 5)))
        problem = Problem(
            op=draw.choice(OPS),
            dtype=draw.choice(("bfloat16", "float16", "float32", "float64")),
            channels_last=draw.random() < 0.7,
            n=draw.choice((1, 2, 3, 8, 32, 1000)),
            s=draw.choice((1, 3, 36, 64, 256, 2048)),
            h=draw.choice((1, 5, 7, 14, 28, 57, 224)),
            w=draw.choice((1, 6, 7, 14, 28, 56, 224)),
            t=draw.choice((1, 10, 64, 100, 512, 4096)),
            r1=draw.choice((1, 5, 16, 33, 64, 128, 400)),
            r2=draw.choice((1, 6, 16, 64, 100, 256)),
            kernel=kernel,
            stride=(draw.choice((1, 2, 3)), draw.choice((1, 2, 4))),
            padding=(draw.choice((0, 1, 3)), draw.choice((0, 1, 2))),
            dilation=(draw.choice((1, 1, 2, 6)), draw.choice((1, 1, 3))),
            tf32=draw.random() < 0.5,
        )
        if min(problem.output()) > 0:
            return problem


def plan(problem: Problem, kernel: str, gpu: str, **options: object) -> dict[str, object]:
    return _C.plan_gpu_kernel(problem.described(), kernel, gpu, **options)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("seed", range(40))
def test_plans_fit_the_gpu(gpu: str, seed: int) -> None:
    problem = drawn(seed)
    for kernel in KERNELS:
        if kernel["op"] != problem.op:
            continue
        found = plan(problem, kernel["name"], gpu)
        if found["reason"]:
            assert re.search(r"\d", found["reason"]) and found["reason"] == found["reason"].strip(), (problem, kernel)
            continue
        images, height, width = found["tile"]
        assert 1 <= images * height * width <= kernel["pixels"], (problem, found)
        assert images == 1 or problem.op != "lowrank_linear"
        assert 0 < found["shared_bytes"] <= GPUS[gpu]["shared_bytes_cta"], (problem, found)
        assert found["threads"] == kernel["threads"] <= 1024
        assert 2 <= found["stages"] <= 4
        passes = -(-problem.t // kernel["columns"])
        assert 1 <= found["splits"] <= passes
        assert 1 <= found["ctas"] <= MOST_CTAS
        assert found["waves"] > 0 and found["predicted_seconds"] > 0 and found["flops"] > 0
        rows, columns, tiles = _C.gpu_tiles(problem.described(), found["tile"])
        assert found["ctas"] == tiles * found["splits"]
        assert len(rows["outputs"]) * len(columns["outputs"]) * -(-problem.n // images) == tiles or (
            problem.op == "lowrank_linear"
        )


@pytest.mark.parametrize("seed", range(60))
def test_tiles_cover_every_output_once_and_halos_hold_what_it_needs(seed: int) -> None:
    """Brute force over both axes: a tile's outputs, and the input positions of its halo."""
    draw = random.Random(seed)
    problem = replace(drawn(seed), op=draw.choice(OPS[:2]), h=draw.randint(1, 30), w=draw.randint(1, 30))
    if min(problem.output()) <= 0:
        problem = replace(problem, h=40, w=40)
    tile = [draw.randint(1, 3), draw.randint(1, 9), draw.randint(1, 9)]
    for axis, found in enumerate(_C.gpu_tiles(problem.described(), tile)[:2]):
        outputs = problem.output()[axis]
        covered = sorted(output for one in found["outputs"] for output in one if output < outputs)
        assert covered == list(range(outputs)), (problem, tile)
        for one_outputs, one_inputs in zip(found["outputs"], found["inputs"], strict=True):
            for position, output in enumerate(one_outputs):
                for tap in range(problem.kernel[axis]):
                    wanted = output * problem.stride[axis] - problem.padding[axis] + tap * problem.dilation[axis]
                    assert one_inputs[position * found["stride"] + tap] == wanted, (problem, tile)


def test_a_dilated_tile_has_the_halo_of_an_undilated_one() -> None:
    problem = Problem(h=64, w=64, dilation=(6, 6), padding=(6, 6))
    rows, columns, _ = _C.gpu_tiles(problem.described(), [1, 8, 16])
    assert (len(rows["inputs"][0]), len(columns["inputs"][0])) == (10, 18)


def problem_for(line: dict[str, object]) -> Problem:
    """One that this kernel takes on a GPU of its architecture."""
    wide = line["family"] == "sm90a" and line["columns"] == 128
    return Problem(str(line["op"]), r1=72 if wide else 32, r2=72 if wide else 32, tf32=line["family"] == "sm80")


@pytest.mark.parametrize("line", KERNELS, ids=lambda line: line["name"])
def test_the_table_agrees_with_the_kernels(line: dict[str, object]) -> None:
    """Each line has a launcher, and its name says what geometry.h says."""
    stem = {"tucker_conv2d": "tucker", "cp_conv2d": "cp", "lowrank_linear": "linear"}[line["op"]]
    header = (CSRC / "kernels" / "launch.h").read_text()
    assert f"cudaError_t launch_{stem}_{line['family']}(" in header
    assert line["name"] == f"{line['op']}_{line['family']}_{line['pixels']}x{line['columns']}"
    assert line["first_architecture"] == {"sm90a": 90, "sm80": 80, "simt": 75}[line["family"]]
    written = re.findall(r"^GPU_KERNEL\((\w+), (\w+), (\d+), ", (CSRC / "plan" / "kernel_table.inc").read_text(), re.M)
    assert (stem, line["family"], str(line["config"])) in written
    assert len(written) == len(KERNELS)


def test_the_table_has_every_configuration_of_every_op() -> None:
    text = (CSRC / "kernels" / "geometry.h").read_text()
    for family, array in (("sm80", "kSm80Configs"), ("simt", "kSimtConfigs")):
        body = text.split(f"{array}[] = {{", 1)[1].split("};", 1)[0]
        count = len(re.findall(r"^\s*\{", body, re.M))
        for op in OPS:
            configs = sorted(line["config"] for line in KERNELS if line["op"] == op and line["family"] == family)
            assert configs == list(range(count)), (op, family)
    assert sorted(line["config"] for line in KERNELS if line["family"] == "sm90a") == [0, 1, 2]
    assert len({line["name"] for line in KERNELS}) == len(KERNELS)


@pytest.mark.parametrize(
    ("problem", "kernel", "options", "words"),
    [
        (
            Problem(dtype="float64"),
            "tucker_conv2d_sm80_128x64",
            {},
            "bfloat16, float16 and float32 as tf32, got float64",
        ),
        (Problem(dtype="float64"), "tucker_conv2d_simt_128x64", {}, "float64 .* 64 pixels"),
        (Problem(dtype="float32"), "tucker_conv2d_sm80_128x64", {}, "torch.backends.cudnn.conv.fp32_precision"),
        (
            Problem("lowrank_linear", "float32"),
            "lowrank_linear_sm80_128x64",
            {},
            "torch.backends.cuda.matmul.fp32_precision",
        ),
        (
            Problem(),
            "tucker_conv2d_sm80_128x64",
            {"architecture": 75},
            "runs from sm_80 on, this GPU is sm_75",
        ),
        (
            Problem(),
            "tucker_conv2d_simt_128x64",
            {"architecture": 75, "built_for": [80, 86], "built_ptx": 80},
            "built for sm_80, sm_86, PTX of compute_80, this GPU is sm_75: set TORCH_CUDA_ARCH_LIST and reinstall, "
            "or policy 'chain'",
        ),
        (
            Problem(),
            "tucker_conv2d_sm80_128x64",
            {"architecture": 90, "built_for": [80, 86]},
            "built for sm_80, sm_86, this GPU is sm_90: set TORCH_CUDA_ARCH_LIST",
        ),
        (Problem(r1=4000), "tucker_conv2d_sm80_128x64", {}, r"needs \d+ KiB of shared memory, .* a CTA 163 KiB"),
        (Problem(r1=10**9 // 16, kernel=(1, 1), padding=(0, 0)), "tucker_conv2d_simt_64x64", {}, r"needs \d+ KiB"),
        (Problem("cp_conv2d", r1=100_000), "cp_conv2d_simt_64x64", {}, r"needs \d+ KiB of shared memory"),
        (Problem(kernel=(1001, 1001), padding=(500, 500)), "tucker_conv2d_simt_64x64", {}, r"needs \d+ KiB"),
        (
            Problem("lowrank_linear", n=2**31),
            "lowrank_linear_sm80_128x64",
            {},
            "rows .* at most 21474.*, got 2147483648",
        ),
        (Problem(s=2**28), "tucker_conv2d_sm80_128x64", {}, "channels and ranks must be at most .*, got 268435456"),
        (Problem(w=2**30, stride=(1, 1), padding=(1, 2**30)), "tucker_conv2d_sm80_128x64", {}, "coordinates must be"),
        (Problem(n=0), "tucker_conv2d_sm80_128x64", {}, "nothing to compute"),
        (Problem(), "tucker_conv2d_sm90a_64x64", {}, "its instructions exist on sm_90 alone, this GPU is sm_80"),
        (Problem(dtype="float32"), "tucker_conv2d_sm90a_64x64", {}, "takes bfloat16 and float16"),
        (Problem(channels_last=False), "tucker_conv2d_sm90a_64x64", {}, "takes channels_last, the input is in NCHW"),
        (Problem(s=12), "tucker_conv2d_sm90a_64x64", {}, "must be multiples of 16 bytes"),
        (Problem(stride=(2, 1)), "tucker_conv2d_sm90a_64x64", {}, "stride must be 1, got 2x1"),
        (Problem(dilation=(1, 3)), "tucker_conv2d_sm90a_64x64", {}, "dilation must be 1, got 1x3"),
        (Problem(r1=72), "tucker_conv2d_sm90a_64x64", {}, "ranks must be at most 64, got 72"),
        (Problem(kernel=(7, 7), padding=(3, 3)), "tucker_conv2d_sm90a_64x64", {}, "at most 144 pixels, got 14x14"),
        (Problem(t=2048), "tucker_conv2d_sm90a_64x64", {"architecture": 90}, r"needs \d+ KiB of shared memory"),
        (Problem(), "tucker_conv2d_sm90a_64x128", {}, "ranks up to 64 have a kernel of their own"),
        (Problem(r2=136), "tucker_conv2d_sm90a_64x128", {}, "ranks must be at most 128, got 136"),
        (Problem(r1=72, kernel=(5, 5)), "tucker_conv2d_sm90a_64x128", {}, "at most 104 pixels, got 12x12"),
        (Problem(r1=72, t=65536), "tucker_conv2d_sm90a_64x128", {"architecture": 90}, r"needs \d+ KiB"),
        # Tiles beyond 64 bits.
        (Problem(n=1024, h=1, w=1, padding=(2**29, 2**29)), "tucker_conv2d_sm90a_64x64", {"architecture": 90}, "CTAs"),
        (
            Problem("cp_conv2d", n=2**20, h=1, w=1, padding=(2**29,) * 2),
            "cp_conv2d_sm90a_112x64",
            {"architecture": 90},
            "CTAs",
        ),
        (Problem("cp_conv2d", kernel=(3, 5)), "cp_conv2d_sm90a_112x64", {}, "the window must be 3x3, got 3x5"),
        (Problem("cp_conv2d", s=264), "cp_conv2d_sm90a_112x64", {}, "channels must be at most 256, got 264"),
        (Problem("cp_conv2d", t=40), "cp_conv2d_sm90a_112x64", {}, "a multiple of 32, got 40"),
    ],
)
def test_rejections_say_why(problem: Problem, kernel: str, options: dict[str, object], words: str) -> None:
    assert re.search(words, plan(problem, kernel, "A100", **options)["reason"])


def test_what_this_build_has_no_code_for_is_told_apart_from_other_reasons() -> None:
    """Policy "fused" raises where nothing else would ever run; it must not depend on how the reason is worded."""
    for line in KERNELS:
        problem = problem_for(line)
        has_own_code = line["family"] == "sm90a"  # in every build, for that architecture alone
        known = {"architecture": 90}
        missing = plan(problem, line["name"], "H200", built_for=[80, 86], **known)
        assert (missing["no_code"], missing["reason"] == "") == (not has_own_code, has_own_code)
        assert not plan(problem, line["name"], "H200", built_for=[90], **known)["no_code"]
        assert not plan(replace(problem, n=0), line["name"], "H200", built_for=[90], **known)["no_code"]
        assert not plan(problem, line["name"], "H200", built_for=[80, 86], architecture=70)["no_code"]


@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ([1, 8, 8, 8, 8, 4, 4, 3, 3], [0, 1, 0, 0, 1, 1]),
        ([1, 8, 8, 8, 8, 4, 4, 3, 3], [1, 1, 0, 0, 1, 0]),
        ([1, 8, 8, 8, 8, 4, 4, 3, 3], [1, 1, -1, 0, 1, 1]),
        ([1, 8, 8, 8, 8, 4, 4, 3, 3], [1, 1, 2**62, 0, 1, 1]),
        ([1, 8, 8, 8, 8, 4, 4, 9, 3], [1, 1, 0, 0, 1, 1]),
        ([1, 8, 8, 8, 8, 0, 4, 3, 3], [1, 1, 0, 0, 1, 1]),
        ([-1, 8, 8, 8, 8, 4, 4, 3, 3], [1, 1, 0, 0, 1, 1]),
        ([1, 8, 8, 8, 8, 4, 4, 0, 3], [1, 1, 0, 0, 1, 1]),
        ([1, 8, 2**62, 8, 8, 4, 4, 3, 3], [1, 1, 0, 0, 1, 1]),
    ],
)
def test_planning_refuses_calls_that_no_op_takes(sizes: list[int], window: list[int]) -> None:
    """A stride of 0 would end the process in a division."""
    for device in ("cpu", "A100"):
        with pytest.raises(ValueError, match="explain: the sizes and the window must be those of a valid call"):
            _C.explain("tucker_conv2d", "float32", True, sizes, window, "none", device)


def test_cuts_are_checked() -> None:
    described = Problem().described()
    with pytest.raises(ValueError, match="gpu_tiles: each number of the cut must be at least 1"):
        _C.gpu_tiles(described, [1, 0, 8])
    with pytest.raises(ValueError, match="gpu_tiles: channels and ranks must be at most"):
        _C.gpu_tiles(Problem(s=2**32).described(), [1, 8, 8])
    with pytest.raises(ValueError, match="fused_gpu_features: each number of the cut must be at least 1"):
        _C.fused_gpu_features(described, "tucker_conv2d_sm80_128x64", [1, 8, 8, 2, 0], "A100")
    for function, more in ((_C.plan_gpu_kernel, ()), (_C.fused_gpu_features, ([1, 8, 8, 2, 1],))):
        with pytest.raises(ValueError, match="the kernel must be one of tucker_conv2d, got lowrank_linear_sm80_128x64"):
            function(described, "lowrank_linear_sm80_128x64", *more, "A100")


def test_the_wide_kernel_takes_what_the_other_cannot_hold() -> None:
    wide, narrow = "tucker_conv2d_sm90a_64x128", "tucker_conv2d_sm90a_64x64"
    for t, taking in ((96, narrow), (384, narrow), (512, wide)):
        problem = Problem(s=256, t=t, r1=64, r2=64)
        assert [plan(problem, name, "H100")["reason"] == "" for name in (narrow, wide)] == [
            taking == narrow,
            taking == wide,
        ]


@pytest.mark.parametrize(
    ("built_for", "built_ptx", "architecture", "runs"),
    [
        ([], 0, 90, True),  # not known: a GPU that is not there
        ([80], 0, 86, True),
        ([86], 0, 80, False),
        ([80], 0, 90, False),
        ([80], 80, 120, True),
        ([90], 90, 89, False),
    ],
)
def test_code_runs_within_its_generation_and_ptx_on_all_later_ones(
    built_for: list[int], built_ptx: int, architecture: int, runs: bool
) -> None:
    options = {"built_for": built_for, "built_ptx": built_ptx, "architecture": architecture}
    assert (plan(Problem(), "tucker_conv2d_sm80_128x64", "A100", **options)["reason"] == "") == runs


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("op", OPS)
def test_more_work_is_predicted_to_take_longer(gpu: str, op: str) -> None:
    small = Problem(op, s=256, t=256, h=56, w=56, r1=64, r2=64, n=1 if op != "lowrank_linear" else 3136)
    for field, factors in (("n", (8, 32)), ("s", (2, 4)), ("t", (2, 4)), ("r1", (2,))):
        for kernel in (None, *[line["name"] for line in KERNELS if line["op"] == op]):
            times = []
            for factor in (1, *factors):
                problem = replace(small, **{field: getattr(small, field) * factor})
                if kernel is None:
                    found = problem.explain(gpu)
                    times += [p["predicted_seconds"] for p in (found.chosen, *found.others) if p["kernel"] == CHAIN]
                elif not (found := plan(problem, kernel, gpu))["reason"]:
                    times.append(found["predicted_seconds"])
            slack = 1.02  # cuts that are equally fast (gpu.cpp)
            assert all(a <= b * slack for a, b in itertools.pairwise(times)), (field, kernel, times)


def test_predictions_stay_above_the_roofline() -> None:
    """No kernel is promised to be faster than its bytes or its operations allow."""
    for name, gpu in GPUS.items():
        for seed in range(30):
            problem = replace(drawn(seed), dtype="bfloat16")
            found = problem.explain(name)
            for one in (found.chosen, *found.others):
                if "ctas" in one:
                    assert one["predicted_seconds"] >= one["bytes"] / gpu["memory_bytes_per_second"]
                    rates = {"sm90a": "library_fp16_flops", "sm80": "fp16_flops", "simt": "fp32_flops"}
                    peak = gpu[rates[one["kernel"].rsplit("_", 2)[1]]]
                    assert one["predicted_seconds"] >= one["flops"] / max(peak, gpu["fp32_flops"])


# What the constants were fitted to: the present kernels, and three configurations that were dropped.
MEASURED = (
    "h200_second_bf16.json",
    "h200_lean_bf16.json",
    "h200_lean_fp16.json",
    "h200_lean_nchw.json",
    "h200_lean_blocks.json",
    "h200_second_blocks.json",
    "h200_sm90a_bf16.json",
    "h200_sm90a_blocks.json",
)


def test_choices_are_fast_where_they_were_measured() -> None:
    """The planner's choice among the op's ways that were timed takes at most 5 % longer than the fastest, on average:
    over all files, and over each, one of them with inputs in NCHW."""
    observations = {}
    for name in MEASURED:
        gpu, observations[name] = fit_gpu_cost.read(RESULTS / name)
    launch, constants = fit_gpu_cost.parse(fit_gpu_cost.CONSTANTS.read_text(), GPUS[gpu]["clock"])
    for found in observations.values():
        assert fit_gpu_cost.regret(found, constants, launch)[0] < 0.05
    lost, cells = fit_gpu_cost.regret(itertools.chain(*observations.values()), constants, launch)
    assert cells == 185 and lost < 0.05


def test_choices_are_judged_against_the_chain_in_the_layout_of_the_input() -> None:
    for name, layout in (("h200_lean_nchw.json", "nchw"), ("h200_lean_fp16.json", "channels_last")):
        _, found = fit_gpu_cost.read(RESULTS / name)
        chains = [one for one in found if one.group == "kChainConvolutions"]
        assert {one.way.split(" ")[1] for one in chains} == {"nchw", "channels_last"}
        assert {one.way.split(" ")[1] for one in chains if one.is_ours} == {layout}


def test_predictions_agree_with_the_measurements() -> None:
    """Of the kernels with their planned cuts and of the chain: none is off by a factor of 2, nine in ten by less than
    1.5."""
    (_, observations) = fit_gpu_cost.read(RESULTS / MEASURED[0])
    launch, constants = fit_gpu_cost.parse(fit_gpu_cost.CONSTANTS.read_text(), GPUS["H200"]["clock"])
    ratios = []
    for o in observations:
        if o.group != "kSimt":
            fused = o.group in fit_gpu_cost.FUSED_GROUPS
            ratios.append((float(o.features @ constants[o.group]) + launch * fused) / o.seconds)
    assert len(ratios) > 200
    assert all(0.5 < ratio < 2 for ratio in ratios)
    assert sum(0.67 < ratio < 1.5 for ratio in ratios) / len(ratios) > 0.9


def test_launches_decide_for_small_problems_except_in_graphs() -> None:
    """Measured on an H200 without a stride: 29 us by an sm80 kernel, 23 as a chain; called from Python 40 and 75."""
    # No sm90a kernel takes a stride.
    problem = Problem("tucker_conv2d", n=1, s=512, t=512, h=14, w=14, r1=128, r2=128, stride=(2, 2))
    small = problem.explain("H200")
    assert small.path == "fused"
    assert any("in a CUDA graph" in note and "the chain runs" in note for note in small.chosen["notes"])
    large = Problem("tucker_conv2d", n=32, s=256, t=256, h=56, w=56, r1=64, r2=64).explain("H200")
    assert large.path == "fused" and not any("CUDA graph" in note for note in large.chosen["notes"])


def test_a_gpu_that_was_not_measured_needs_a_margin() -> None:
    """The same prediction is not enough there: 1.5 times as fast as the chain, or the chain runs and says why."""
    reasons = set()
    for problem in (drawn(seed) for seed in range(300)):
        found = replace(problem, dtype="bfloat16").explain("A100")
        fused = [one for one in (found.chosen, *found.others) if one["path"] == "fused"]
        chain = [one for one in (found.chosen, *found.others) if one["path"] == "chain"]
        if not fused:
            continue
        ratio = chain[0]["predicted_seconds"] / min(one["predicted_seconds"] for one in fused)
        assert (found.path == "fused") == (ratio >= 1.5)
        if 1 < ratio < 1.5:
            reasons |= {reason for _, reason in found.rejections}
    assert any(reason.startswith("predicted less than 1.5 times as fast") for reason in reasons)


def test_the_choices_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_choices.main([str(RESULTS / "h200_second_bf16.json")])
    printed = capsys.readouterr().out
    assert "tucker: 24 cells: " in printed and "cp: 12 cells: " in printed and " chain graph " in printed
    gpu_choices.main([str(RESULTS / "h200_lean_nchw.json")])
    printed = capsys.readouterr().out
    assert "tucker: 24 cells: " in printed and "cp: 11 cells: " in printed
    assert " chain nchw " in printed and "graph" not in printed and "channels_last" not in printed


def test_small_problems_use_images_or_splits() -> None:
    deep = plan(Problem(n=32, s=512, t=512, h=7, w=7, r1=64, r2=64), "tucker_conv2d_sm80_128x64", "A100")
    assert deep["tile"][0] * deep["splits"] > 1
    alone = plan(Problem(n=1, s=256, t=256, h=14, w=14, r1=64, r2=64), "tucker_conv2d_sm80_128x64", "A100")
    assert alone["splits"] > 1 and any("T split over" in note for note in alone["notes"])
    many = plan(Problem(n=4096, s=64, t=64, h=4, w=4, r1=16, r2=16), "tucker_conv2d_sm80_128x32", "A100")
    assert many["tile"][0] > 1 and any(f"{many['tile'][0]} images a tile" in note for note in many["notes"])


def test_a_problem_that_fills_the_gpu_has_tiles_without_bank_conflicts() -> None:
    for gpu in GPUS:
        found = plan(Problem(n=32, s=256, t=256, h=56, w=56, r1=64, r2=64), "tucker_conv2d_sm80_128x64", gpu)
        assert found["tile"][2] % 8 == 0 and found["tile"][1] * found["tile"][2] > 100 and found["splits"] == 1


def test_notes_say_what_slows_a_plan() -> None:
    kernel = "tucker_conv2d_sm80_128x32"
    assert not any("copie" in note for note in plan(Problem(), kernel, "A100")["notes"])
    nchw = plan(Problem(channels_last=False), kernel, "A100")["notes"]
    assert "input in NCHW: copied element by element" in nchw
    odd = plan(Problem(s=36, t=10), kernel, "A100")["notes"]
    assert "input: no multiples of 16 bytes, copies of 8" in odd and "output: copied element by element" in odd
    twice = plan(Problem(r1=64), kernel, "A100")["notes"]
    assert "input read 2 times: R1 above the 32 columns of a pass" in twice
    dilated = plan(Problem(dilation=(2, 3), padding=(2, 3)), kernel, "A100")["notes"]
    assert "tiles on the dilation's lattice 2x3" in dilated
    assert "its tests have not all run on this kind of GPU: checked before first use" in dilated


@pytest.mark.parametrize("gpu", [*GPUS, "h 100", "rtx4090"])
@pytest.mark.parametrize("op", OPS)
def test_explain_prints_plans_for_gpus_that_are_not_here(gpu: str, op: str) -> None:
    found = Problem(op).explain(gpu)
    measured = GPUS[found.device.split(" (")[0]]["architecture"] == 90
    words = (
        "fitted to measurements on an NVIDIA H200" if measured else "scaled from measurements on an NVIDIA H200, not"
    )
    assert f"predictions {words}" in found.device
    kernels = [found.chosen["kernel"], *(p["kernel"] for p in found.others), *(name for name, _ in found.rejections)]
    assert set(kernels) == {line["name"] for line in KERNELS if line["op"] == op} | {CHAIN}
    times = [p["predicted_seconds"] for p in (found.chosen, *found.others)]
    assert times == sorted(times) and all(times)
    assert {name for name, _ in found.rejections} == set(kernels) - {found.chosen["kernel"]}
    printed = str(found)
    assert all(kernel in printed for kernel in kernels)
    runs = {one["kernel"] for one in (found.chosen, *found.others)}
    unchecked = [line for line in KERNELS if line["name"] in runs and not (measured and line["verified_on"])]
    assert ("checked before first use" in " ".join(printed.split())) == bool(unchecked) and "predicted" in printed


def test_kernels_are_checked_where_no_gpu_of_the_architecture_has_run_their_tests() -> None:
    note = "its tests have not all run on this kind of GPU: checked before first use"
    for gpu, known in GPUS.items():
        for line in KERNELS:
            of_table = {GPUS[name]["architecture"] for name in line["verified_on"].split(", ") if name}
            found = plan(problem_for(line), line["name"], gpu)
            if found["reason"]:
                assert line["family"] == "sm90a" and known["architecture"] != 90
            else:
                assert (note in found["notes"]) == (known["architecture"] not in of_table)


def test_explain_refuses_unknown_gpus_and_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"explain: device must be .*A100, RTX 3090, RTX 4090, H100, H200, B200, got 'H1'"
    ):
        Problem().explain("H1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_explain_for_cuda_without_a_gpu_names_the_chain_and_why() -> None:
    found = Problem().explain("cuda")
    assert found.path == "chain" and found.device == "cuda"
    ((name, reason),) = found.rejections
    assert name == "fused" and ("there is no GPU cuda here" in reason or "no kernels for cuda in this build" in reason)


def test_float32_is_planned_as_torch_s_settings_say() -> None:
    former = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    try:
        for precision, expected in (("tf32", True), ("ieee", False)):
            torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = precision
            for op in OPS:
                found = Problem(op, "float32").explain("A100")
                planned = {p["kernel"] for p in (found.chosen, *found.others)}
                assert any("sm80" in kernel for kernel in planned) == expected
                assert any("simt" in kernel for kernel in planned)
                assert ("as tf32" in found.problem) == expected
    finally:
        torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = former


@pytest.mark.parametrize("op", OPS)
def test_policies(op: str) -> None:
    problem = Problem(op)
    with lowrank_ops.set_policy("fused"):
        fused = problem.explain("H100")
    assert fused.path == "fused" and (CHAIN, 'the policy is "fused"') in fused.rejections
    with lowrank_ops.set_policy("chain"):
        chain = problem.explain("H100")
    taken = {reason for kernel, reason in chain.rejections if plan(problem, kernel, "H100")["reason"] == ""}
    assert chain.path == "chain" and taken == {'the policy is "chain"'}
    nothing = replace(problem, r1=100_000, r2=100_000)
    with lowrank_ops.set_policy("fused"):
        assert nothing.explain("H100").path == "chain"


def test_force_one_kernel() -> None:
    for line in KERNELS:
        _C.force_gpu_kernel(line["name"])
        with lowrank_ops.set_policy("chain"):
            found = problem_for(line).explain("H100")
        assert found.chosen["kernel"] == line["name"]
        other = next(op for op in OPS if op != line["op"])
        assert Problem(other).explain("H100").others, "other ops are planned as ever"
    _C.force_gpu_kernel("")
    assert _C.forced_gpu_kernel() == ""
    with pytest.raises(
        ValueError, match=r"force_gpu_kernel: kernel must be one of tucker_conv2d_sm90a_64x64, .* 'fast'"
    ):
        _C.force_gpu_kernel("fast")


def test_plans_are_searched_for_once() -> None:
    device = 77  # no GPU's index: nothing else has filled its part of the cache
    problem = Problem(h=29)
    first, made = _C.cached_gpu_plan(problem.described(), "A100", device)
    again, made_again = _C.cached_gpu_plan(problem.described(), "A100", device)
    assert first == again and made == made_again
    assert _C.cached_gpu_plan(replace(problem, n=9).described(), "A100", device)[1] == made + 1
    assert _C.cached_gpu_plan(problem.described(), "A100", device + 1)[1] == made + 2
    with lowrank_ops.set_policy("chain"):
        assert _C.cached_gpu_plan(problem.described(), "A100", device)[0]["path"] == "chain"


def test_a_kernel_that_failed_its_check_is_left_out() -> None:
    device, problem = 78, Problem(h=31)
    first, _ = _C.cached_gpu_plan(problem.described(), "A100", device)
    _C.refuse_gpu_kernel(device, first["kernel"], "differs from the chain by 3")
    second, _ = _C.cached_gpu_plan(problem.described(), "A100", device)
    assert second["kernel"] != first["kernel"]
    assert _C.cached_gpu_plan(problem.described(), "A100", device + 1)[0]["kernel"] == first["kernel"]
    _C.refuse_gpu_kernel(device, first["kernel"], "")
    assert _C.cached_gpu_plan(problem.described(), "A100", device)[0] == first


def test_planning_is_fast_enough_for_a_first_call() -> None:
    problems = [replace(Problem(), h=64, w=64, n=1 + i) for i in range(5)]
    seconds = []
    for problem in problems:
        start = time.perf_counter()
        _C.cached_gpu_plan(problem.described(), "H100", 79)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.02, "a cudnn convolution's first call takes longer"


def test_measured_choice_remembers_the_fastest() -> None:
    assert _C.measured_choice("GPU; problem", [("a", 3.0), ("b", 1.0), ("c", 2.0)]) == 1
    assert _C.measured_choice("GPU; problem", [("b", 9.0), ("a", 1.0)]) == 0, "not timed again"
    assert _C.measured_choice("GPU; problem", [("a", 5.0), ("d", 4.0)]) == 1, "the remembered one is gone"
    assert _C.measured_choice("another GPU; problem", [("a", 1.0), ("d", 4.0)]) == 0
    assert _C.measured_choice("GPU; one", [("a", 1.0)]) == 0


def test_measurements_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    _C.measured_choice("GPU; problem", [("a", 3.0), ("b", 1.0)])
    assert lowrank_ops.save_measurements(path) == 1
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask, "readable as any new file"
    _C.forget_measurements()
    assert lowrank_ops.load_measurements(path) == 1
    assert _C.measured_choice("GPU; problem", [("a", 1.0), ("b", 2.0)]) == 1
    assert _C.measurements() == [("GPU; problem", "b", [("a", 3.0), ("b", 1.0)])]


def test_processes_that_save_at_once_do_not_mix_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process saves to the same path after this one has written, and before it has renamed."""
    path = tmp_path / "measured.json"
    _C.measured_choice("GPU; problem", [("a", 3.0), ("b", 1.0)])
    written: list[Path] = []
    replace_file = Path.replace

    def late(self: Path, target: Path) -> Path:
        written.append(self)
        if len(written) == 1:
            _C.measured_choice("GPU; another problem", [("a", 3.0), ("b", 1.0)])
            assert lowrank_ops.save_measurements(path) == 2
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", late)
    assert lowrank_ops.save_measurements(path) == 1
    assert len(set(written)) == 2
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert lowrank_ops.load_measurements(path) == 1


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, text: str) -> int:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="no space"):
        lowrank_ops.save_measurements(tmp_path / "measured.json")
    assert list(tmp_path.iterdir()) == []


def test_what_a_cpu_measures_is_kept_in_the_file_too(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 6), torch.randn(2, 6), torch.randn(5, 2)]
    with lowrank_ops.set_policy("measure"):
        first = lowrank_ops.lowrank_linear(*tensors)
        assert lowrank_ops.save_measurements(tmp_path / "cpu.json") == 1
        ((problem, fastest, seconds),) = _C.measurements()
        assert "lowrank_linear float32" in problem and "thread" in problem
        assert {name for name, _ in seconds} == {"fused", "chain"} and fastest in ("fused", "chain")
        _C.forget_measurements()
        lowrank_ops.load_measurements(tmp_path / "cpu.json")
        torch.testing.assert_close(lowrank_ops.lowrank_linear(*tensors), first)
        assert _C.measurements() == [(problem, fastest, seconds)], "not measured again"


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', '{"format": 1, "measurements": [3]}'])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="load_measurements: path must be a file written by save_measurements, got"):
        lowrank_ops.load_measurements(path)
    path.write_text('{"format": 99, "measurements": []}')
    with pytest.raises(ValueError, match="must have format 1 or older, got 99: it was written by a newer lowrank_ops"):
        lowrank_ops.load_measurements(path)
    with pytest.raises(FileNotFoundError):
        lowrank_ops.load_measurements(tmp_path / "nowhere.json")
