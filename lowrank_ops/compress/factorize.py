"""Whole models: `factorize_` replaces convolution and linear layers by factorized modules, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from lowrank_ops.budget.knapsack import Budget
from lowrank_ops.budget.menu import macs_in
from lowrank_ops.budget.spending import Spending
from lowrank_ops.compress.reasons import Left, Note
from lowrank_ops.compress.report import LayerReport, Report, other_modules
from lowrank_ops.compress.selection import Selectors
from lowrank_ops.compress.work import LayerWork, Settings, Work
from lowrank_ops.decompose import ranks
from lowrank_ops.decompose.cp import sensitivity
from lowrank_ops.decompose.ranks import Rank
from lowrank_ops.model.batches import Batches, device_of
from lowrank_ops.model.calls import CalledLayers
from lowrank_ops.model.example import Example
from lowrank_ops.model.sites import move_hooks
from lowrank_ops.model.state import leaves_model_state
from lowrank_ops.nn.base import FactorizedModule
from lowrank_ops.nn.counts import count_macs, count_parameters
from lowrank_ops.nn.modules import CPConv1d, CPConv2d
from lowrank_ops.runtime.compiled import takes_compiled
from lowrank_ops.runtime.torch_internals import ConvBase
from lowrank_ops.text.warn import warn

_CP = (CPConv1d, CPConv2d)


@takes_compiled()
@leaves_model_state
def factorize_(
    model: nn.Module,
    method: Literal["tucker", "cp", "auto"] = "tucker",
    rank: Rank | Budget = 0.5,
    *,
    linear: Rank | Literal[False] | None = None,
    include: Selectors = None,
    exclude: Selectors = None,
    calibration: Any = None,
    example_input: Any = None,
    multiple: int = 8,
    seed: int = 0,
    exact: bool = False,
    n_jobs: int | None = None,
    progress: bool = True,
) -> Report:
    """Replaces the convolution and linear layers of `model`, in place, by factorized modules.

    nn.Conv2d and nn.Conv1d become Tucker-2 or CP blocks, nn.Linear becomes `LowRankLinear`. A 1x1 convolution is a
    matrix: with either method it becomes a `CPConv2d` (`CPConv1d`) that holds the SVD of its weight, and spatial
    factors of ones. Training flags, requires_grad, forward and backward hooks (their handles too) are kept; a layer
    that stands in several places is replaced once, everywhere. The parameters are new: build the optimizer afterwards.

    Everything is decomposed before anything is replaced: after an error the model is as it was.

    Args:
        model: the network. A model that is itself one layer has no place for the replacement: use `from_conv2d` or
            `from_linear`.
        method: "tucker" (Tucker-2), "cp", or "auto": the one with the lower error at the cost, for each layer; "auto"
            needs a `Budget`.
        rank: as in `tucker_decompose` and `cp_decompose`. For a 1x1 convolution it is the rank of the matrix, the
            smaller one of a pair `(R1, R2)`. With a `Budget` for the whole network each layer gets its own ranks, or
            stays dense.
        linear: the rank of linear layers as in `svd_decompose`. None: `rank` (the smaller one of a pair). False: linear
            layers are left.
        include: only these layers; None means all. A glob pattern of qualified names ("features.*"), a module type, a
            callable `(name, layer) -> bool`, or several of them. A pattern or type also selects everything inside a
            module that it matches. A layer with at most 8 channels or features on a side must be listed by its own
            qualified name: `["*", "stem"]`.
        exclude: not these layers, in the same terms.
        calibration: real inputs without labels: a tensor, a list or a DataLoader of batches (see
            `lowrank_ops.model.batches.Batches`). See "Calibration" below.
        example_input: a tensor, a tuple of arguments or a dict of keyword arguments for the model. With it the report
            has output sizes, MACs of a forward pass, and milliseconds before and after, of layers and of the whole
            model; and an error in the factorized model shows at once. The model is in eval mode for these runs.
        multiple: ranks that are not given as ints are rounded up to a multiple of it (see `decompose.ranks`); ranks for
            a budget are multiples of it.
        seed: of the decompositions.
        exact: use no randomized SVD. Otherwise low ranks of large linear layers and 1x1 convolutions are decomposed by
            one where its error is at most 1 % above the least possible (`svd_decompose`).
        n_jobs: decompose in this many processes of one thread each (joblib), -1 in one per core; the result is the same
            bit for bit for every number. None: one layer after the other, with torch's threads.
        progress: whether to show progress bars on stderr.

    Calibration:
        With calibration data the factors keep the layers' outputs on these data rather than their weights, and each
        layer is fitted to the inputs that come from the factorized layers before it (`calibrate.fit_in_order`). A layer
        that is fitted gets a bias if it has none. Some hundred images, or a few thousand pixels per layer, are enough.
        If a layer has fewer rows than inputs, its factors lean on its weight, with a warning; if it has none, its
        factors keep its weight alone. The report notes both. A quarter of the rows is held out. The output errors in
        the report are measured on these rows, after a fit to the others; then the layer is fitted once more to all
        rows.

        The model runs in eval mode. For each layer and batch it runs twice up to that layer; if there are more than 16
        layers, some layers share their runs. Fold BatchNorm before (`fold_batchnorm_`), or re-estimate its statistics
        afterwards (`reestimate_batchnorm_`).

        Memory holds, besides the model and its factorized modules: second moments of a group of layers; rows of layers
        that are fitted together; one layer's matrices in fp64; and what a backward pass of a batch keeps. A group is as
        many layers as have moments that would take, as whole squares, a seventh of the model or 64 MiB, whichever is
        more, but at least one layer; lower triangles of them are kept. The rows are limited in the same way. If there
        are several groups (`calibrate.moment_groups`), the data are run over once for each group, twice with a
        `Budget`. With 1,024 fp32 rows on a CPU (`python -m benchmarks.studies.calibration_memory`), a process grew by
        at most 1.14 GiB for a model of 0.38 GiB in 48 layers (transformer blocks, 1024 wide), and by 0.48 GiB for a
        model of 0.13 GiB in two layers, from 2048 features to 8192 and back: there the moments of one layer take as
        much as the model.

    Layers that are left:
        The report gives the reason for each. A layer is left where

        * a block would have no fewer parameters or multiplications;
        * it has at most 8 channels or features on a side, unless `include` lists it by name or a `Budget` chooses the
          ranks;
        * an integer rank is above the layer's limit, or a budget is better spent on the dense layer;
        * it is a grouped, transposed or 3-D convolution, a subclass with a forward of its own, or has a computed
          (parametrized) weight;
        * it shares its weight with another module, or a module also holds it in a list or another plain attribute;
        * the parent module reads its weight itself (nn.MultiheadAttention.out_proj, the linear layers of
          nn.TransformerEncoderLayer), or a run of the model on `example_input` or `calibration` computes with its
          weight instead of calling it;
        * it has parameters, buffers, submodules, methods or an instance's forward of its own, state_dict hooks, or
          gradient hooks on weight or bias, which its replacement would lack;
        * its own `compile()` was called.

        A replacement has the attributes of a dense layer that models read: `weight`, `bias`, the arguments of nn.Linear
        and nn.Conv2d, and attributes that were set on the layer. Without `example_input` and `calibration` nobody sees
        that a model computes with a weight: then the factorized layer multiplies its factors each time that the model
        reads its `weight`, which warns once.

    A model that torch.compile has compiled, as a whole or in parts, runs uncompiled here, so milliseconds and a budget
    of latency are those of the uncompiled model; names are those without `_orig_mod`. The model is compiled anew at its
    next call.

    Buffers and other state that the model keeps between calls, and the global random generators, are as before
    afterwards; data are not changed.

    Returns:
        A `Report` with an entry per convolution, linear and factorized layer, and a line per kind of module that holds
        other parameters. If no layer is replaced, a warning says why.

    Raises:
        ValueError: non-finite weights (naming the layer); a model on the meta device that would have to run (with
            calibration data, an example input or a budget); a rank out of range, or above the limit of every layer that
            could be replaced; an `include` or `exclude` that matches nothing; a model that is one layer, or is already
            factorized; an unknown method; a budget that cannot be met (saying the closest, or that nothing can be
            replaced); calibration data that are empty, not finite, or reach none of the layers.
        TypeError: arguments of the wrong type.
        RuntimeError: the model fails on `example_input`, before or after (then it is as it was), or on the calibration
            data; the message names the layer in which it fails.
    """
    given = (rank[0], rank[1]) if isinstance(rank, list) and len(rank) == 2 else rank
    settings = Settings(method, given, linear, multiple, seed, exact, n_jobs, progress)
    _check_arguments(model, settings)
    work, budget = Work(model, settings), settings.budget
    layers = [layer.site.layer for layer in work.layers]
    _check_model(model, layers, runs=calibration is not None or example_input is not None or budget is not None)
    before, others = count_parameters(model), other_modules(model, layers)

    # Selection: layers are left that the user or their own kind rules out. The runs of the model on the example and on
    # the calibration data show which layers it computes with instead of calling them.
    work.select(include, exclude)
    batches = None if calibration is None else Batches(calibration, "factorize_: calibration", device_of(model))
    example = _recorded_example(model, layers, example_input, budget, batches)
    work.refuse()
    if example is not None:
        work.note_reads(example.calls.reads, "example_input")
        work.note_uncounted(example.calls)
    spending = None
    if budget is not None:
        spending = Spending(budget, model, example, calibrated=batches is not None, progress=progress)
        if spending.met_already([layer.site for layer in work.open()]):
            work.leave_all(Left.BUDGET_IS_MET)
    work.calibrate(batches)

    # Ranks within a budget; modules, decomposed and fitted.
    if spending is not None:
        work.spend(spending)
    work.decompose_and_fit()
    work.note_data()

    # Replacement and report.
    times = _replace(work, example)
    report = Report(
        type(model).__name__,
        [_entry(layer, work.rows_of(layer), example) for layer in work.layers],
        macs_per_call=example is not None,
        model_parameters_before=before,
        model_parameters_after=count_parameters(model),
        others=others,
        model_milliseconds_before=times[0],
        model_milliseconds_after=times[1],
        macs_elsewhere=None if example is None else example.calls.macs_elsewhere,
    )
    if not work.replaced() and budget is None:  # a budget has warned already, or raised an error
        notes = "; ".join(report.notes[:3]) or "it has no parameters"
        warn(f"factorize_: no layer of {report.model} was replaced: {notes}")
    return report


def _check_arguments(model: nn.Module, settings: Settings) -> None:
    """Raises for arguments of the wrong type or value, as far as that shows without the model's layers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"factorize_: model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, FactorizedModule):
        raise ValueError(f"factorize_: model is already factorized, a {type(model).__name__}; to_dense() undoes it")
    if isinstance(model, (ConvBase, nn.Linear)):
        raise ValueError(
            f"factorize_: model is a single {type(model).__name__}, which has no parent to hold the "
            "replacement; use TuckerConv2d.from_conv2d, CPConv2d.from_conv2d or LowRankLinear.from_linear, "
            "or wrap it in nn.Sequential"
        )
    method, rank, linear = settings.method, settings.rank, settings.linear
    if method not in ("tucker", "cp", "auto"):
        raise ValueError(f"factorize_: method must be 'tucker', 'cp' or 'auto', got {method!r}")
    ranks.check_multiple(settings.multiple, "factorize_")
    if isinstance(linear, (tuple, list)):
        raise ValueError(f"factorize_: linear must be a single rank, got {linear}")
    if linear is not None and linear is not False:
        ranks.check_rank(linear, "factorize_: linear")
    if isinstance(rank, Budget):
        if linear not in (None, False):
            raise ValueError(
                f"factorize_: linear must be None or False with a Budget, which chooses all ranks, got {linear}"
            )
        return
    if method == "auto":
        raise ValueError(f"factorize_: method 'auto' spends a budget; give rank=Budget(...), got {rank!r}")
    if method == "cp" and isinstance(rank, (tuple, list)):
        raise ValueError(f"factorize_: rank must be a single number for method 'cp', got {rank}")
    if isinstance(rank, (tuple, list)) and len(rank) != 2:
        raise ValueError(f"factorize_: rank must be a single rank or a pair (R1, R2), got {rank}")
    for entry in rank if isinstance(rank, (tuple, list)) else (rank,):
        ranks.check_rank(entry, "factorize_: rank")


def _check_model(model: nn.Module, layers: Sequence[nn.Module], runs: bool) -> None:
    """Raises ValueError where there is nothing left to factorize, or where the model would have to run and cannot."""
    if layers and all(isinstance(layer, FactorizedModule) for layer in layers):
        raise ValueError(
            f"factorize_: model is already factorized, all {len(layers)} of its layers; to_dense() of a layer undoes it"
        )
    for name, value in (*model.named_parameters(), *model.named_buffers()) if runs else ():
        if value.is_meta:
            raise ValueError(
                f"factorize_: the model cannot run, {name} is on the meta device, which has no values; load the "
                "weights first"
            )


def _recorded_example(
    model: nn.Module, layers: Sequence[nn.Module], given: Any, budget: Budget | None, batches: Batches | None
) -> Example | None:
    """The example that the user gave (`given`, or the budget's), or the one that the budget needs; its calls of the
    layers are recorded. None where there is no example and no need of one. Raises RuntimeError if the model fails."""
    if given is None and budget is not None:
        given = _example_for(budget, batches)
    if given is None:
        return None
    example = Example(model, given)
    with example.errors("factorize_: the model"):
        example.record(layers)
    return example


def _example_for(budget: Budget, batches: Batches | None) -> Any:
    """The input that a budget of multiplications or latency is for; None for one of parameters without an input."""
    if budget.example_input is not None:
        return budget.example_input
    if budget.kind == "params":
        return None
    if batches is None:
        raise ValueError(
            f"factorize_: a budget of {budget.kind} needs an input: give example_input=, or calibration data"
        )
    with batches.same_order():
        batch = next(iter(batches))
    return dict(batch.keywords) if batch.keywords else batch.arguments


def _replace(work: Work, example: Example | None) -> tuple[float | None, float | None]:
    """Puts the modules in their layers' places. With an example, layers and model are timed before, which also shows
    that the factorized model runs; if it does not, the model stays as it was.

    Returns the whole model's milliseconds on the example, before and after.
    """
    replaced = work.replaced()
    times: tuple[float | None, float | None] = (None, None)
    if example is not None:
        work.time_layers(example.calls)
        modules = {id(each.layer): each.module for each in replaced if each.module is not None}
        hint = "It was left as it was. It may use something of a layer that a factorized one lacks: exclude that layer"
        watched = CalledLayers([each.layer for each in replaced])
        with example.errors("factorize_: the factorized model", hint), watched:
            times = example.compare([each.site for each in replaced], modules)
        work.note_still_called(watched.called)
    for each in replaced:
        assert each.module is not None
        each.module._read_is_known = Note.ALSO_READ_BY_MODEL in each.notes
        each.site.put(each.module)
        move_hooks(each.layer, each.module)
    return times


def _entry(work: LayerWork, rows: int | None, example: Example | None) -> LayerReport:
    """The report of one layer."""
    layer, module = work.layer, work.module
    kernel = getattr(layer, "kernel_size", None)
    size = count_parameters(layer)
    present = layer if module is None else module
    rank = getattr(present, "rank", None)
    calls = None if example is None else example.calls.of(layer)
    before, after = work.milliseconds or (None, None)

    def macs(which: nn.Module) -> int | None:
        return count_macs(which) if calls is None else macs_in(calls, which)

    return LayerReport(
        name=work.name,
        type=type(layer).__name__,
        replaced_by=None if module is None else type(module).__name__,
        kernel=None if kernel is None else tuple(kernel),
        ranks=None if rank is None else rank if isinstance(rank, tuple) else (rank,),
        parameters_before=size,
        parameters_after=size if module is None else count_parameters(module),
        macs_before=macs(layer),
        macs_after=macs(present),
        weight_error=getattr(present, "relative_error", None),
        output_error=work.output_error,
        calibration_rows=rows,
        sensitivity=sensitivity(list(present.factors().values())) if isinstance(present, _CP) else None,
        reason=None if work.left is None else work.left.text,
        note=None if module is None else "; ".join(work.notes.values()) or None,
        output_size=None if calls is None else calls.output_size,
        milliseconds_before=before,
        milliseconds_after=after,
        aliases=tuple(work.site.names[1:]),
    )
