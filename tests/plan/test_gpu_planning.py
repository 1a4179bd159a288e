"""The planner for GPUs: every named GPU's plans, on any machine (tests of the kernels themselves are elsewhere)."""

from __future__ import annotations

import math
import random
import re
from dataclasses import replace

import pytest

from lowrank_ops.ops.extension import _C
from tests.support.gpu_problems import GPUS, KERNELS, OPS, Problem, drawn, former_state, plan, problem_for  # noqa: F401
from tests.support.paths import CSRC

MOST_CTAS = 2**31 - 1


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
        assert 2 <= found["stages"] <= (8 if kernel["family"] == "sm90a" else 4)
        passes = -(-problem.t // kernel["columns"])
        assert 1 <= found["splits"] <= passes
        assert 1 <= found["ctas"] <= MOST_CTAS
        assert found["waves"] > 0 and found["predicted_seconds"] > 0 and found["flops"] > 0
        rows, columns, tiles = _C.gpu_tiles(problem.described(), found["tile"])
        if kernel["family"] == "sm90a" or kernel["name"].endswith("_persistent"):  # tile after tile
            assert found["ctas"] <= -(-tiles // found["cluster"]) * found["cluster"] * found["splits"]
        else:
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


PERSISTENT = ("sm80", 5)  # Tucker's kernel that keeps all factors


@pytest.mark.parametrize("line", KERNELS, ids=lambda line: line["name"])
def test_the_table_agrees_with_the_kernels(line: dict[str, object]) -> None:
    """Each line has a launcher, and its name says what geometry.h says."""
    stem = {"tucker_conv2d": "tucker", "cp_conv2d": "cp", "lowrank_linear": "linear"}[line["op"]]
    header = (CSRC / "cuda/kernels/launch.h").read_text()
    assert f"cudaError_t launch_{stem}_{line['family']}(" in header
    persistent = "_persistent" if (line["family"], line["config"]) == PERSISTENT else ""
    assert line["name"] == f"{line['op']}_{line['family']}_{line['pixels']}x{line['columns']}{persistent}"
    assert line["first_architecture"] == {"sm90a": 90, "sm80": 80, "simt": 75}[line["family"]]
    written = re.findall(r"^GPU_KERNEL\((\w+), (\w+), (\d+), ", (CSRC / "plan/gpu/kernel_table.inc").read_text(), re.M)
    assert (stem, line["family"], str(line["config"])) in written
    assert len(written) == len(KERNELS)


def test_the_table_has_every_configuration_of_every_op() -> None:
    text = (CSRC / "plan/geometry.h").read_text()
    for family, array in (("sm80", "kSm80Configs"), ("simt", "kSimtConfigs")):
        body = text.split(f"{array}[] = {{", 1)[1].split("};", 1)[0]
        count = len(re.findall(r"^\s*\{", body, re.M))
        for op in OPS:
            configs = sorted(line["config"] for line in KERNELS if line["op"] == op and line["family"] == family)
            skipped = [] if op == "tucker_conv2d" or family != PERSISTENT[0] else [PERSISTENT[1]]
            assert configs == [config for config in range(count) if config not in skipped], (op, family)
    assert sorted(line["config"] for line in KERNELS if line["family"] == "sm90a") == [0, 1, 2, 3]
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
        (
            Problem(channels_last=False),
            "tucker_conv2d_sm80_128x32_persistent",
            {},
            "takes copies of 16 bytes alone: input and output in channels_last, channels and ranks in multiples of 8$",
        ),
        (
            Problem(dtype="float32", tf32=True, t=66),
            "tucker_conv2d_sm80_128x32_persistent",
            {},
            "channels and ranks in multiples of 4$",
        ),
        (
            Problem(s=2**26, r1=2**26, r2=2**26, t=2**26),
            "tucker_conv2d_sm80_128x32_persistent",
            {},
            r"needs \d+ KiB of shared memory, .* a CTA 163 KiB",
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
        (
            Problem(stride=(2, 3)),
            "tucker_conv2d_sm90a_64x64",
            {},
            r"at most 4 planes \(such as 2x2\), got stride 2x3 and dilation 1x1",
        ),
        (Problem(r1=72, stride=(3, 2)), "tucker_conv2d_sm90a_64x128", {}, "at most 4 planes .* stride 3x2 and"),
        (Problem(dilation=(1, 5)), "tucker_conv2d_sm90a_64x64", {}, "at most 4 planes .* stride 1x1 and dilation 1x5"),
        (Problem(dilation=(3, 3)), "tucker_conv2d_sm90a_64x64", {}, "at most 4 planes .* dilation 3x3"),
        (
            Problem(r1=72, stride=(2, 1), dilation=(3, 1)),
            "tucker_conv2d_sm90a_64x128",
            {},
            "at most 4 planes .* stride 2x1 and dilation 3x1",
        ),
        (
            Problem(h=3, dilation=(2, 1)),
            "tucker_conv2d_sm90a_64x64",
            {},
            "the output must not be smaller than the dilation 2x1, got 1x28",
        ),
        (Problem(dilation=(2**28, 1), h=2**30), "tucker_conv2d_sm90a_64x64", {}, "at most 4 planes"),
        (Problem(r1=72), "tucker_conv2d_sm90a_64x64", {}, "ranks must be at most 64, got 72"),
        (Problem(kernel=(7, 7), padding=(3, 3)), "tucker_conv2d_sm90a_64x64", {}, "at most 144 pixels, got 14x14"),
        (Problem(t=2048), "tucker_conv2d_sm90a_64x64", {"architecture": 90}, r"needs \d+ KiB of shared memory"),
        (Problem(), "tucker_conv2d_sm90a_64x128", {}, "ranks up to 64 have a kernel of their own"),
        (Problem(r2=136), "tucker_conv2d_sm90a_64x128", {}, "ranks must be at most 128, got 136"),
        (Problem(r1=72, kernel=(5, 5)), "tucker_conv2d_sm90a_64x128", {}, "at most 104 pixels, got 12x12"),
        (Problem(r1=72, kernel=(7, 6), stride=(2, 2)), "tucker_conv2d_sm90a_64x128", {}, "104 pixels, got 11x10"),
        (Problem(r1=72, t=65536), "tucker_conv2d_sm90a_64x128", {"architecture": 90}, r"needs \d+ KiB"),
        # Tiles beyond 64 bits.
        (Problem(n=1024, h=1, w=1, padding=(2**29, 2**29)), "tucker_conv2d_sm90a_64x64", {"architecture": 90}, "CTAs"),
        (
            Problem("cp_conv2d", n=2**20, h=1, w=1, padding=(2**29,) * 2),
            "cp_conv2d_sm90a_112x64",
            {"architecture": 90},
            "CTAs",
        ),
        (
            Problem("cp_conv2d", stride=(3, 1)),
            "cp_conv2d_sm90a_112x64",
            {},
            "at most 2, got stride 3x1 and dilation 1x1",
        ),
        (
            Problem("cp_conv2d", dilation=(3, 2)),
            "cp_conv2d_sm90a_112x64",
            {},
            "at most 4 .* classes .*, got .* dilation 3x2",
        ),
        (Problem("cp_conv2d", dilation=(2**28, 1), h=2**30), "cp_conv2d_sm90a_112x64", {}, "at most 4 .* classes"),
        (Problem("cp_conv2d", h=3, dilation=(2, 1)), "cp_conv2d_sm90a_112x64", {}, "than the dilation 2x1, got 1x28"),
        (Problem("cp_conv2d", kernel=(3, 5)), "cp_conv2d_sm90a_112x64", {}, "the window must be 3x3, got 3x5"),
        (Problem("cp_conv2d", s=264), "cp_conv2d_sm90a_112x64", {}, "channels must be at most 256, got 264"),
        (Problem("cp_conv2d", t=40), "cp_conv2d_sm90a_112x64", {}, "a multiple of 32, got 40"),
        (
            Problem("lowrank_linear", r1=264),
            "lowrank_linear_sm90a_128x256",
            {},
            "the rank must be at most 256, got 264",
        ),
        (Problem("lowrank_linear", s=12), "lowrank_linear_sm90a_128x256", {}, "must be multiples of 16 bytes"),
        (Problem("lowrank_linear", "float32"), "lowrank_linear_sm90a_128x256", {}, "takes bfloat16 and float16"),
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
        _C.fused_gpu_features(described, "tucker_conv2d_sm80_128x64", [1, 8, 8, 2, 0, 1], "A100")
    for function, more in ((_C.plan_gpu_kernel, ()), (_C.fused_gpu_features, ([1, 8, 8, 2, 1, 1],))):
        with pytest.raises(ValueError, match="the kernel must be one of tucker_conv2d, got lowrank_linear_sm80_128x64"):
            function(described, "lowrank_linear_sm80_128x64", *more, "A100")


@pytest.mark.parametrize(
    ("window", "planes"),
    [
        ({}, 1),
        ({"stride": (2, 1)}, 2),
        ({"stride": (2, 2)}, 4),
        ({"stride": (2, 2), "kernel": (3, 1)}, 2),
        ({"stride": (5, 3), "kernel": (1, 1)}, 1),  # a single tap reads a single plane
        ({"stride": (2, 2), "dilation": (2, 2)}, 1),  # all taps read pixels of one parity
        ({"dilation": (2, 2)}, 1),  # a tile's outputs are of one parity
        ({"stride": (1, 2), "dilation": (2, 1)}, 2),
    ],
)
def test_a_stride_repeats_stage_1_once_per_plane(window: dict[str, tuple[int, int]], planes: int) -> None:
    chunks, s, t = 1, 192, 192  # features: cost.h
    for kernel, ranks in (("tucker_conv2d_sm90a_64x64", 64), ("tucker_conv2d_sm90a_64x128", 128)):
        problem = Problem(n=1, s=s, t=t, h=9, w=9, r1=ranks, r2=ranks, padding=(2, 2), **window)
        found = plan(problem, kernel, "H100")
        assert found["reason"] == ""
        assert found["features"][chunks] == planes * 3, kernel
        kh, kw = problem.kernel
        multiplied = planes * 104 * ranks * s + 64 * (kh * kw * ranks**2 + ranks * t)
        tiles = _C.gpu_tiles(problem.described(), [1, 8, 8])[2]
        assert found["flops"] == 2 * tiles * multiplied


@pytest.mark.parametrize(
    ("window", "tile", "pixels"),
    [
        ({}, [14, 8], 1.0),
        ({"stride": (2, 1)}, [7, 8], 0.75),
        ({"stride": (1, 2)}, [14, 4], 1.0),
        ({"stride": (2, 2)}, [8, 4], 0.75),
        ({"stride": (2, 4), "dilation": (2, 2)}, [14, 4], 1.0),  # rows of one parity, without a stride
        ({"stride": (2, 1), "dilation": (3, 1)}, [7, 8], 0.75),
        ({"dilation": (2, 2)}, [14, 8], 1.0),
    ],
)
def test_a_stride_makes_the_tiles_of_cp_smaller(
    window: dict[str, tuple[int, int]], tile: list[int], pixels: float
) -> None:
    """`pixels`: hidden ones that a lane reads, of those without a stride."""
    depthwise, s, t, rank = 6, 192, 192, 128  # features: cost.h
    problem = Problem("cp_conv2d", n=2, s=s, t=t, h=41, w=50, r1=rank, padding=(2, 2), **window)
    found = plan(problem, "cp_conv2d_sm90a_112x64", "H100")
    assert found["reason"] == "" and found["tile"] == [1, *tile]
    assert found["features"][depthwise] == found["waves"] * rank / 64 * pixels
    halo_width = 10 if tile[1] == 8 else 9
    multiplied = rank * (160 * s + 2 * 64 * 256 + 3 * tile[0] * (halo_width + tile[1]))
    tiles = _C.gpu_tiles(problem.described(), found["tile"])[2]
    assert found["flops"] == 2 * tiles * multiplied


def test_the_wide_kernel_takes_what_the_other_cannot_hold() -> None:
    wide, narrow = "tucker_conv2d_sm90a_64x128", "tucker_conv2d_sm90a_64x64"
    for t, taking in ((96, narrow), (384, narrow), (512, wide)):
        problem = Problem(s=256, t=t, r1=64, r2=64)
        assert [plan(problem, name, "H100")["reason"] == "" for name in (narrow, wide)] == [
            taking == narrow,
            taking == wide,
        ]


def test_a_linear_layer_of_few_rows_is_split_over_ctas_of_hopper() -> None:
    """Tiles are 128 rows, an H200 has 132 multiprocessors."""
    kernel = "lowrank_linear_sm90a_128x256"
    sizes = Problem("lowrank_linear", n=8192, s=1024, t=1024, r1=128)
    few = plan(sizes, kernel, "H200")
    assert (few["splits"], few["ctas"], few["waves"]) == (2, 128, 1)
    assert any("T split over 2 CTAs" in note for note in few["notes"])
    many = plan(replace(sizes, n=32768), kernel, "H200")
    assert (many["splits"], many["ctas"], many["waves"]) == (1, 132, 2)
    one = plan(replace(sizes, n=1, t=8), kernel, "H200")
    assert (one["splits"], one["ctas"], one["cluster"]) == (1, 1, 1)
    slots = {rank: plan(replace(sizes, r1=rank), kernel, "H200")["stages"] for rank in (8, 64, 72, 128, 136, 256)}
    assert slots == {8: 8, 64: 8, 72: 6, 128: 6, 136: 4, 256: 4}


def test_pairs_of_ctas_of_hopper_share_the_copies_of_the_factors() -> None:
    """Half of the factors' bytes count; in CP's kernel no bytes of theirs count, so it stays without clusters."""
    kernel = "lowrank_linear_sm90a_128x256"
    sizes = Problem("lowrank_linear", n=4096, s=4096, t=4096, r1=256)
    pairs = plan(sizes, kernel, "H200")
    assert (pairs["cluster"], pairs["splits"], pairs["ctas"]) == (2, 4, 128)
    assert any("clusters of 2 CTAs copy the factors for each other" in note for note in pairs["notes"])
    chunks, waits = 1, 8  # features: cost.h
    cut = [*pairs["tile"], pairs["stages"], pairs["splits"]]
    features = {n: _C.fused_gpu_features(sizes.described(), kernel, [*cut, n], "H200")[0] for n in (1, 2)}
    kib = {1: (16 + 32) * (64 + 16), 2: (16 + 16) * (64 + 16)}  # per slice and chunk: input or output, a block
    assert features[1][chunks] / features[2][chunks] == pytest.approx(kib[1] / kib[2])
    assert features[1][waits] == features[2][waits] and features[2] == pairs["features"]
    odd = plan(Problem("lowrank_linear", n=128 * 3, s=1024, t=1024, r1=128), kernel, "H200")
    assert odd["cluster"] == 2 and odd["ctas"] == 4 * odd["splits"]  # of three tiles
    with pytest.raises(ValueError, match="clusters of at most 2 CTAs here, got 200"):
        _C.fused_gpu_features(sizes.described(), kernel, [*cut, 200], "H200")
    cp = plan(Problem("cp_conv2d", n=32, s=256, t=256, h=56, w=56, r1=256), "cp_conv2d_sm90a_112x64", "H200")
    assert cp["cluster"] == 1


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


def test_small_problems_use_images_or_splits() -> None:
    deep = plan(Problem(n=32, s=512, t=512, h=7, w=7, r1=64, r2=64), "tucker_conv2d_sm80_128x64", "A100")
    assert deep["tile"][0] * deep["splits"] > 1
    alone = plan(Problem(n=1, s=256, t=256, h=14, w=14, r1=64, r2=64), "tucker_conv2d_sm80_128x64", "A100")
    assert alone["splits"] > 1 and any("T split over" in note for note in alone["notes"])
    many = plan(Problem(n=4096, s=64, t=64, h=4, w=4, r1=16, r2=16), "tucker_conv2d_sm80_128x32", "A100")
    assert many["tile"][0] > 1 and any(f"{many['tile'][0]} images per tile" in note for note in many["notes"])


def test_a_problem_that_fills_the_gpu_has_tiles_without_bank_conflicts() -> None:
    for gpu in GPUS:
        found = plan(Problem(n=32, s=256, t=256, h=56, w=56, r1=64, r2=64), "tucker_conv2d_sm80_128x64", gpu)
        assert found["tile"][2] % 8 == 0 and found["tile"][1] * found["tile"][2] > 100 and found["splits"] == 1


def test_the_persistent_kernel_has_as_many_ctas_as_the_gpu_holds() -> None:
    kernel = "tucker_conv2d_sm80_128x32_persistent"
    few, many = (plan(Problem(n=n, s=64, t=64, h=56, w=56, r1=16, r2=16), kernel, "A100") for n in (1, 32))
    assert (few["splits"], many["splits"]) == (1, 1)
    _, tile_h, tile_w = few["tile"]
    assert few["waves"] < 1 and few["ctas"] == math.ceil(56 / tile_h) * math.ceil(56 / tile_w)
    assert many["waves"] > 1 and many["ctas"] % 108 == 0
    assert many["ctas"] // 108 * (many["shared_bytes"] + 1024) <= 164 * 1024
    assert any("keep all factors" in note for note in many["notes"])
    # The check before first use (csrc/cuda/verify.cpp) fits into the smallest shared memory.
    for dtype in ("bfloat16", "float32"):
        trial = Problem(n=3, s=72, t=72, h=9, w=19, r1=8, r2=16, kernel=(3, 2), padding=(1, 0), dtype=dtype, tf32=True)
        assert plan(trial, kernel, "RTX 3090")["reason"] == ""
    with pytest.raises(ValueError, match="has no splits, got 2"):
        _C.fused_gpu_features(Problem().described(), kernel, [1, 8, 8, 2, 2, 1], "A100")
    # Factors of ranks of 16 take less than those of 32, and more channels take more.
    wide = plan(Problem(n=32, s=128, t=64, h=56, w=56, r1=16, r2=16), kernel, "A100")
    assert wide["shared_bytes"] > many["shared_bytes"]


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
