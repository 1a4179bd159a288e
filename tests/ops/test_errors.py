"""Bad input: the type of the error, and that it names the op, the argument, the requirement and the actual value."""

from __future__ import annotations

import pytest
import torch

from tests.support.calls import backward_op
from tests.support.problems import ACTIVATIONS, CONVS, OPS, Call, Problem

FACTORS = {
    "tucker_conv2d": ("in_factor", "core", "out_factor"),
    "cp_conv2d": ("in_factor", "height_factor", "width_factor", "out_factor"),
    "lowrank_linear": ("in_factor", "out_factor"),
}
EVERY_ARGUMENT = [(op, name) for op in OPS for name in (*FACTORS[op], "bias")]
EVERY_FACTOR = [(op, name) for op in OPS for name in FACTORS[op]]


def assert_refused(call: Call, error: type[Exception], *words: object, **options: object) -> None:
    """The call raises `error` itself, with the op and all `words` in it, and changes no argument."""
    versions = [tensor._version for tensor in call.tensors.values()]
    with pytest.raises(error) as caught:
        getattr(torch.ops.lowrank_ops, call.problem.op)(**call.tensors, **{**call.problem.options(), **options})
    assert caught.type is error
    message = str(caught.value)
    for word in (f"{call.problem.op}:", *map(str, words)):
        assert word in message, f"{word!r} is not in {message!r}"
    assert versions == [tensor._version for tensor in call.tensors.values()]


@pytest.mark.parametrize(("op", "name"), EVERY_ARGUMENT)
def test_mixed_dtypes(op: str, name: str) -> None:
    call = Problem(op).make()
    call.tensors[name] = call.tensors[name].bfloat16()
    assert_refused(call, TypeError, name, "Float", "BFloat16", "convert")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_dtypes_that_are_not_floating(op: str, dtype: torch.dtype) -> None:
    call = Problem(op).make()
    call.tensors = {name: tensor.to(dtype) for name, tensor in call.tensors.items()}
    assert_refused(call, TypeError, "input", "float32, float64, bfloat16 or float16", "got")


@pytest.mark.parametrize(("op", "name"), EVERY_ARGUMENT)
def test_mixed_devices(op: str, name: str) -> None:
    call = Problem(op).make()
    call.tensors[name] = call.tensors[name].to("meta")
    with pytest.raises((ValueError, RuntimeError), match="device"):
        call.run()


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in ("input", *FACTORS[op], "bias")])
def test_wrong_number_of_axes(op: str, name: str) -> None:
    call = Problem(op).make()
    if (op, name) == ("lowrank_linear", "input"):
        call.tensors[name] = torch.zeros(())
    else:
        call.tensors[name] = call.tensors[name].unsqueeze(0)
    assert_refused(call, ValueError, name, "[", "got")


@pytest.mark.parametrize(("op", "name"), EVERY_FACTOR)
def test_shapes_that_disagree(op: str, name: str) -> None:
    """An axis whose size another argument fixes is larger by one."""
    call = Problem(op, s=5, t=4, r1=3, r2=2).make()
    axis = 0 if name in ("height_factor", "width_factor") else 1
    shape = list(call.tensors[name].shape)
    required, shape[axis] = shape[axis], shape[axis] + 1
    call.tensors[name] = torch.zeros(shape)
    assert_refused(call, ValueError, name, f"size {required} on axis {axis}", f"got shape {shape}")


@pytest.mark.parametrize("op", OPS)
def test_input_channels_that_disagree(op: str) -> None:
    call = Problem(op, s=5).make()
    call.tensors["input"] = torch.cat([call.tensors["input"]] * 2, -1 if op == "lowrank_linear" else 1)
    assert_refused(call, ValueError, "in_factor", "size 10 on axis 1", "input", "got shape [3, 5]")


@pytest.mark.parametrize("size", [3, 5, 1])
@pytest.mark.parametrize("op", OPS)
def test_bias_of_another_size(op: str, size: int) -> None:
    call = Problem(op, t=4).make()
    call.tensors["bias"] = torch.zeros(size)
    assert_refused(call, ValueError, "bias", "[T] = [4]", f"got shape [{size}]")


@pytest.mark.parametrize("op", OPS)
def test_rank_of_zero(op: str) -> None:
    call = Problem(op, r1=0).make()
    assert_refused(call, ValueError, "in_factor", "no axis of size 0", "ranks are at least 1", "got shape [0, 5]")


@pytest.mark.parametrize("op", OPS)
def test_no_channels(op: str) -> None:
    assert_refused(Problem(op, s=0).make(), ValueError, "in_factor", "no axis of size 0", "got shape [3, 0]")


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("name", "value", "least"), [("stride", 0, 1), ("stride", -2, 1), ("dilation", 0, 1), ("padding", -1, 0)]
)
@pytest.mark.parametrize("op", CONVS)
def test_window_out_of_range(op: str, name: str, value: int, least: int, axis: int) -> None:
    pair = [2, 2]
    pair[axis] = value
    assert_refused(Problem(op).make(), ValueError, name, f"at least {least}", f"got {pair}", **{name: pair})


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", CONVS)
def test_empty_output(op: str, axis: int) -> None:
    kernel = (9, 1) if axis == 0 else (1, 9)
    call = Problem(op, h=6, w=6, kernel=kernel, padding=(1, 1)).make()
    along = ("height", "width")[axis]
    assert_refused(call, ValueError, "output would be empty", f"9 pixels along the {along}", "has 8", "padding")


@pytest.mark.parametrize("op", CONVS)
def test_image_without_pixels(op: str) -> None:
    assert_refused(Problem(op, h=0).make(), ValueError, "output would be empty")


@pytest.mark.parametrize("name", ["Relu", "tanh", "", "leaky_relu"])
@pytest.mark.parametrize("op", OPS)
def test_unknown_activation(op: str, name: str) -> None:
    call = Problem(op).make()
    assert_refused(call, ValueError, "activation", f"'{name}'", *ACTIVATIONS, activation=name)


@pytest.mark.parametrize("op", OPS)
def test_same_errors_with_gradients(op: str) -> None:
    """Autograd raises the same errors, before anything is saved."""
    call = Problem(op).make()
    call.tensors["bias"] = torch.zeros(9)
    for tensor in call.tensors.values():
        tensor.requires_grad_()
    assert_refused(call, ValueError, "bias", "got shape [9]")


# ---- The fake kernels, by which `torch.compile` refuses calls at trace time, and the checks of C++ raise errors of the
# same type in the same words, but that C++ writes a dtype as its scalar type.

SCALAR_TYPES = {
    "torch.float32": "Float",
    "torch.float64": "Double",
    "torch.bfloat16": "BFloat16",
    "torch.int64": "Long",
    "torch.bool": "Bool",
    "torch.complex64": "ComplexFloat",
    "torch.float8_e4m3fn": "Float8_e4m3fn",
}


def refusal(call: Call, backward: bool, tensors: dict[str, torch.Tensor], options: dict) -> tuple[type, str]:
    op = getattr(torch.ops.lowrank_ops, call.problem.op + ("_backward" if backward else ""))
    with pytest.raises((ValueError, TypeError)) as caught:
        op(**tensors, **{**call.problem.options(), **options})
    message = str(caught.value)
    for name, scalar_type in SCALAR_TYPES.items():
        message = message.replace(name, scalar_type)
    return caught.type, message


def assert_both_refuse(call: Call, grad_output: torch.Tensor | None = None, **options: object) -> None:
    backward = grad_output is not None
    tensors = {**({"grad_output": grad_output} if backward else {}), **call.tensors}
    if backward:
        options["output_mask"] = [True] * (len(call.tensors) + ("bias" not in call.tensors))
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        fake = refusal(call, backward, fakes, options)
    assert fake == refusal(call, backward, tensors, options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("problem", [{"r1": 0}, {"s": 0}, {"t": 0, "bias": False}], ids=str)
def test_empty_factors_in_the_fake_kernels(op: str, problem: dict) -> None:
    assert_both_refuse(Problem(op, **problem).make())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_dtypes_in_the_fake_kernels(op: str, dtype: torch.dtype) -> None:
    call = Problem(op).make()
    call.tensors = {name: tensor.to(dtype) for name, tensor in call.tensors.items()}
    assert_both_refuse(call)


@pytest.mark.parametrize(("op", "name"), EVERY_ARGUMENT)
def test_arguments_in_the_fake_kernels(op: str, name: str) -> None:
    """Another dtype, one more axis, one more along each axis."""
    right = Problem(op, s=5, t=4, r1=3, r2=2).make().tensors[name]
    grown = [torch.cat([right, right.narrow(axis, 0, 1)], axis) for axis in range(right.dim())]
    refused = [right.bfloat16(), right.unsqueeze(0), *grown]
    free = {"in_factor": [], "core": [2, 3], "height_factor": [1], "width_factor": [1], "out_factor": [], "bias": []}
    valid = {2 + axis for axis in free[name]}
    for i, wrong in enumerate(refused):
        call = Problem(op, s=5, t=4, r1=3, r2=2).make()
        call.tensors[name] = wrong
        if i not in valid:
            assert_both_refuse(call)


@pytest.mark.parametrize("op", OPS)
def test_inputs_in_the_fake_kernels(op: str) -> None:
    call = Problem(op).make()
    right = call.tensors["input"]
    channels = -1 if op == "lowrank_linear" else 1
    axes = right.new_zeros(()) if op == "lowrank_linear" else right[0]
    for wrong in (right.double(), axes, torch.cat([right, right], channels)):
        call.tensors["input"] = wrong
        assert_both_refuse(call)


@pytest.mark.parametrize("op", OPS)
def test_activations_in_the_fake_kernels(op: str) -> None:
    call = Problem(op).make()
    assert_both_refuse(call, activation="tanh")
    assert_both_refuse(call, grad_output=torch.ones(call.exact().shape), activation="tanh")


@pytest.mark.parametrize("values", [[1], [], [1, 1, 1], [1, 2**31], [0, 1], [1, -1], [30, 1]], ids=str)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("op", CONVS)
def test_windows_in_the_fake_kernels(op: str, name: str, values: list[int]) -> None:
    if (name, values) in [("padding", [0, 1]), ("padding", [30, 1]), ("stride", [30, 1])]:
        pytest.skip("a valid call")
    assert_both_refuse(Problem(op).make(), **{name: values})


@pytest.mark.parametrize("size", ["h", "w"])
@pytest.mark.parametrize("op", CONVS)
def test_empty_outputs_in_the_fake_kernels(op: str, size: str) -> None:
    assert_both_refuse(Problem(op, kernel=(3, 3), **{size: 2}).make())


@pytest.mark.parametrize("op", OPS)
def test_output_gradients_in_the_fake_kernels(op: str) -> None:
    call = Problem(op).make()
    right = torch.ones(call.exact().shape)
    for wrong in (right[..., :-1], right[:-1], right.unsqueeze(0), right.double()):
        assert_both_refuse(call, grad_output=wrong)


@pytest.mark.parametrize("values", [[1], [], [1, 1, 1], [1, 2**31]], ids=str)
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("op", CONVS)
def test_window_entries(op: str, name: str, values: list[int]) -> None:
    words = "have 2 entries (height, width)" if len(values) != 2 else f"be at most {2**31 - 1}"
    assert_refused(Problem(op).make(), ValueError, f"{op}: {name} must {words}, got {values}", **{name: values})


@pytest.mark.parametrize("op", OPS)
def test_bad_output_gradient(op: str) -> None:
    call = Problem(op).make()
    mask = [True] * len(call.tensors)
    good = torch.ones(call.exact().shape)
    with pytest.raises(ValueError, match=rf"{op}_backward: grad_output must have the output's shape .* got"):
        backward_op(call, good[..., :-1], mask)
    with pytest.raises(TypeError, match=rf"{op}_backward: grad_output must have the input's dtype"):
        backward_op(call, good.double(), mask)
    with pytest.raises(RuntimeError, match=f"{len(mask) - 1} elements to a fixed-size array of size {len(mask)}"):
        backward_op(call, good, mask[:-1])
