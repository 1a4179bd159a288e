"""Factors prepared for GPUs: their layout, and when a call may use them (csrc/ops/padded_factors.h). torch's ops make
the copies, on the factors' own device, here a CPU.
"""

from __future__ import annotations

import copy
import itertools
import resource
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lowrank_ops
from lowrank_ops import CPConv1d, CPConv2d, LowRankLinear, TuckerConv1d, TuckerConv2d
from lowrank_ops.nn.base import FactorizedModule, Packing, gpu_panels
from lowrank_ops.ops.extension import _C
from tests.support import changes
from tests.support.calls import factors_of
from tests.support.changes import Change
from tests.support.problems import DTYPES, FACTORS, OPS, Call, Problem

RANK_AXES = {"in_factor": (0,), "core": (0, 1), "height_factor": (0,), "width_factor": (0,), "out_factor": (1,)}


def copies(packed: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """What a call of these factors would use instead of them."""
    found: dict[str, Tensor] | None = _C.padded_factors(packed, factors_of(tensors))
    return found


def call_for(op: str, **options: object) -> Call:
    return Problem(op, **{**dict(s=20, t=12, r1=37, r2=21, h=9, w=9, kernel=(3, 5)), **options}).make()


# ---- Layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("view", ["dense", "transposed", "channels_last core"])
@pytest.mark.parametrize("op", OPS)
def test_copies_are_the_factors_with_padded_ranks(op: str, view: str, dtype: torch.dtype) -> None:
    tensors = call_for(op, dtype=dtype).tensors
    if view == "transposed":
        tensors = {name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in tensors.items()}
    elif view == "channels_last core" and "core" in tensors:
        tensors["core"] = tensors["core"].contiguous(memory_format=torch.channels_last)
    packed = _C.pad_factors(factors_of(tensors))
    found = copies(packed, tensors)
    assert found is not None and set(found) - {"taps"} == {name for name in FACTORS if name in tensors}
    vector = 16 // dtype.itemsize
    begin, end = packed.data_ptr(), packed.data_ptr() + packed.nbytes
    for name, padded in found.items():
        assert begin <= padded.data_ptr() and padded.data_ptr() + padded.nbytes <= end
        assert (padded.data_ptr() - begin) % 128 == 0
        if name == "taps":
            continue
        given = tensors[name]
        for axis, size in enumerate(given.shape):
            wanted = -(-size // vector) * vector if axis in RANK_AXES[name] else size
            assert padded.shape[axis] == wanted, name
        used = padded[tuple(slice(size) for size in given.shape)]
        assert torch.equal(used, given)
        assert padded.count_nonzero() == given.count_nonzero()  # the rest is zeros
        order = torch.channels_last if name == "core" else torch.contiguous_format
        assert padded.stride() == torch.empty_like(padded, memory_format=order).stride()


def test_copies_do_not_overlap() -> None:
    tensors = call_for("cp_conv2d", dtype=torch.bfloat16).tensors
    found = copies(packed := _C.pad_factors(factors_of(tensors)), tensors)
    assert found is not None
    spans = sorted((copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in found.values())
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert packed.dtype == torch.uint8 and packed.dim() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_taps_are_those_of_the_chain(dtype: torch.dtype) -> None:
    """The chain on a GPU computes in the factors' dtype: the product is rounded once."""
    tensors = call_for("cp_conv2d", dtype=dtype).tensors
    found = copies(_C.pad_factors(factors_of(tensors)), tensors)
    assert found is not None
    height, width = tensors["height_factor"].double(), tensors["width_factor"].double()
    assert torch.equal(found["taps"], (height[:, None, :, None] * width[:, None, None, :]).to(dtype))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("op", OPS)
def test_factors_with_gradients(op: str, mode: Callable[[], torch.autograd.grad_mode.inference_mode]) -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in call_for(op).tensors.items()}
    with mode():
        packed = _C.pad_factors(factors_of(tensors))
        found = copies(packed, tensors)
    assert found is not None and not packed.requires_grad
    assert not any(padded.requires_grad for padded in found.values())


# ---- The record


@pytest.mark.parametrize("op", OPS)
def test_only_the_same_factors_use_the_copies(op: str) -> None:
    tensors = call_for(op, s=24, t=24, r1=24, r2=24, kernel=(3, 3)).tensors
    names = [name for name in FACTORS if name in tensors]
    packed = _C.pad_factors(factors_of(tensors))
    assert copies(packed, tensors) is not None
    for name in names:
        given = tensors[name]
        view = given.view(torch.int32).view(torch.float32)
        assert copies(packed, {**tensors, name: view}) is not None  # the same memory and version counter
        for other in (given.clone(), given.transpose(0, 1)):
            assert copies(packed, {**tensors, name: other}) is None, name
        with torch.inference_mode():
            inference = given.clone()
        assert copies(packed, {**tensors, name: inference}) is None
    for name in names:
        packed = _C.pad_factors(factors_of(tensors))
        assert copies(packed, tensors) is not None
        with torch.no_grad():
            tensors[name].mul_(2)
        assert copies(packed, tensors) is None, name


def test_another_op_with_the_same_factors() -> None:
    tensors = call_for("lowrank_linear", r1=24).tensors
    packed = _C.pad_factors(factors_of(tensors))
    ones = torch.ones(24, 1)
    assert copies(packed, tensors) is not None
    assert copies(packed, {**tensors, "height_factor": ones, "width_factor": ones}) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.int16], ids=str)
def test_another_dtype_in_the_same_memory(dtype: torch.dtype) -> None:
    tensors = call_for("lowrank_linear", dtype=torch.bfloat16).tensors
    packed = _C.pad_factors(factors_of(tensors))
    with torch.no_grad():
        other = {name: tensor.data.view(dtype) for name, tensor in tensors.items()}
        for tensor in other.values():
            assert tensor._version == 0
    assert copies(packed, tensors) is not None and copies(packed, other) is None


def test_a_copy_of_the_packed_tensor_has_no_record() -> None:
    tensors = call_for("tucker_conv2d").tensors
    packed = _C.pad_factors(factors_of(tensors))
    for other in (packed.clone(), copy.deepcopy(packed), torch.zeros(4096, dtype=torch.uint8), torch.zeros(3)):
        assert copies(other, tensors) is None
    assert copies(packed[64:], tensors) is not None  # a view has the same memory
    assert copies(packed.to_sparse(), tensors) is None


def test_what_a_call_has_found_outlives_the_packed_tensor() -> None:
    """As any view of its memory does: a kernel that was launched may still read it."""
    tensors = call_for("tucker_conv2d").tensors
    found = copies(_C.pad_factors(factors_of(tensors)), tensors)
    assert found is not None
    others = [torch.full((size,), 7, dtype=torch.uint8) for size in (4096, 8192, 16384) for _ in range(20)]
    used = found["core"][tuple(slice(size) for size in tensors["core"].shape)]
    assert torch.equal(used, tensors["core"]) and len(others) == 60


def test_the_copies_are_freed_with_the_packed_tensor() -> None:
    tensors = {"in_factor": torch.ones(16, 2**17), "out_factor": torch.ones(8, 16)}  # 8 MiB
    _C.pad_factors(factors_of(tensors))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(40):
        _C.pad_factors(factors_of(tensors))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


@pytest.mark.parametrize("op", OPS)
def test_the_ops_of_a_cpu_do_not_read_them(op: str) -> None:
    """And a GPU does not read what was packed for a CPU: it has no record."""
    call = call_for(op)
    packed = _C.pad_factors(factors_of(call.tensors))
    packed.fill_(0xFF)
    options = [] if op == "lowrank_linear" else [call.problem.stride, call.problem.padding, call.problem.dilation]
    arguments = [*call.tensors.values(), *([] if call.problem.bias else [None])]
    output = getattr(torch.ops.lowrank_ops, f"{op}_prepared")(*arguments, *options, call.problem.activation, packed)
    assert torch.equal(output, call.run())
    for_cpu = _C.prepare(call.tensors["in_factor"], call.tensors.get("core"), call.tensors["out_factor"], False)
    assert copies(for_cpu, call.tensors) is None


# ---- Errors


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("factors", "error", "words"),
    [
        ((ones(4, 8, 1), None, None, None, ones(6, 4)), ValueError, r"lowrank_linear: in_factor must be \[R, S\], got"),
        ((ones(4, 8), ones(4, 5, 3, 3), None, None, ones(6, 4)), ValueError, "tucker_conv2d: core must have size 4 on"),
        ((ones(4, 8), ones(4, 4, 3), None, None, ones(6, 4)), ValueError, "tucker_conv2d: core must be"),
        ((ones(4, 8), None, ones(4, 3), ones(5, 3), ones(6, 4)), ValueError, "cp_conv2d: width_factor must have size"),
        ((ones(4, 8), None, None, None, ones(6, 3)), ValueError, "lowrank_linear: out_factor must have size 4 on axis"),
        ((ones(4, 0), None, None, None, ones(6, 4)), ValueError, "in_factor must have no axis of size 0"),
        ((ones(4, 8, dtype=torch.int8), None, None, None, ones(6, 4)), TypeError, "must be float32, .*, got Char"),
        ((ones(4, 8), None, None, None, ones(6, 4).to_sparse()), ValueError, "out_factor must be a dense tensor to be"),
    ],
)
def test_what_cannot_be_padded_is_refused(factors: tuple, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        _C.pad_factors(factors)
    with torch.inference_mode():
        inference = ones(4, 8)
    with pytest.raises(ValueError, match="in_factor must be no inference tensor to be prepared, whose changes"):
        _C.pad_factors((inference, None, None, None, ones(6, 4)))


# ---- Modules

FACTORIES: dict[str, Callable[[], FactorizedModule]] = {
    "TuckerConv2d": lambda: TuckerConv2d(20, 24, 3, (17, 9), padding=1),
    "TuckerConv1d": lambda: TuckerConv1d(20, 24, 3, 9),
    "CPConv2d": lambda: CPConv2d(20, 24, 3, 19, padding=1),
    "CPConv1d": lambda: CPConv1d(20, 24, 3, 9),
    "LowRankLinear": lambda: LowRankLinear(20, 24, 9),
}


@pytest.fixture(params=FACTORIES)
def module(request: pytest.FixtureRequest) -> FactorizedModule:
    """Packed as `prepare_for_inference_` packs a module on a GPU."""
    module = FACTORIES[request.param]().eval()
    factors = module._op_factors()
    module._packing = Packing(gpu_panels(factors), factors)
    return module


def uses_copies(module: FactorizedModule) -> bool:
    """Whether a call of the module would use them: it gives the op the same tensors again."""
    packed = module._packed()
    return packed is not None and copies(packed, module._op_factors()) is not None


CHANGES: dict[str, Change] = {
    **changes.CHANGES,
    "the middle": lambda module: list(module.factors().values())[1].mul_(2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_a_module_are_noticed(module: FactorizedModule, change: str) -> None:
    assert uses_copies(module) and uses_copies(module)
    with torch.no_grad():
        CHANGES[change](module)
    assert not uses_copies(module)


def test_the_memory_of_replaced_factors_is_not_given_away(module: FactorizedModule) -> None:
    """Otherwise other values could be stored there with the same version."""
    for name in module.factors():
        sizes, place = getattr(module, name).shape, getattr(module, name).data_ptr()
        setattr(module, name, None)
        assert place not in {torch.empty(sizes).data_ptr() for _ in range(20)}


def test_calls_with_other_parameters_are_possible(module: FactorizedModule) -> None:
    """A 1-D CP block takes a height factor of ones from what was packed, but not one of another dtype."""
    state = {name: value.double() for name, value in module.state_dict().items()}
    output = torch.func.functional_call(module, state, (input_of(module).double(),))
    assert output.dtype == torch.float64


def input_of(module: FactorizedModule) -> Tensor:
    shape = (3, 20) if isinstance(module, LowRankLinear) else (2, 20, 9, 9)[: 4 - ("1d" in type(module).__name__)]
    return torch.randn(shape)


def test_explain_and_torch_compile_take_the_packed_tensor(module: FactorizedModule) -> None:
    """Its memory belongs to no allocator of torch."""
    x = input_of(module)
    (found,) = lowrank_ops.explain(module, x, torch.bfloat16, "H100")
    assert any("prepare_for_inference_ has copied" in str(plan["notes"]) for plan in (found.chosen, *found.others))
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True)(x), module(x))


def test_torch_compile_is_told_that_addresses_stay(module: FactorizedModule) -> None:
    """Its CUDA graphs copy other inputs than parameters at every call. A copy of what was packed has no record, and the
    record does not name a copy of a 1-D CP block's height factor."""
    assert module._packing is not None
    for tensor in (module._packing.panels, *module._packing.factors.values()):
        assert tensor._dynamo_static_input_type == "unguarded"
