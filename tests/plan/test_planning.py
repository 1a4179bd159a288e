"""explain(), set_policy() and the planner behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

import lowrank_ops
from lowrank_ops.ops.extension import _C
from tests.support.budgets import assert_output
from tests.support.problems import OPS, Problem


@pytest.fixture(autouse=True)
def _former_policy() -> Iterator[None]:
    former = lowrank_ops.policy()
    yield
    lowrank_ops.set_policy(former)
    _C.forget_measurements()


def explain_one(problem: Problem, **options: object) -> lowrank_ops.Explanation:
    call = problem.make()
    (found,) = lowrank_ops.explain(
        getattr(lowrank_ops, problem.op), list(call.tensors.values()), verbose=False, **problem.options(), **options
    )
    return found


def test_set_policy_as_function_and_context_manager() -> None:
    lowrank_ops.set_policy("chain")
    assert lowrank_ops.policy() == "chain"
    with lowrank_ops.set_policy("fused"):
        assert lowrank_ops.policy() == "fused"
        with pytest.raises(RuntimeError, match="inside"), lowrank_ops.set_policy("measure"):
            raise RuntimeError("inside")
        assert lowrank_ops.policy() == "fused"
    assert lowrank_ops.policy() == "chain"


def test_unknown_policy_is_refused_and_changes_nothing() -> None:
    lowrank_ops.set_policy("chain")
    with pytest.raises(ValueError, match="set_policy: policy must be one of auto, fused, chain, measure, got 'fast'"):
        lowrank_ops.set_policy("fast")
    with pytest.raises(TypeError, match="set_policy: name must be a str, one of auto, fused, chain, measure, got 3"):
        lowrank_ops.set_policy(3)
    assert lowrank_ops.policy() == "chain"


@pytest.mark.parametrize("policy", ["fused", "chain"])
@pytest.mark.parametrize("op", OPS)
def test_explain_names_the_path_that_the_policy_forces(op: str, policy: str) -> None:
    with lowrank_ops.set_policy(policy):
        found = explain_one(Problem(op))
    assert (found.op, found.path, found.policy) == (op, policy, policy)
    assert [reason for _, reason in found.rejections] == [f'the policy is "{policy}"']
    assert found.chosen["flops"] > 0 and found.chosen["bytes"] > 0
    assert found.chosen["kernel"] in str(found)


def count_convolutions(problem: Problem, policy: str) -> int:
    """How many library convolutions (matrix products) an op really runs."""
    call = problem.make()
    with lowrank_ops.set_policy(policy), torch.profiler.profile() as profile, torch.inference_mode():
        call.run()
    names = {"aten::convolution", "aten::linear"}
    return sum(event.count for event in profile.key_averages() if event.key in names)


@pytest.mark.parametrize("op", OPS)
def test_the_policy_decides_what_runs(op: str) -> None:
    stages = {"tucker_conv2d": 3, "cp_conv2d": 4, "lowrank_linear": 2}[op]
    assert count_convolutions(Problem(op), "fused") == 0
    assert count_convolutions(Problem(op), "chain") == stages


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("ranks", [dict(r1=1, r2=8), dict(r1=8, r2=1), dict(r1=1, r2=1)], ids=str)
def test_chains_of_ranks_of_one_copy_no_image(ranks: dict[str, int], layout: torch.memory_format) -> None:
    """Their images are of both formats; a stage that takes them for the other one makes the next convert."""
    call = Problem("tucker_conv2d", s=16, t=12, h=20, w=20, kernel=(3, 3), bias=False, layout=layout, **ranks).make()
    call.tensors["core"] = call.tensors["core"].contiguous(memory_format=layout)
    with lowrank_ops.set_policy("chain"), torch.profiler.profile(record_shapes=True) as profile, torch.inference_mode():
        call.run()
    copied = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_"]
    assert not [shape for shape in copied if shape[0] == call.tensors["input"].size(0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_auto_runs_what_explain_says(op: str, dtype: torch.dtype) -> None:
    for size in (3, 40):
        problem = Problem(
            op, n=1, s=size, t=size + 1, r1=max(1, size // 4), r2=max(1, size // 5), h=9, w=8, dtype=dtype
        )
        with lowrank_ops.set_policy("auto"):
            path = explain_one(problem).path
        assert (count_convolutions(problem, "auto") == 0) == (path == "fused")


@pytest.mark.parametrize("op", OPS)
def test_measure_gives_the_right_result_and_remembers(op: str) -> None:
    call = Problem(op, activation="relu").make()
    with lowrank_ops.set_policy("measure"):
        first = call.run()
        assert_output(call, first)
        again = call.run()
    assert torch.equal(first, again)
    call_counts = count_convolutions(Problem(op, activation="relu"), "measure")
    assert call_counts in (0, {"tucker_conv2d": 3, "cp_conv2d": 4, "lowrank_linear": 2}[op])


@pytest.mark.parametrize("op", OPS)
def test_explain_has_the_measured_times(op: str) -> None:
    """Beside the predictions, once the policy "measure" has timed the call; and of that call alone."""
    call = Problem(op, activation="relu", n=3).make()
    with lowrank_ops.set_policy("measure"):
        before = explain_one(call.problem)
        call.run()
        after, other = explain_one(call.problem), explain_one(replace(call.problem, n=4))
    for found in (before, other):
        assert all("measured_seconds" not in plan for plan in (found.chosen, *found.others))
        assert "measured" not in str(found).replace('"measure"', "").replace("not measured yet", "")
    times = [plan["measured_seconds"] for plan in (after.chosen, *after.others)]
    assert len(times) == 2 and 0 < times[0] <= times[1] < 1
    assert "measured" in str(after)


def test_other_devices_run_the_chain_and_explain_says_so() -> None:
    for device in ("mps", "xpu"):
        why = f"lowrank_ops has no kernels for {device} in this build"
        reasons = {
            "auto": why,
            "chain": f'the policy is "chain", and {why}',
            "fused": f'{why}: the chain runs although the policy is "fused"',
            "measure": f"{why}: there is nothing to measure",
        }
        for policy, reason in reasons.items():
            with lowrank_ops.set_policy(policy):
                found = explain_one(Problem("tucker_conv2d"), device=device)
            assert found.path == "chain" and found.device == device
            assert found.rejections == [("fused", reason)]
            assert "tf32" not in found.problem, "tf32 is a number format of NVIDIA's GPUs"


def test_a_device_means_the_same_with_and_without_its_index() -> None:
    for op in OPS:
        plain = explain_one(Problem(op), device="cpu")
        for device in ("cpu:0", torch.device("cpu"), torch.device("cpu", 0), None):
            assert explain_one(Problem(op), device=device) == plain
    model = lowrank_ops.TuckerConv2d(16, 16, 3, 8, padding=1).eval()
    lowrank_ops.prepare_for_inference_(model)
    with lowrank_ops.set_policy("fused"):
        notes = [
            lowrank_ops.explain(model, (1, 16, 8, 8), device=device, verbose=False)[0].chosen["notes"]
            for device in ("cpu", "cpu:0")
        ]
    assert notes[0] == notes[1] and "packed by prepare_for_inference_" in notes[0][0]


def test_cuda_is_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As everywhere in torch. Without CUDA in the build the plan is the chain, and says for which device."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 63)
    problem = Problem("cp_conv2d")
    assert explain_one(problem, device="cuda").device == "cuda:63"
    assert explain_one(problem, device=torch.device("cuda")).device == "cuda:63"
    assert explain_one(problem, device="cuda:62").device == "cuda:62"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert not explain_one(problem, device="cuda").device.startswith("cuda:63"), "asking would start CUDA"


def test_explain_takes_shapes() -> None:
    (found,) = lowrank_ops.explain(
        lowrank_ops.cp_conv2d,
        [(2, 8, 30, 40), (6, 8), (6, 3), (6, 5), (10, 6), None],
        dtype=torch.bfloat16,
        memory_format=torch.channels_last,
        padding=(1, 2),
        stride=(2, 1),
        verbose=False,
    )
    assert "[2, 8, 30, 40] to 10 channels, 3x5, rank 6, stride [2, 1], padding [1, 2]" in found.problem
    assert "bfloat16, channels_last" in found.problem
    # Two images of 30x40 pixels through 8x6; 15x40 outputs of 3 + 5 taps for each of 6 ranks, then 6x10.
    macs = 2 * (30 * 40 * 8 * 6 + 15 * 40 * 6 * (3 + 5) + 15 * 40 * 6 * 10)
    (chain,) = [plan for plan in (found.chosen, *found.others) if plan["path"] == "chain"]
    assert chain["flops"] == 2 * macs


def test_explain_a_model_names_every_op() -> None:
    model = nn.Sequential(
        lowrank_ops.TuckerConv2d(3, 8, 3, (2, 4), padding="same"),
        nn.ReLU(),
        lowrank_ops.CPConv2d(8, 6, 3, 5),
        nn.Flatten(),
        lowrank_ops.LowRankLinear(6 * 6 * 6, 10, 4),
    )
    found = lowrank_ops.explain(model, (2, 3, 8, 8))
    assert [part.op for part in found] == ["tucker_conv2d", "cp_conv2d", "lowrank_linear"]
    assert all(part.op in str(found) for part in found)
    assert lowrank_ops.explain(nn.ReLU(), (1, 2), verbose=False) == ()


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = lowrank_ops.LowRankLinear(6, 5, 3)

    def forward(self, image: torch.Tensor, other: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        output = self.linear(image + other)
        return output if scale is None else output * scale


@pytest.mark.parametrize(
    "inputs",
    [
        [(2, 6), (6,)],
        ((2, 6), torch.zeros(2, 6), None),
        ([2, 6], torch.zeros(6), (1,)),
        {"other": (2, 6), "image": torch.zeros(6)},
    ],
)
def test_explain_a_model_of_several_inputs(inputs: object) -> None:
    (found,) = lowrank_ops.explain(TwoInputs(), inputs, verbose=False)
    assert found.problem == "2 rows, 6 to 5, rank 3, float32"


def test_explain_takes_an_op_s_arguments_by_name() -> None:
    named = {"input": (3, 6), "in_factor": (2, 6), "out_factor": (5, 2)}
    (found,) = lowrank_ops.explain(lowrank_ops.lowrank_linear, named, activation="relu", verbose=False)
    assert found.problem == "3 rows, 6 to 5, rank 2, float32"


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("tucker_conv2d", (2, 6)), {}, "op_or_module must be an op .* got 'tucker_conv2d'"),
        ((TwoInputs(), "image"), {}, "input_or_shapes must be a tensor, a shape, or a tuple, .* got 'image'"),
        ((TwoInputs(), [(2, 6), 3.5]), {}, "input_or_shapes must be"),
        ((lowrank_ops.lowrank_linear, (2, 6)), {}, r"input_or_shapes must be a tuple, .* got \(2, 6\)"),
        ((TwoInputs(), (2, 6), "float32"), {}, "dtype must be a torch.dtype, got 'float32'"),
        ((TwoInputs(), (2, 6)), {"stride": 2, "scale": 3}, "unexpected keyword arguments for a module: stride, scale"),
    ],
)
def test_explain_refuses_arguments_of_the_wrong_kind(arguments: tuple, options: dict, words: str) -> None:
    with pytest.raises(TypeError, match=f"explain: {words}"):
        lowrank_ops.explain(*arguments, **options)


class PlainTensor(TwoInputs):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.linear(image) + torch.ones(2, 5)


class PlainBias(TwoInputs):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return lowrank_ops.lowrank_linear(image, self.linear.in_factor, self.linear.out_factor, torch.ones(5))


class DependsOnValues(TwoInputs):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.linear(image) if image.sum() > 0 else image


@pytest.mark.parametrize("model", [PlainTensor(), PlainBias()], ids=lambda model: type(model).__name__)
def test_explain_takes_models_with_tensors_of_their_own(model: nn.Module) -> None:
    (found,) = lowrank_ops.explain(model, (2, 6), verbose=False)
    assert found.op == "lowrank_linear"


def test_explain_says_that_models_run_without_values() -> None:
    with pytest.raises(RuntimeError, match=r"explain: DependsOnValues failed: .* on tensors without values"):
        lowrank_ops.explain(DependsOnValues(), (2, 6), verbose=False)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_explain_sees_the_layouts_that_the_model_s_layers_give(memory_format: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU(), lowrank_ops.TuckerConv2d(32, 32, 3, 8), nn.MaxPool2d(2))
    model.append(lowrank_ops.CPConv2d(32, 32, 3, 8)).to(memory_format=memory_format)
    image = torch.randn(2, 16, 20, 20).contiguous(memory_format=memory_format)
    seen = []
    for layer in (model[2], model[4]):
        layer.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    model(image)
    layouts = ["channels_last" if x.is_contiguous(memory_format=torch.channels_last) else "NCHW" for x in seen]
    assert layouts == ["NCHW" if memory_format == torch.contiguous_format else "channels_last"] * 2
    seen.clear()
    by_shape = lowrank_ops.explain(model, image.shape, memory_format=memory_format, verbose=False)
    for found in (lowrank_ops.explain(model, image, verbose=False), by_shape):
        assert [each.problem.split(", ")[-2:] for each in found]
        assert all(layout in each.problem for each, layout in zip(found, layouts, strict=True)), found


class Refuses(TwoInputs):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        image = image + torch.ones(())
        self.linear(image)
        raise ValueError("the meta learner needs two tasks")


def test_a_model_s_own_refusal_is_passed_on_whatever_its_words_are() -> None:
    with pytest.raises(ValueError, match=r"^the meta learner needs two tasks$"):
        lowrank_ops.explain(Refuses(), (2, 6), verbose=False)


def test_explain_inside_autocast_plans_the_region_s_dtype() -> None:
    linear = lowrank_ops.LowRankLinear(6, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert lowrank_ops.explain(linear, (2, 6), verbose=False)[0].problem.endswith("bfloat16")
        assert lowrank_ops.explain(linear.double(), (2, 6), verbose=False)[0].problem.endswith("float64")
        assert linear(torch.zeros(2, 6, dtype=torch.float64)).dtype == torch.float64
    meta = copy.deepcopy(linear).to("meta")
    assert lowrank_ops.explain(meta, (2, 6), device="cpu", verbose=False)[0].problem.endswith("float64")


def test_explain_refuses_what_the_op_refuses() -> None:
    with pytest.raises(ValueError, match="core must have size"):
        lowrank_ops.explain(lowrank_ops.tucker_conv2d, [(1, 4, 8, 8), (2, 4), (3, 5, 3, 3), (6, 3)], verbose=False)


@pytest.mark.parametrize("op", ["tucker_conv2d", "cp_conv2d"])
def test_planning_does_not_walk_through_image_or_window(op: str) -> None:
    """A look at each row, column (or at each part that a row can be cut into) or tap of these would take hours."""

    def plan(size: tuple[int, int], kernel: tuple[int, int], padding: int) -> dict:
        middle = [(4, 4, *kernel)] if op == "tucker_conv2d" else [(4, kernel[0]), (4, kernel[1])]
        with lowrank_ops.set_policy("fused"):
            (found,) = lowrank_ops.explain(
                getattr(lowrank_ops, op), [(1, 8, *size), (4, 8), *middle, (8, 4)], padding=padding, verbose=False
            )
        return found.chosen

    for size in ((2**39, 8), *((8, 2**40 - count) for count in range(1000))):
        found = plan(size, (3, 3), 1)
        assert found["flops"] > 2**39 and 0 < found["tile_columns"] < 2**14
    for kernel in ((2**38, 1), (1, 2**38)):
        assert plan(tuple(max(8, 2 * taps) for taps in kernel), kernel, 0)["flops"] > 2**39


def test_windows_that_crash_torch_in_bf16_never_go_to_the_chain_on_their_own() -> None:
    problem = Problem("tucker_conv2d", kernel=(1, 1), stride=(1, 2), padding=(0, 1), dtype=torch.bfloat16)
    with lowrank_ops.set_policy("auto"):
        found = explain_one(problem)
    assert found.path == "fused" and "bf16 convolutions fail" in found.rejections[0][1]


@pytest.mark.parametrize("op", ["tucker_conv2d", "cp_conv2d"])
@pytest.mark.parametrize("size", [7, 56, 640])
@pytest.mark.parametrize("rank", [8, 512])
def test_scratch_does_not_grow_with_the_image(op: str, size: int, rank: int) -> None:
    """Tiles fit L2 whatever the image; only ranks too large for that may exceed it, by their narrowest tile."""
    shapes = {
        "tucker_conv2d": [(rank, 64), (rank, rank, 3, 3), (64, rank)],
        "cp_conv2d": [(rank, 64), (rank, 3), (rank, 3), (64, rank)],
    }[op]
    with lowrank_ops.set_policy("fused"):
        (found,) = lowrank_ops.explain(
            getattr(lowrank_ops, op), [(1, 64, size, size), *shapes], padding=1, verbose=False
        )
    narrowest = 28 + 2
    assert found.chosen["scratch_bytes"] <= max(1 << 19, 8 * narrowest * (rank + 64) * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("policy", ["auto", "measure"])
@pytest.mark.parametrize("op", ["tucker_conv2d", "cp_conv2d"])
def test_taps_far_outside_the_image(op: str, policy: str, dtype: torch.dtype) -> None:
    """A tile that held all that lies between them would take gigabytes."""
    far = (40000, 40000)
    problem = Problem(op, s=8, r1=8, r2=8, t=8, h=8, w=8, kernel=(3, 3), padding=far, dilation=far, dtype=dtype)
    with lowrank_ops.set_policy(policy):
        call = problem.make()
        assert_output(call, call.run())
        found = explain_one(problem)
    assert found.path == "chain" and "a tile would take" in str(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_of_threads_does_not_change_the_path(dtype: str) -> None:
    """It would change the bits of a result."""
    threads = torch.get_num_threads()
    try:
        for op, rows in [("lowrank_linear", 12544), ("lowrank_linear", 64), ("tucker_conv2d", 1), ("cp_conv2d", 4)]:
            for channels in (8, 32, 128, 512):
                for rank in (4, 16, 64):
                    size = 1 if op == "lowrank_linear" else 14
                    sizes = [rows, channels, size, size, channels, rank, rank, 1, 1]
                    paths = set()
                    for count in (1, 2, 4, 16):
                        torch.set_num_threads(count)
                        found = _C.explain(op, dtype, True, sizes, [1, 1, 0, 0, 1, 1], "none", "cpu")
                        paths.add(found["chosen"]["path"])
                    assert len(paths) == 1, (op, sizes)
    finally:
        torch.set_num_threads(threads)


def test_set_num_threads_reaches_the_kernels() -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert _C.parallel_threads(16) == count
            assert _C.parallel_threads(1) == 1
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", OPS)
def test_a_call_is_planned_once(op: str) -> None:
    """Every later call takes the plan from the cache; anything that a plan depends on makes another one."""
    threads = torch.get_num_threads()
    call = Problem(op, n=3, s=37, t=41, r1=16, r2=17, h=11, w=5).make()

    def planned(run: Callable[[], object] = call.run) -> int:
        """How many plans two calls have needed."""
        before = _C.cpu_plans_made()
        run()
        run()
        return _C.cpu_plans_made() - before

    try:
        with lowrank_ops.set_policy("auto"):
            assert planned() == 1
            assert planned() == 0
            assert planned(replace(call.problem, n=4).make().run) == 1
            assert planned(replace(call.problem, activation="relu").make().run) == 1
            torch.set_num_threads(threads + 1)
            assert planned() == 1
            torch.set_num_threads(threads)
            for setter, other, former in (
                (_C.set_cpu_isa, "generic", ""),
                (_C.set_cpu_winograd, "2x2", "auto"),
                (_C.set_cpu_teams, "never", "auto"),
            ):
                best = _C.cpu_isa()
                setter(other)
                assert planned() == (setter is not _C.set_cpu_isa or best != other)
                setter(former)
                assert planned() == 0
        for policy in ("chain", "fused", "measure"):
            with lowrank_ops.set_policy(policy):
                assert planned() == 1
                if policy != "measure":
                    assert (count_convolutions(call.problem, policy) == 0) == (policy == "fused")
    finally:
        torch.set_num_threads(threads)
        _C.set_cpu_isa("")
        _C.set_cpu_winograd("auto")
        _C.set_cpu_teams("auto")


def test_remembered_plans_are_bounded() -> None:
    """A program whose shapes never repeat goes on; the cache starts anew above 4,096 plans."""
    factors = torch.ones(2, 3), torch.ones(4, 2)
    with lowrank_ops.set_policy("fused"), torch.inference_mode():
        for rows in range(1, 4200):
            lowrank_ops.lowrank_linear(torch.ones(rows, 3), *factors)
        before = _C.cpu_plans_made()
        lowrank_ops.lowrank_linear(torch.ones(4199, 3), *factors)
        assert _C.cpu_plans_made() == before, "the latest are still there"
        lowrank_ops.lowrank_linear(torch.ones(1, 3), *factors)
        assert _C.cpu_plans_made() == before + 1, "the first are gone"
