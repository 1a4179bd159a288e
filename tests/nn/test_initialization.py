"""Initializers: the product of the factors against the dense initializer; Frobenius decay against W."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lowrank_ops
from lowrank_ops import CPConv1d, CPConv2d, LowRankLinear, Spectral, TuckerConv1d, TuckerConv2d, cp_decompose
from lowrank_ops.nn.init import NAMED, product_norm_squared

S, T = 10, 13
EPS = torch.finfo(torch.float64).eps

# Every kind, with unequal channels and ranks; the core of the second is wider than R2 KH KW would be.
KINDS = {
    "TuckerConv2d": functools.partial(TuckerConv2d, S, T, (3, 2), (5, 7)),
    "TuckerConv2d, R1 above R2": functools.partial(TuckerConv2d, S, T, 3, (8, 2)),
    "TuckerConv1d": functools.partial(TuckerConv1d, S, T, 3, (5, 7)),
    "CPConv2d": functools.partial(CPConv2d, S, T, (3, 5), 9),
    "CPConv1d": functools.partial(CPConv1d, S, T, 3, 9),
    "LowRankLinear": functools.partial(LowRankLinear, S, T, 4),
}
CONVS = [name for name in KINDS if name != "LowRankLinear"]
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


def product(module: nn.Module) -> Tensor:
    return module.to_dense().weight.detach()


def fans(weight: Tensor) -> tuple[int, int]:
    return weight[0].numel(), weight[:, 0].numel()


# E[w^2] that torch.nn.init's functions give a dense weight, by their documentation.
MOMENTS = {
    "uniform": lambda w: 1 / 3,
    "normal": lambda w: 1.0,
    # the variance of a standard normal cut off at 2 standard deviations: 1 - 4 phi(2) / (2 Phi(2) - 1)
    "trunc_normal": lambda w: 1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)),
    "ones": lambda w: 1.0,
    "xavier_uniform": lambda w: 2 / sum(fans(w)),
    "xavier_normal": lambda w: 2 / sum(fans(w)),
    "kaiming_uniform": lambda w: 2 / fans(w)[0],
    "kaiming_normal": lambda w: 2 / fans(w)[0],
    "orthogonal": lambda w: 1 / max(len(w), fans(w)[0]),
}
SYMMETRIC = [name for name in MOMENTS if name not in ("uniform", "ones")]


def test_every_initializer_of_torch_is_accounted_for() -> None:
    assert set(NAMED) == {*MOMENTS, "zeros", "eye", "dirac", "constant", "sparse"}


@pytest.mark.parametrize("init", MOMENTS)
@every_kind
def test_the_product_has_the_dense_weights_variance(make: functools.partial, init: str) -> None:
    """Over 100 draws, in each quarter of the weight: the mean square within 6 standard errors of the dense one's.

    The draws are independent, so the standard error of their mean is what they scatter by over sqrt(100). The
    quarters catch a variance that is right only on average; "uniform" and "ones" draw non-negative factors, whose
    product is of one sign, and there it is the mean square of the whole that is kept.
    """
    draws = 100
    torch.manual_seed(1)
    weights = torch.stack([product(make(dtype=torch.float64, init=init)) for _ in range(draws)])
    expected = MOMENTS[init](weights[0])
    whole = weights.square().flatten(1).mean(1)
    assert abs(whole.mean() - expected) <= 6 * whole.std() / math.sqrt(draws) + 1e-12 * expected
    if init in SYMMETRIC:
        for outputs in weights.tensor_split(2, dim=1):
            for quarter in outputs.tensor_split(2, dim=2):
                squares, values = quarter.square().flatten(1).mean(1), quarter.flatten(1).mean(1)
                assert abs(squares.mean() - expected) <= 6 * squares.std() / math.sqrt(draws)
                assert abs(values.mean()) <= 6 * values.std() / math.sqrt(draws)


@every_kind
def test_stages_keep_the_size_of_their_input(make: functools.partial) -> None:
    """All factors except the last have mean square 1 / (inputs per output), whatever the initializer's scale."""
    for init in ("xavier_uniform", functools.partial(nn.init.normal_, std=50.0)):
        factors = make(dtype=torch.float64, init=init).factors()
        for name, factor in factors.items():
            if name != "out_factor":
                mean_square = float(factor.detach().square().mean())
                assert mean_square * factor[0].numel() == pytest.approx(1, rel=factor.numel() * EPS)


@every_kind
def test_the_distribution_is_the_initializers(make: functools.partial) -> None:
    """Uniform factors have a largest magnitude near sqrt(3) of their root mean square, normal ones exceed it."""
    torch.manual_seed(0)
    ratios = {}
    for init in ("xavier_uniform", "xavier_normal"):
        drawn = [factor.detach() for _ in range(50) for factor in [make(init=init).in_factor]]
        ratios[init] = max(float(factor.abs().max() / factor.square().mean().sqrt()) for factor in drawn)
    # 50 draws of at least 20 values, each normalized by itself: the sample's rms is 5 standard deviations of the
    # estimate, 0.45 / sqrt(20) of it, off at most
    assert ratios["xavier_uniform"] < math.sqrt(3) * (1 + 5 * 0.45 / math.sqrt(20))
    assert ratios["xavier_normal"] > 2.5


def test_orthogonal_factors_are_orthogonal() -> None:
    torch.manual_seed(0)
    module = TuckerConv2d(S, T, 3, (5, 7), dtype=torch.float64, init="orthogonal")
    gram = (module.in_factor @ module.in_factor.T).detach()
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(5, dtype=torch.float64), rtol=0, atol=S * EPS * gram[0, 0])


def test_options_go_through_callables() -> None:
    torch.manual_seed(0)
    gain = functools.partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="linear")
    weights = torch.stack([product(LowRankLinear(S, T, 4, dtype=torch.float64, init=gain)) for _ in range(100)])
    squares = weights.square().flatten(1).mean(1)
    assert abs(squares.mean() - 1 / T) <= 6 * squares.std() / 10
    constant = product(CPConv2d(S, T, 3, 4, dtype=torch.float64, init=functools.partial(nn.init.constant_, val=0.25)))
    torch.testing.assert_close(constant, torch.full_like(constant, 0.25), rtol=100 * EPS, atol=0)
    sparse = LowRankLinear(S, T, 4, init=functools.partial(nn.init.sparse_, sparsity=0.5))
    assert bool((sparse.in_factor == 0).any()) and float(product(sparse).norm()) > 0


def test_ones_and_zeros() -> None:
    for make in KINDS.values():
        torch.testing.assert_close(
            product(make(dtype=torch.float64, init="ones")),
            torch.ones(()).double().expand_as(product(make())),
            rtol=100 * EPS,
            atol=0,
        )
        assert all(not factor.any() for factor in make(init="zeros").factors().values())


def test_identities() -> None:
    torch.testing.assert_close(
        product(LowRankLinear(S, T, 4, init="eye")),
        torch.diag(torch.ones(4)).new_zeros(T, S).fill_diagonal_(1) * (torch.arange(S) < 4),
        rtol=0,
        atol=0,
    )
    for name in CONVS:
        module = KINDS[name](init="dirac")
        expected = nn.init.dirac_(torch.empty_like(product(module)))
        count = min(module.rank) if isinstance(module.rank, tuple) else module.rank
        expected[count:] = 0
        assert torch.equal(product(module), expected) and expected.sum() == min(count, S)


DENSE_DEFAULT = functools.partial(nn.init.kaiming_uniform_, a=math.sqrt(5))


def drawn(seed: int, *shape: int, init: Callable[[Tensor], Tensor] = DENSE_DEFAULT) -> Tensor:
    """The draw of the dense weight with which a spectral initialization starts."""
    torch.manual_seed(seed)
    return init(torch.empty(shape, dtype=torch.float64))


def test_spectral_linear_is_the_best_matrix_of_its_rank() -> None:
    weight = drawn(3, T, S)
    torch.manual_seed(3)
    module = LowRankLinear(S, T, 4, dtype=torch.float64, init="spectral")
    values = torch.linalg.svdvals(weight)
    # singular values are computed to a few (max(S, T)) roundings of the largest (Golub & Van Loan, section 8.6)
    assert abs((weight - product(module)).norm() - values[4:].norm()) <= T * EPS * values[0]
    # the square roots of the singular values on both sides
    for gram in (module.in_factor @ module.in_factor.T, module.out_factor.T @ module.out_factor):
        torch.testing.assert_close(gram.detach(), torch.diag(values[:4]), rtol=0, atol=T * EPS * float(values[0]))
    assert module.relative_error is None


@pytest.mark.parametrize("kernel", [(3, 2), (3,)], ids=str)
def test_spectral_tucker_is_near_the_best_of_its_ranks(kernel: tuple[int, ...]) -> None:
    """Between the bounds of De Lathauwer et al. (2000): no approximation of these ranks is better than either
    unfolding's tail, and the truncated HOSVD is no worse than both together; and it is a projection of the draw."""
    weight = drawn(4, T, S, *kernel)
    torch.manual_seed(4)
    kind = TuckerConv2d if len(kernel) == 2 else TuckerConv1d
    module = kind(S, T, kernel, (5, 7), dtype=torch.float64, init="spectral")
    error = (weight - product(module)).norm()
    out_tail = torch.linalg.svdvals(weight.flatten(1))[7:].norm()
    in_tail = torch.linalg.svdvals(weight.transpose(0, 1).flatten(1))[5:].norm()
    assert max(out_tail, in_tail) <= error <= math.hypot(out_tail, in_tail)
    rounding = weight.numel() * EPS * float(weight.square().sum())
    assert abs(error**2 + product(module).square().sum() - weight.square().sum()) <= rounding


def test_spectral_cp_is_the_decomposition_of_the_draw() -> None:
    weight = drawn(5, T, S, 3, 3)
    torch.manual_seed(5)
    module = CPConv2d(S, T, 3, 9, dtype=torch.float64, init="spectral")
    error = float((weight - product(module)).norm() / weight.norm())
    assert error == pytest.approx(cp_decompose(weight, 9).relative_error, rel=1e-9)
    tails = [torch.linalg.svdvals(weight.transpose(0, axis).flatten(1))[9:].norm() / weight.norm() for axis in (0, 1)]
    assert max(tails) <= error < 0.95  # no rank-9 tensor is better; a random one would be above 1
    matrix = drawn(6, T, S, 1, 1)
    torch.manual_seed(6)
    pointwise = product(CPConv2d(S, T, 1, 4, dtype=torch.float64, init="spectral"))
    values = torch.linalg.svdvals(matrix.flatten(1))
    assert abs((matrix - pointwise).norm() - values[4:].norm()) <= T * EPS * values[0]


def test_spectral_of_another_initializer() -> None:
    """At full rank the product is the draw."""
    for init, function in (("kaiming_normal", nn.init.kaiming_normal_), (nn.init.orthogonal_, nn.init.orthogonal_)):
        weight = drawn(7, T, S, 3, 3, init=function)
        torch.manual_seed(7)
        module = TuckerConv2d(S, T, 3, (S, T), dtype=torch.float64, init=Spectral(init))
        assert (product(module) - weight).norm() <= weight.numel() * EPS * weight.norm()


@every_kind
def test_reset_draws_from_the_constructors_initializer(make: functools.partial) -> None:
    module = make(init="ones")
    first = {name: value.clone() for name, value in module.state_dict().items()}
    module.reset_parameters(init="xavier_normal")
    assert not torch.equal(module.in_factor, first["in_factor"])
    for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        other.reset_parameters()
        for name, factor in other.factors().items():
            assert torch.equal(factor, first[name])
    assert all(parameter.requires_grad for parameter in module.parameters())
    later = make(init="ones", device="meta").to_empty(device="cpu")
    later.reset_parameters()
    for name, factor in later.factors().items():
        assert torch.equal(factor, first[name]) and factor.stride() == first[name].stride()
    partial = make(init=functools.partial(nn.init.normal_, std=0.1))
    assert pickle.loads(pickle.dumps(partial)).init.keywords == {"std": 0.1}


@every_kind
def test_decomposed_modules_have_the_default(make: functools.partial) -> None:
    module = make(init="ones")
    assert type(module).from_sequential(module.to_sequential()).init == "default"
    torch.manual_seed(2)
    module.reset_parameters("default")
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), make().parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_the_rounded_float32_draw(dtype: torch.dtype) -> None:
    for make in KINDS.values():
        modules = []
        for own in (dtype, torch.float32):
            torch.manual_seed(0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                modules.append(make(init="orthogonal", dtype=own))
        for low, single in zip(*(module.factors().values() for module in modules), strict=True):
            assert torch.equal(low, single.to(dtype))


@every_kind
def test_refused_initializers_leave_the_module_alone(make: functools.partial) -> None:
    module = make()
    name = type(module).__name__
    matrix = name == "LowRankLinear"
    before = copy.deepcopy(module.state_dict())

    def broken(tensor: Tensor) -> None:
        raise ArithmeticError("out of luck")

    cases: list[tuple[object, type[Exception], str]] = [
        ("kaiming_norml", ValueError, f"{name}: init must be one of .*kaiming_normal.*got 'kaiming_norml'"),
        (
            "constant",
            ValueError,
            r"init 'constant' needs val: give functools.partial\(torch.nn.init.constant_, val=...\)",
        ),
        ("sparse", ValueError, "init 'sparse' needs sparsity"),
        ("dirac" if matrix else "eye", ValueError, f"only, use '{'eye' if matrix else 'dirac'}'"),
        (Spectral("spectral"), ValueError, "init must be one of"),
        (0.02, TypeError, f"{name}: init must be a name, a callable or Spectral.*got float"),
        (Spectral(0.02), TypeError, "got float"),  # type: ignore[arg-type]
        (broken, ValueError, rf"{name}: init broken cannot fill a tensor of shape \[13, 10.*out of luck"),
        (lambda tensor: torch.ones_like(tensor), ValueError, "must fill the tensor that it gets, in place"),
        (lambda tensor: tensor.fill_(math.inf), ValueError, "NaN or infinite"),
        (lambda tensor: tensor.fill_(float(len(tensor) == T)), ValueError, "drew factors whose product is zero"),
    ]
    if not matrix:
        cases.append((functools.partial(nn.init.sparse_, sparsity=0.5), ValueError, "Only tensors with 2 dimensions"))
    for init, error, message in cases:
        with pytest.raises(error, match=message):
            module.reset_parameters(init)  # type: ignore[arg-type]
        assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
        with pytest.raises(error, match=message):
            make(init=init)


# Frobenius decay


def dense_norm_squared(module: nn.Module) -> Tensor:
    """The squared norm computed from the dense weight, with gradients."""
    factors = module.factors()
    if isinstance(module, LowRankLinear):
        weight = lowrank_ops.reference.linear_weight(**factors)
    elif "core" in factors:
        core = factors["core"].flatten(2).unsqueeze(2)
        weight = lowrank_ops.reference.tucker_weight(factors["in_factor"], core, factors["out_factor"])
    else:
        height = factors.get("height_factor", torch.ones(module.rank, 1, dtype=torch.float64))
        weight = lowrank_ops.reference.cp_weight(
            factors["in_factor"], height, factors["width_factor"], factors["out_factor"]
        )
    return weight.square().sum()


@every_kind
def test_frobenius_norm_is_the_dense_weights(make: functools.partial) -> None:
    """Value and gradients in fp64. Both ways round sums of the same terms, at most as many as there are elements
    along all axes of the factors: within that many eps of the same expression on absolute values."""
    module = make(dtype=torch.float64, init="kaiming_normal")
    absolute = copy.deepcopy(module)
    for factor in absolute.factors().values():
        factor.data.abs_()
    roundings = EPS * sum(sum(factor.shape) for factor in module.factors().values())
    found, expected, magnitude = (
        lowrank_ops.frobenius_norm_squared(module),
        dense_norm_squared(module),
        dense_norm_squared(absolute),
    )
    assert expected > 0
    assert abs(found - expected) <= roundings * magnitude
    for value, exact, size in zip(
        torch.autograd.grad(found, list(module.factors().values())),
        torch.autograd.grad(expected, list(module.factors().values())),
        torch.autograd.grad(magnitude, list(absolute.factors().values())),
        strict=True,
    ):
        assert bool(((value - exact).abs() <= roundings * size).all())


@pytest.mark.parametrize("tucker", [True, False])
def test_frobenius_norm_gradients(tucker: bool) -> None:
    module = TuckerConv2d(3, 4, (2, 1), (2, 3)) if tucker else CPConv2d(3, 4, (2, 1), 3)
    names = list(module.factors())

    def norm(*values: Tensor) -> Tensor:
        return product_norm_squared(dict(zip(names, values, strict=True)))

    values = [factor.detach().double().requires_grad_() for factor in module.factors().values()]
    assert torch.autograd.gradcheck(norm, values)
    assert torch.autograd.gradgradcheck(norm, values)


def test_frobenius_norm_in_low_precision_and_under_autocast() -> None:
    for make in KINDS.values():
        module = make(dtype=torch.bfloat16)
        norm = lowrank_ops.frobenius_norm_squared(module)
        assert norm.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(lowrank_ops.frobenius_norm_squared(module), norm)
        assert torch.equal(lowrank_ops.frobenius_norm_squared(module.float()), norm)
        assert lowrank_ops.frobenius_norm_squared(module.to("meta")).is_meta


def test_frobenius_decay_over_a_model() -> None:
    shared = LowRankLinear(S, S, 3)
    model = nn.Sequential(TuckerConv2d(S, S, 3, 4), nn.ReLU(), nn.Sequential(shared, shared), nn.Linear(S, 2))
    penalty = lowrank_ops.frobenius_decay(model, 0.5)
    expected = 0.25 * (product(model[0]).square().sum() + product(shared).square().sum())
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-5)
    penalty.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"0.in_factor", "0.core", "0.out_factor", "2.0.in_factor", "2.0.out_factor"}
    assert lowrank_ops.frobenius_decay(model, 0).item() == 0


def test_frobenius_decay_decays_the_product() -> None:
    """A step of gradient descent on the penalty alone shrinks W by the rate, to first order, at rank 1."""
    module = LowRankLinear(S, T, 1, bias=False, dtype=torch.float64)
    before = product(module)
    rate = 1e-6
    lowrank_ops.frobenius_decay(module, 1.0).backward()
    with torch.no_grad():
        for factor in module.factors().values():
            factor -= rate * factor.grad
    # d(o i) = -rate (o |i|^2 i + o |o|^2 i): W shrinks by rate (|i|^2 + |o|^2), second-order terms aside
    shrink = rate * sum(float(factor.detach().square().sum()) for factor in (module.in_factor, module.out_factor))
    torch.testing.assert_close(product(module), (1 - shrink) * before, rtol=0, atol=10 * shrink**2)


def test_bad_input_of_frobenius_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="frobenius_decay: model must have a factorized layer, Sequential has none"):
        lowrank_ops.frobenius_decay(model, 0.1)
    with pytest.raises(TypeError, match=re.escape("frobenius_decay: model must be an nn.Module, got list")):
        lowrank_ops.frobenius_decay([model], 0.1)  # type: ignore[arg-type]
    layer = LowRankLinear(2, 2, 1)
    for weight, error in ((-0.1, ValueError), (math.nan, ValueError), ("0.1", TypeError), (True, TypeError)):
        with pytest.raises(error, match="frobenius_decay: weight must be"):
            lowrank_ops.frobenius_decay(layer, weight)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="frobenius_norm_squared: module must be a factorized layer, got Linear"):
        lowrank_ops.frobenius_norm_squared(model[0])
