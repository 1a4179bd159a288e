"""Models that torch.compile has compiled, before or after their first call: the functions of this package work on the
modules inside, and afterwards the compiled model computes the changed model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_ops import (
    TuckerConv2d,
    count_layer_weights,
    distill_,
    explain,
    factorize_,
    fold_activations_,
    fold_batchnorm_,
    fuse_,
    load,
    prepare_for_inference_,
    reestimate_batchnorm_,
    save,
    to_chain,
)

INPUT = torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 20))
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), body, *head).eval()


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def whole(model: nn.Sequential) -> nn.Module:
    return compiled(model)  # type: ignore[no-any-return]


def part(model: nn.Sequential) -> nn.Module:
    model[2] = compiled(model[2])
    return model


def layer(model: nn.Sequential) -> nn.Module:
    model[2][0] = compiled(model[2][0])  # type: ignore[operator, index]
    return model


def all_of_them(model: nn.Sequential) -> nn.Module:
    return compiled(part(layer(model)))  # type: ignore[arg-type, no-any-return]


def in_place(model: nn.Sequential) -> nn.Module:
    model.compile(backend="eager")
    model[2].compile(backend="eager")
    return model


WAYS = [whole, part, layer, all_of_them, in_place]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile")
        yield
    torch._dynamo.reset()


@pytest.fixture(params=WAYS, ids=lambda way: way.__name__)
def way(request: pytest.FixtureRequest) -> Callable[[nn.Module], nn.Module]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(params=[False, True], ids=["new", "called before"])
def compile_(request: pytest.FixtureRequest, way: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        model = way(model)
        if request.param:
            with torch.no_grad():
                model(INPUT[:2])
        return model

    return make


def factorized(model: nn.Module, **arguments: Any) -> Any:
    return factorize_(model, rank=0.5, linear=0.25, progress=False, **arguments)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(INPUT)  # type: ignore[no-any-return]


CALLS: dict[str, Callable[[nn.Module], Any]] = {
    "factorize_": factorized,
    "example_input": lambda model: factorized(model, example_input=INPUT[:2]),
    "calibration": lambda model: factorized(model, calibration=INPUT),
    "fold_batchnorm_": lambda model: fold_batchnorm_(model, INPUT),
    "reestimate_batchnorm_": lambda model: reestimate_batchnorm_(model, INPUT, progress=False),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_same_as_uncompiled(call: str, compile_: Callable[[nn.Module], nn.Module]) -> None:
    plain, model = network(), compile_(network())
    before = outputs(plain)
    names = [name for name, _ in model.named_modules()]
    expected, found = CALLS[call](plain), CALLS[call](model)
    torch.testing.assert_close(outputs(model), outputs(plain))
    assert (outputs(model) - before).norm() > 1e-3 * before.norm() or call == "fold_batchnorm_"
    if call == "reestimate_batchnorm_":
        assert found is model
    elif call == "fold_batchnorm_":
        assert found == expected
    else:
        assert names == [name for name, _ in model.named_modules()]
        for entry, other in zip(expected, found, strict=True):
            assert (entry.name, entry.replaced_by, entry.macs_before) == (
                other.name,
                other.replaced_by,
                other.macs_before,
            )
            assert count_layer_weights(model, entry.name) == entry.parameters_after


def test_folding_activations_preparing_and_explaining(compile_: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    factorized(model)
    fold_batchnorm_(model)
    plain, model = copy.deepcopy(model), compile_(model)  # type: ignore[assignment]
    assert fold_activations_(model) == fold_activations_(plain)
    torch.testing.assert_close(outputs(model), outputs(plain))
    assert [entry.name for entry in prepare_for_inference_(model)] == ["2.0", "5"]
    torch.testing.assert_close(outputs(model), outputs(plain))
    shown = [(entry.op, entry.problem) for entry in explain(model, INPUT)]
    # prepared, the module may run on another path
    assert shown == [(entry.op, entry.problem) for entry in explain(plain, INPUT)]
    assert not any("_orig_mod" in name for name, _ in to_chain(model).named_modules())
    torch.testing.assert_close(to_chain(model)(INPUT), outputs(plain))


def test_chains_are_fused(compile_: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    model[2][0] = TuckerConv2d(16, 32, 3, (8, 16)).to_sequential().eval()
    expected = outputs(model)
    model = compile_(model)  # type: ignore[assignment]
    assert [entry.name for entry in fuse_(model).replaced] == ["2.0"]
    torch.testing.assert_close(outputs(model), expected)


@pytest.mark.parametrize("reader", [*WAYS, None], ids=lambda way: way.__name__ if way else "uncompiled")
def test_files_have_the_names_of_the_uncompiled_model(
    way: Callable[[nn.Module], nn.Module], reader: Callable[[nn.Module], nn.Module] | None, tmp_path: Path
) -> None:
    model = way(network())
    factorized(model)
    save(model, tmp_path / "file")
    other = reader(network()) if reader else network()
    assert load(tmp_path / "file", other) is other
    torch.testing.assert_close(outputs(other), outputs(model))


def test_a_hook_of_distillation_is_not_skipped(compile_: Callable[[nn.Module], nn.Module]) -> None:
    teacher, student = network(), network()
    factorized(student)
    plain = copy.deepcopy(student)
    reports = [
        distill_(student, teacher, INPUT, steps=3, progress=False)
        for student, teacher in ((plain, teacher), (compile_(student), compile_(copy.deepcopy(teacher))))
    ]
    assert reports[1].layers == reports[0].layers == ("2.0", "5")
    torch.testing.assert_close(reports[1].losses, reports[0].losses)


def test_a_compiled_function_in_a_forward() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.call = torch.compile(lambda x: self.layer(x).relu(), backend="eager", fullgraph=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.call(x)  # type: ignore[no-any-return]

    model, input = Network(), torch.randn(40, 16)
    with torch.no_grad():
        before = model(input)
        (row,) = factorize_(model, rank=4, calibration=input, progress=False)
        assert row.calibration_rows == 40
        torch.testing.assert_close(model(input), model.layer(input).relu())
        assert not torch.allclose(model(input), before)


def test_a_layer_alone_and_a_layer_compiled_in_place() -> None:
    with pytest.raises(ValueError, match="model is a single Linear"):
        factorize_(compiled(nn.Linear(16, 16)), rank=4, progress=False)
    model = network()
    model[2][0].compile(backend="eager")
    assert "set on the instance (by compile()" in str(factorized(model)["2.0"].reason)
    assert outputs(model).isfinite().all()


def test_wrong_arguments_are_told_by_the_functions_name() -> None:
    with pytest.raises(TypeError, match=r"factorize_\(\) got an unexpected keyword argument 'ranks'"):
        factorize_(network(), ranks=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"save\(\) missing 2 required positional arguments"):
        save()  # type: ignore[call-arg]
