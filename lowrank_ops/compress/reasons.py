"""Why `factorize_` leaves a layer dense, and what its report notes of a layer that is replaced.

Each case is a member of an enum, whose value is the text for the report; words in braces are filled in per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, unique


@unique
class Left(Enum):
    """Why a layer is left dense."""

    EXCLUDED = "excluded by {selector}"
    NOT_INCLUDED = "not in include"
    NOT_REPLACEABLE = "{obstacle}"
    NARROW = (
        "layers of at most {limit} channels or features stay dense ({inputs} in, {outputs} out) unless include names "
        "them: include=['*', {name!r}]"
    )
    LINEAR_IS_FALSE = "linear=False leaves linear layers"
    READ_BY_MODEL = (
        "on {data} the model computes with its weight instead of calling it: the factors would be multiplied each "
        "time, and nothing gained"
    )
    BUDGET_IS_MET = "the budget is met without it"
    NO_CHEAPER_BLOCK = "no factorized block would take fewer {noun}"
    DENSE_IS_BETTER = "dense is the better use of the budget"
    RANK_ABOVE_LIMIT = "{error}"
    NOT_SMALLER = "would not shrink: rank {rank} has {factorized} {noun}, the dense layer {dense}"

    def because(self, **words: object) -> Reason:
        """This case for one layer, with the words for its text."""
        return Reason(self, self.value.format(**words))


@dataclass(frozen=True)
class Reason:
    """Why one layer is left dense: the case, and the text for the report."""

    case: Left
    text: str

    def add(self, text: str) -> Reason:
        """The same case with one more statement in its text."""
        return Reason(self.case, f"{self.text}; {text}")


@unique
class Note(Enum):
    """A remark in the report on a layer that is replaced."""

    ALSO_READ_BY_MODEL = "the model also computes with its weight: the factors are multiplied each time"
    STILL_CALLED = "the model goes on calling the dense layer, which it holds elsewhere than in its modules"
    NO_DATA = "the calibration data do not reach it: its factors keep its weight alone"
    FEW_DATA = "{rows} calibration rows for {inputs} inputs: its factors lean on its weight"
