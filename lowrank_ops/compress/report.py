"""Reports of what `factorize_` and `fuse_` did to a model, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from rich.table import Table
from torch import nn
from torch.nn.parameter import is_lazy

from lowrank_ops.text.notes import grouped, listed
from lowrank_ops.text.tables import as_html, as_text, new_table

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class LayerReport:
    """One layer. Fields that do not apply or are not known are None.

    Attributes:
        name: qualified name in the model; a layer that stands in several places has the others in `aliases`.
        type: class of the layer that was found.
        replaced_by: class of the factorized module; None if the layer was left as it is.
        kernel: kernel size per axis, of convolutions.
        ranks: `(R1, R2)` for Tucker, `(R,)` otherwise.
        parameters_before, parameters_after: numbers of parameters, bias included; equal if it was left.
        macs_before, macs_after: multiply-accumulates. With an example input they are those of one forward pass: of all
            calls of the layer, and of the matrix products and convolutions by its weight that the model computes
            itself. Without one they are those per output pixel (per row for a linear layer).
        weight_error: `||W - W_dense|| / ||W_dense||`.
        output_error: relative error of the layer's output on rows of the calibration data that were held out of the
            fit (a quarter), with the inputs that the factorized layers before it give it.
        calibration_rows: output positions (rows of a linear layer) that the layer computed on the calibration data,
            held-out ones included.
        sensitivity: for a CP convolution: how strongly noise in its factors changes its weight, see
            `lowrank_ops.decompose.cp.sensitivity`.
        reason: why the layer was left.
        note: a remark on a layer that was replaced: no or few calibration data reach it, the model also computes with
            its weight, or it still calls the dense layer.
        output_size: shape of the layer's output with the example input, of its first call.
        milliseconds_before, milliseconds_after: median time of the layer's calls with the example input, each layer
            timed by itself. They need not add up to the model's: `Report.notes` says so where they are more.
    """

    name: str
    type: str
    replaced_by: str | None = None
    kernel: tuple[int, ...] | None = None
    ranks: tuple[int, ...] | None = None
    parameters_before: int = 0
    parameters_after: int = 0
    macs_before: int | None = None
    macs_after: int | None = None
    weight_error: float | None = None
    output_error: float | None = None
    calibration_rows: int | None = None
    sensitivity: float | None = None
    reason: str | None = None
    note: str | None = None
    output_size: tuple[int, ...] | None = None
    milliseconds_before: float | None = None
    milliseconds_after: float | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class OtherModule:
    """A module with parameters that belong to no layer of the report: it cannot be factorized.

    Attributes:
        name: qualified name in the model, "" for the model itself.
        type: its class.
        parameters: number of parameters that it holds itself, not those of its children. Each parameter of a model
            counts once; those of lazy modules do not count.
    """

    name: str
    type: str
    parameters: int


@dataclass(frozen=True)
class Report:
    """The layers that were looked at, in the model's order, iterable; `print(report)` shows them as a table.

    Attributes:
        model: class name of the model.
        layers: one entry per layer.
        macs_per_call: whether MACs are those of a forward pass (an example input was given) or per output
            pixel.
        model_parameters_before, model_parameters_after: of the whole model, layers without an entry included.
        others: the modules that hold the parameters of the model that have no entry in `layers`.
        model_milliseconds_before, model_milliseconds_after: median time of the whole model on the example input; None
            without one.
        macs_elsewhere: multiply-accumulates of a forward pass on the example input outside of the layers, as far as
            torch counts them (`torch.utils.flop_counter`): matrix products with other parameters, and of activations
            with each other, but, as of torch 2.13, not fused attention and recurrent layers on the CPU. None without an
            example input.
    """

    model: str
    layers: list[LayerReport] = field(default_factory=list)
    macs_per_call: bool = False
    model_parameters_before: int = 0
    model_parameters_after: int = 0
    others: list[OtherModule] = field(default_factory=list)
    model_milliseconds_before: float | None = None
    model_milliseconds_after: float | None = None
    macs_elsewhere: int | None = None

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerReport:
        """The entry of a layer by any of its qualified names. Raises KeyError."""
        for layer in self.layers:
            if name == layer.name or name in layer.aliases:
                return layer
        raise KeyError(f"no layer {name!r} in the report; it has {listed([layer.name for layer in self.layers])}")

    @property
    def replaced(self) -> list[LayerReport]:
        """The layers that were replaced."""
        return [layer for layer in self.layers if layer.replaced_by is not None]

    @property
    def skipped(self) -> list[LayerReport]:
        """The layers that were left, each with its reason."""
        return [layer for layer in self.layers if layer.replaced_by is None]

    def total(self, column: str) -> float | None:
        """A column's total, e.g. of "macs_before" or "milliseconds_after"; None if it is not known.

        Parameters and milliseconds are those of the whole model. MACs are the sum over the layers, without
        `macs_elsewhere`; those per output pixel are not summed: their pixels differ.
        """
        if column.startswith(("parameters", "milliseconds")):
            return getattr(self, f"model_{column}")  # type: ignore[no-any-return]
        if column.startswith("macs") and not self.macs_per_call:
            return None
        values = [getattr(layer, column) for layer in self.layers]
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    def to_pandas(self) -> pandas.DataFrame:
        """One row per layer: `model`, `layer`, `rank`, `uncompressed_layer_size`, `compressed_layer_size`
        (numbers of parameters), their ratio as `compressed_layer_size/uncompressed_layer_size`, and the
        fields of `LayerReport`.

        Raises ImportError if pandas is missing.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Report.to_pandas: pandas is not installed; `pip install pandas`") from error
        rest = [entry.name for entry in fields(LayerReport) if entry.name not in ("name", "ranks")]
        columns = ["model", "layer", "rank", *_SIZES, *rest]
        rows = [
            [
                self.model,
                layer.name,
                layer.ranks,
                layer.parameters_before,
                layer.parameters_after,
                layer.parameters_after / max(layer.parameters_before, 1),
                *(getattr(layer, column) for column in rest),
            ]
            for layer in self.layers
        ]
        return pandas.DataFrame(rows, columns=columns)

    def to_table(self) -> Table:
        """The table that `print(report)` shows, for a rich console, without the `notes` below it."""
        unit = "" if self.macs_per_call else " per position"
        fitted = any(layer.output_error is not None for layer in self.layers)
        timed = self.total("milliseconds_before") is not None
        table = new_table(f"{self.model}: {len(self.replaced)} of {len(self)} layers replaced", show_footer=True)
        for column in ("layer", "type", "kernel", "ranks"):
            table.add_column(column, footer="total" if column == "layer" else "", overflow="fold")

        def add(heading: str, column: str) -> None:
            footer = _change(self.total(f"{column}_before"), self.total(f"{column}_after"))
            table.add_column(heading, justify="right", footer=footer, overflow="fold")

        add("parameters", "parameters")
        add(f"MACs{unit}", "macs")
        table.add_column("output error" if fitted else "weight error", justify="right", overflow="fold")
        if timed:
            add("ms", "milliseconds")
        for layer in self.layers:
            cells = [
                layer.name,
                layer.type if layer.replaced_by is None else f"{layer.type} > {layer.replaced_by}",
                "" if layer.kernel is None else "x".join(map(str, layer.kernel)),
                "" if layer.ranks is None else ", ".join(map(str, layer.ranks)),
                _change(layer.parameters_before, layer.parameters_after),
                _change(layer.macs_before, layer.macs_after),
                _error(layer.output_error if fitted else layer.weight_error),  # blank: no row was held out
            ]
            if timed:
                cells.append(_change(layer.milliseconds_before, layer.milliseconds_after))
            table.add_row(*cells)
        return table

    @property
    def notes(self) -> list[str]:
        """The lines below the table: why layers were left, remarks on those that were replaced, and what lies outside
        of all layers."""
        lines = []
        for reason, left in grouped((layer.reason, layer) for layer in self.skipped):
            kinds = ", ".join(dict.fromkeys(layer.type for layer in left))
            lines.append(f"left: {listed([layer.name for layer in left])} ({kinds}; {self._shares(left)}): {reason}")
        for note, told in grouped((layer.note, layer) for layer in self.replaced):
            lines.append(f"{listed([layer.name for layer in told])}: {note}")
        for kind in dict.fromkeys(other.type for other in self.others):
            found = [other for other in self.others if other.type == kind]
            share = _percent(sum(other.parameters for other in found), self.model_parameters_before)
            names = listed([other.name or "the model itself" for other in found])
            lines.append(f"not a layer that can be factorized: {kind} ({names}), {share} of the parameters")
        if self.macs_elsewhere:
            whole = self.macs_elsewhere + (self.total("macs_before") or 0)
            share = _percent(self.macs_elsewhere, whole)
            macs = _number(self.macs_elsewhere)
            lines.append(f"not in the MACs above: {macs} outside of these layers, {share} of all")
        return lines + self._times_apart()

    def _times_apart(self) -> list[str]:
        """A line for the case that the layers' times add up to more than the model's time."""
        sums, totals = [], []
        for column in ("milliseconds_before", "milliseconds_after"):
            sums.append(math.fsum(getattr(layer, column) or 0 for layer in self.layers))
            totals.append(self.total(column))
        if not any(total is not None and sum > _NOISE * total for sum, total in zip(sums, totals, strict=True)):
            return []
        return [
            f"the layers' times, each layer timed by itself, add up to {_change(*sums)} ms, more than the model's "
            f"{_change(*totals)}: the machine was busy, or the model's calls overlap; compare a layer's two times with "
            "each other, not with the total"
        ]

    def _shares(self, layers: Sequence[LayerReport]) -> str:
        """The share of the dense model's parameters and MACs that these layers have."""
        parameters = _percent(sum(layer.parameters_before for layer in layers), self.model_parameters_before)
        macs = self.total("macs_before")
        if not macs:
            return f"{parameters} of the parameters"
        own = _percent(sum(layer.macs_before or 0 for layer in layers), macs)
        return f"{parameters} of the parameters, {own} of the MACs"

    def __str__(self) -> str:
        return as_text(self.to_table(), *self.notes)

    def _repr_html_(self) -> str:
        return as_html(self.to_table(), *self.notes)


# The layers' times may exceed the model's by this factor without a remark: medians of short runs on a quiet machine
# differ by a few percent.
_NOISE = 1.1

_SIZES = (
    "uncompressed_layer_size",
    "compressed_layer_size",
    "compressed_layer_size/uncompressed_layer_size",
)


def other_modules(model: nn.Module, layers: Iterable[nn.Module]) -> list[OtherModule]:
    """The modules that hold the parameters of `model` that are not in `layers`."""
    known = {id(parameter) for layer in layers for parameter in layer.parameters()}
    found = []
    for name, module in model.named_modules():
        own = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in known]
        known.update(map(id, own))
        if own:
            count = sum(parameter.numel() for parameter in own if not is_lazy(parameter))
            found.append(OtherModule(name, type(module).__name__, count))
    return found


def _change(before: float | None, after: float | None) -> str:
    """ "before > after (ratio)"; "before" if that is all that is known, or if both are the same."""
    if before is None:
        return ""
    if after is None or before == after:
        return _number(before)
    return f"{_number(before)} > {_number(after)} ({before / after:.2f}x)" if after else f"{_number(before)} > 0"


def _percent(part: float, whole: float) -> str:
    share = 100 * part / whole if whole else 0.0
    return "under 0.1 %" if 0 < share < 0.1 else f"{share:.1f} %"


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _number(value: float) -> str:
    if isinstance(value, float):
        return f"{value:.3f}" if value < 100 else f"{value:.1f}"
    for least, unit, suffix in ((10**9, 10**9, "G"), (10**6, 10**6, "M"), (10**4, 10**3, "k")):
        if value >= least:
            return f"{value / unit:.2f}{suffix}"  # one word, which no table breaks
    return str(value)
