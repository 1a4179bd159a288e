"""`save` and `load`: the same values in another process, and the same bits from fused layers; files that do not fit are
refused, the model unchanged."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowrank_ops import (
    CPConv1d,
    CPConv2d,
    LowRankLinear,
    TuckerConv1d,
    TuckerConv2d,
    factorize_,
    fold_activations_,
    fold_batchnorm_,
    fuse_,
    load,
    save,
    set_policy,
)
from lowrank_ops.deploy import saving
from tests.support.paths import REPOSITORY

# As text, so that the other process can define the same class.
SOURCE = """
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, classes=20):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False, padding=1, padding_mode="reflect"))
        self.stem.extend([nn.BatchNorm2d(16), nn.ReLU()])
        self.body = nn.Sequential(
            nn.Conv2d(16, 32, (3, 5), stride=(1, 2), padding="valid", bias=False), nn.BatchNorm2d(32), nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding="same", dilation=2), nn.ReLU(),
        )
        self.line = nn.Sequential(nn.Flatten(2), nn.Conv1d(32, 24, 5), nn.GELU())
        self.shared = nn.Conv2d(32, 32, 3, padding=1)
        self.also_shared = self.shared
        self.head = nn.Linear(24, classes)
        self.tied = nn.Linear(24, classes, bias=False)
        self.tied.weight = self.head.weight
        self.register_buffer("offset", torch.zeros(classes))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, input):
        hidden = self.body(self.stem(input))
        hidden = self.also_shared(torch.relu(self.shared(hidden)))
        hidden = self.line(hidden).mean(2)
        return self.head(hidden) + self.tied(hidden) + self.offset
"""
INPUT = torch.randn(2, 3, 13, 21, generator=torch.Generator().manual_seed(0))
exec(SOURCE)


def network(seed: int = 0, **options: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Network(**options).eval()  # type: ignore[name-defined]  # noqa: F821
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.offset.normal_()
    return model


def factorized(method: str = "tucker", fold: bool = False, seed: int = 0) -> nn.Module:
    model = network(seed)
    report = factorize_(model, method, 0.25, exclude="stem", multiple=4, progress=False)
    assert len(report.replaced) == 4 and report["shared"].aliases == ("also_shared",)
    if fold:
        assert len(fold_batchnorm_(model).folded) == 2
        assert len(fold_activations_(model).folded) == 3
    return model


def unchanged(model: nn.Module) -> Callable[[], None]:
    """A check that the model is as it is now: modules, parameters by identity, values, activations."""
    modules = [(name, module, getattr(module, "activation", None)) for name, module in model.named_modules()]
    tensors = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}

    def check() -> None:
        assert modules == [(name, each, getattr(each, "activation", None)) for name, each in model.named_modules()]
        now = model.state_dict(keep_vars=True)
        assert list(now) == list(tensors)
        assert all(now[name] is old and torch.equal(old, value) for name, (old, value) in tensors.items())

    return check


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(("method", "fold"), [("tucker", True), ("cp", False)])
def test_another_process_gives_the_same_bits(path: Path, method: str, fold: bool) -> None:
    """Every tensor has the same bits, and every block's output on the input that it gets there. Other layers are
    torch's, which chooses among its convolutions and matrix products, so their outputs may differ."""
    model = factorized(method, fold).to(memory_format=torch.channels_last)
    save(model, path)
    threads = torch.get_num_threads()
    script = f"""{SOURCE}
import pickle, sys
import lowrank_ops
from lowrank_ops.nn.base import FactorizedModule
torch.set_num_threads({threads})
torch.manual_seed(99)
with open(sys.argv[2], "rb") as file:
    input = pickle.load(file)
model = lowrank_ops.load(sys.argv[1], Network().eval())
calls = []
for name, module in model.named_modules():
    if isinstance(module, FactorizedModule):
        module.register_forward_hook(lambda _, args, output, name=name: calls.append((name, args[0], output)))
with torch.no_grad(), lowrank_ops.set_policy("fused"):
    output = model(input)
with open(sys.argv[2], "wb") as file:
    pickle.dump((model.state_dict(), calls, output), file)
"""
    exchanged = path.with_name("exchanged")
    exchanged.write_bytes(pickle.dumps(INPUT))
    root = REPOSITORY
    subprocess.run([sys.executable, "-c", script, str(path), str(exchanged)], check=True, cwd=root)
    state, calls, output = pickle.loads(exchanged.read_bytes())
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value) and state[name].stride() == value.stride(), name
    assert [name for name, _, _ in calls] == ["body.0", "body.3", "shared", "shared", "line.1"]
    with torch.no_grad(), set_policy("fused"):
        for name, input, found in calls:
            assert found.norm() > 0 and torch.equal(model.get_submodule(name)(input), found), name
        torch.testing.assert_close(output, model(INPUT))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_everything_is_as_it_was(path: Path, dtype: torch.dtype, layout: torch.memory_format) -> None:
    model = factorized(fold=True).to(dtype).to(memory_format=layout)
    save(model, path)
    other = network(1).to(dtype)
    seen: list[Tensor] = []
    for layer in (other.head, other.body[0]):
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    other.body[0].weight.requires_grad_(False)
    head = other.head.weight
    assert load(path, other) is other
    assert repr(other) == repr(model)
    expected, state = model.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor) and state[name].dtype == tensor.dtype
        assert state[name].stride() == tensor.stride(), name
    assert other.also_shared is other.shared and isinstance(other.shared, TuckerConv2d)
    assert other.tied.weight is other.head.weight and other.head.weight is head
    assert not other.body[0].core.requires_grad and other.body[3].core.requires_grad
    assert other.body[3].relative_error == model.body[3].relative_error > 0
    other(INPUT.to(dtype))
    assert len(seen) == 2


def test_what_is_in_the_file(path: Path) -> None:
    """Tied tensors are stored once, non-persistent buffers not at all; other tools read the tensors by their names."""
    model = factorized()
    save(model, path)
    stored = load_file(path)
    left_out = {"tied.weight", *(name for name in model.state_dict() if name.startswith("also_shared."))}
    assert set(stored) == set(model.state_dict()) - left_out
    assert b"pickle" not in path.read_bytes()[:20000] and list(path.parent.iterdir()) == [path]
    assert torch.equal(stored["body.3.core"], model.body[3].core)


def test_into_a_model_of_this_structure(path: Path) -> None:
    model = factorized(fold=True)
    save(model, path)
    other = factorized(fold=True, seed=1)
    parameters = list(other.parameters())
    assert not torch.equal(other(INPUT), model(INPUT))
    load(path, other)
    assert all(new is old for new, old in zip(other.parameters(), parameters, strict=True))
    assert torch.equal(other(INPUT), model(INPUT))
    save(model, path)
    load(path, model)
    assert torch.equal(other(INPUT), model(INPUT))


def test_folded_only_in_the_file(path: Path) -> None:
    """A model that was factorized, but not folded, gets the activations and identities."""
    model = factorized(fold=True)
    save(model, path)
    other = load(path, factorized(seed=1))
    assert repr(other) == repr(model) and torch.equal(other(INPUT), model(INPUT))


def test_one_block(path: Path) -> None:
    for block in (TuckerConv1d(5, 6, 3, (2, 3)), CPConv1d(5, 6, 3, 4, bias=False), LowRankLinear(5, 6, 2)):
        save(block, path)
        other = copy.deepcopy(block)
        other.reset_parameters()
        load(path, other)
        assert torch.equal(other.out_factor, block.out_factor)
    check = unchanged(dense := nn.Linear(5, 6))
    with pytest.raises(ValueError, match="single block, which cannot take the place of the model itself"):
        load(path, dense)
    check()


class Chains(nn.Module):
    """Chains that fuse_ finds: inside a longer Sequential, a whole Sequential with an activation, a nested one."""

    def __init__(self) -> None:
        super().__init__()
        tucker = [nn.Conv2d(6, 4, 1, bias=False), nn.Conv2d(4, 12, 3, padding=1, bias=False), nn.Conv2d(12, 6, 1)]
        self.long = nn.Sequential(nn.ReLU(), *tucker, nn.SiLU(), nn.Conv2d(6, 6, 1))
        self.whole = nn.Sequential(*copy.deepcopy(tucker), nn.ReLU())
        self.deep = nn.Sequential(nn.Sequential(*copy.deepcopy(tucker)), nn.ReLU6(), nn.Conv2d(6, 5, 1))
        self.linear = nn.Sequential(nn.Linear(7, 3, bias=False), nn.Linear(3, 7))

    def forward(self, input: Tensor) -> Tensor:
        return self.linear(self.deep(self.whole(self.long(input))))


def test_fused_chains(path: Path) -> None:
    """Fused chains make nn.Sequentials shorter, and have higher ranks than a decomposition would."""
    model = Chains()
    assert len(fuse_(model).replaced) == 4
    assert list(model.long._modules) == ["0", "1", "5"] and isinstance(model.whole, TuckerConv2d)
    save(model, path)
    other = load(path, Chains())
    assert repr(other) == repr(model)
    input = torch.randn(1, 6, 7, 7)
    assert torch.equal(other(input), model(input))


def test_activation_that_fuse_took(path: Path) -> None:
    """fuse_ takes the activation after a factorized layer, and with it the nn.Sequential's place."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Tanh())

    model = build()
    factorize_(model, "cp", 4, progress=False)
    fuse_(model)
    assert list(model._modules) == ["0", "1", "3"] and isinstance(model[0], CPConv2d)
    save(model, path)
    other = load(path, build())
    assert repr(other) == repr(model)
    check = unchanged(third := build().insert(3, nn.Dropout()))
    with pytest.raises(ValueError, match=r"is an nn.Sequential of"):
        load(path, third)
    check()


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def edited(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        size = int.from_bytes(path.read_bytes()[:8], "little")
        structure = json.loads(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]["lowrank_ops"])
        edit(structure)
        save_file(load_file(path), path, metadata={"lowrank_ops": json.dumps(structure)})

    return damage


def overlapping(structure: dict) -> None:
    structure["strides"]["body.3.core"] = [0, 1, 1, 1]


def edited_tensors(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        tensors = load_file(path)
        size = int.from_bytes(path.read_bytes()[:8], "little")
        metadata = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
        edit(tensors)
        save_file(tensors, path, metadata=metadata)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "is no complete safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "is no complete safetensors file"),
        (lambda path: path.write_bytes(b""), "is no complete safetensors file"),
        (
            lambda path: torch.save({"weight": torch.zeros(3)}, path),
            "is a file of torch.save, which holds no structure",
        ),
        (without_metadata, "was not written by lowrank_ops.save"),
        (edited(lambda structure: structure.update(version=2)), "format 2, this lowrank_ops reads up to 1.*update"),
        (edited(lambda structure: structure.pop("version")), "the structure in it cannot be read"),
        (edited(lambda structure: structure.pop("same")), "the structure in it cannot be read"),
        (edited(lambda structure: structure.update(children=[])), "the structure in it cannot be read"),
        (edited(lambda structure: structure["blocks"][0].update(type="Linear")), "'Linear' in the file, which this"),
        (edited(lambda structure: structure["blocks"][0].update(rank=3)), "rank 3 is no rank of a TuckerConv2d"),
        (
            edited(lambda structure: structure["blocks"][0].update(rank=[3, 9])),
            r"core is \[8, 4, 3, 5\].* \[9, 3, 3, 5\]",
        ),
        (edited(lambda structure: structure["blocks"][0].update(activation="tanh")), "activation must be one of"),
        (
            edited(lambda structure: structure["blocks"][0]["arguments"].update(stride=[1, 1])),
            "body.0 is a TuckerConv2d",
        ),
        (edited(lambda structure: structure["blocks"][0].update(names=["gone"])), "the model has no module 'gone'"),
        (edited(lambda structure: structure["blocks"].pop()), "the model has no"),
        (edited(lambda structure: structure["identities"].append("head")), "head is nn.Identity in the file"),
        (edited(lambda structure: structure["identities"].append("line.2")), "folded, but GELU"),
        (
            edited(lambda structure: structure["biases"].append("tied")),
            "tied has a bias in the file, none in the model",
        ),
        (edited(lambda structure: structure["same"].clear()), "the file has no also_shared.in_factor"),
        (edited(overlapping), "body.3.core has the strides .* at which its entries overlap"),
        (edited_tensors(lambda tensors: tensors.pop("stem.0.weight")), "the file has no stem.0.weight"),
        (edited_tensors(lambda tensors: tensors.update(more=torch.zeros(1))), "the model has no more"),
        (
            edited_tensors(lambda tensors: tensors.update(offset=torch.zeros(20).half())),
            "offset is .* torch.float16 in the file, .* torch.float32 in the model; convert",
        ),
    ],
)
def test_files_that_are_refused(path: Path, damage: Callable[[Path], object], message: str) -> None:
    save(factorized(), path)
    damage(path)
    model = network(1)
    check = unchanged(model)
    with pytest.raises(ValueError, match=f"load: (?s:.*){message}"):
        load(path, model)
    check()


@pytest.mark.parametrize("target", [network, factorized])
def test_what_was_folded_is_taken_back(path: Path, target: Callable[..., nn.Module]) -> None:
    """If the last tensor of a file does not fit, the biases, identities and activations already put in are removed."""
    save(factorized(fold=True), path)
    edited_tensors(lambda tensors: tensors.update(offset=torch.zeros(3)))(path)
    model = target(seed=1)
    check = unchanged(model)
    with pytest.raises(ValueError, match="offset is"):
        load(path, model)
    check()


def other_convolution(model: nn.Module) -> None:
    model.body[3] = nn.Conv2d(32, 32, 3, padding=2)


def linear_at_a_convolution(model: nn.Module) -> None:
    model.body[3] = nn.Linear(32, 32)


def untied(model: nn.Module) -> None:
    model.tied.weight = nn.Parameter(model.tied.weight.detach().clone())


def tied_elsewhere(model: nn.Module) -> None:
    model.stem[1].bias = model.stem[1].weight


def unshared(model: nn.Module) -> None:
    model.also_shared = copy.deepcopy(model.shared)


def other_rank(model: nn.Module) -> None:
    factorize_(model, "tucker", 0.5, exclude="stem", multiple=4, progress=False)


def other_method(model: nn.Module) -> None:
    factorize_(model, "cp", 0.25, exclude="stem", multiple=4, progress=False)


def other_activation(model: nn.Module) -> None:
    factorize_(model, "tucker", 0.25, exclude="stem", multiple=4, progress=False)
    model.body[3].activation = "silu"


def on_meta(model: nn.Module) -> None:
    model.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            other_convolution,
            r"body.3 is a TuckerConv2d in the file, but of \{.*'dilation': \[2, 2\].*the model has Conv2d",
        ),
        (linear_at_a_convolution, "body.3 is a TuckerConv2d in the file, but the model has Linear"),
        (untied, "tied.weight is the same tensor as head.weight in the file only"),
        (tied_elsewhere, "stem.1.bias is the same tensor as stem.1.weight in the model only"),
        (unshared, r"shared stands at \['shared', 'also_shared'\] in the file, at \['shared'\] in the model"),
        (other_rank, r"body.0 is a TuckerConv2d in the file, but of rank \[4, 8\]"),
        (other_method, "body.0 is a TuckerConv2d in the file, but of rank"),
        (other_activation, "body.3 is a TuckerConv2d in the file, but its activation is none, the model has .*silu"),
        (lambda model: model.bfloat16(), "is .* torch.float32 in the file, .* torch.bfloat16 in the model"),
    ],
)
def test_models_that_are_refused(path: Path, change: Callable[[nn.Module], object], message: str) -> None:
    save(factorized(), path)
    model = network(1)
    change(model)
    check = unchanged(model)
    with pytest.raises(
        ValueError, match=f"load: .* holds a model of class Network, and does not fit this Network: .*{message}"
    ):
        load(path, model)
    check()


def test_the_same_class_with_other_sizes_and_other_classes(path: Path) -> None:
    save(factorized(), path)
    for model in (network(classes=10), nn.Sequential(nn.Conv2d(3, 3, 1))):
        check = unchanged(model)
        with pytest.raises(ValueError, match="does not fit this"):
            load(path, model)
        check()
    model = network().to("meta")
    with pytest.raises(ValueError, match="has no memory in the model"):
        load(path, model)
    assert isinstance(model.body[0], nn.Conv2d)


def test_two_threads_may_save_to_one_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that ends last wins; here the other one begins and ends during its work."""
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)

    def interrupted(*arguments: object, **options: object) -> None:
        save_file(*arguments, **options)
        monkeypatch.setattr(saving, "save_file", save_file)
        save(second, path)
        assert torch.equal(load_file(path)["weight"], second.weight)

    monkeypatch.setattr(saving, "save_file", interrupted)
    save(first, path)
    assert torch.equal(load_file(path)["weight"], first.weight)
    assert list(path.parent.iterdir()) == [path]


def test_arguments_of_the_wrong_kind(path: Path) -> None:
    with pytest.raises(TypeError, match=r"save: model must be an nn.Module, got dict"):
        save({}, path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"load: model must be an nn.Module, got type"):
        load(path, nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="load: there is no file"):
        load(path, network())
    with pytest.raises(OSError, match=r"save: .* cannot be written|No such file"):
        save(nn.Linear(2, 2), path / "in" / "no" / "folder")


class WithState(nn.Linear):
    def get_extra_state(self) -> object:
        return {1, 2}


class OwnBlock(LowRankLinear):
    pass


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
        (nn.LazyLinear(3), "weight is lazy"),
        (WithState(2, 2), "WithState has extra state"),
        (nn.Sequential(OwnBlock(4, 4, 2)), "0 is a OwnBlock, a subclass"),
    ],
)
def test_models_that_cannot_be_saved(path: Path, model: nn.Module, message: str) -> None:
    path.write_text("what was there")
    with pytest.raises(ValueError, match=f"save: {message}"):
        save(model, path)
    assert path.read_text() == "what was there" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (torch.eye(3).to_sparse(), "table is no plain strided tensor"),
        (torch.eye(3, dtype=torch.complex128), "safetensors has no dtype torch.complex128"),
    ],
)
def test_tensors_that_are_refused(path: Path, table: Tensor, message: str) -> None:
    model = nn.Module()
    model.register_buffer("table", table)
    with pytest.raises(ValueError, match=f"save: {message}"):
        save(model, path)
    assert not list(path.parent.iterdir())


def test_empty_and_scalar_tensors(path: Path) -> None:
    model = nn.Module()
    model.register_buffer("empty", torch.zeros(0, 3))
    model.register_buffer("also_empty", torch.zeros(0, 3))
    model.register_buffer("scalar", torch.tensor(3))
    save(model, path)
    model.scalar.zero_()
    load(path, model)
    assert model.scalar == 3
