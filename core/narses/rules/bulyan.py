"""Bulyan: an election repeated, then the middle of what it elected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass

from narses.combine import Combine, LowerMedian, Median, Nearest, UpperMedian
from narses.config import STRICT
from narses.registry import build, resolve
from narses.rules.base import Aggregation, Context, Norm, Property, require
from narses.updates import Updates

_MIDDLE: dict[str, Combine] = {"lower": LowerMedian(), "upper": UpperMedian(), "midpoint": Median()}


@runtime_checkable
class Inner(Protocol):
    """What a rule offers to be repeated inside Bulyan."""

    @property
    def p(self) -> float:
        """The norm of its distances."""

    @property
    def mixes(self) -> bool:
        """Whether its output is a mixture of updates, whose distances only for p = 2 follow from those between updates."""

    def selection_order(self, updates: Updates, f: int, count: int) -> list[int]:
        """`count` rows, one after another: the one closest to the rule's output on what remains, then removed."""


def _default_inner() -> Any:
    return {"name": "krum"}


@dataclass(frozen=True, config=STRICT)
class Bulyan:
    """Elect theta updates by repeating `inner`; per coordinate, average the beta of them nearest their median.

    An election takes the remaining update nearest inner's output on those that remain: for krum and medoid the output.
    n >= 4f + 3. Cost O(n^2 D) for distances, O(theta n^2) for the elections, O(theta log^2 theta D) for the middle;
    inner = median reads the updates in each election, and that of brute searches.
    El Mhamdi et al., The Hidden Vulnerability of Distributed Learning in Byzantium, ICML 2018, section 4: theta = n -
    2f, beta = theta - 2f. That theta leaves the last inner Krum 2f + 1 candidates, not the 2f + 3 the paper claims,
    hence f - 1 neighbours, held at 1 or more. theta = "n-2f-2" is what AggregaThor does (which
    collects the means of its Multi-Krum themselves, not the updates nearest them). keep is named for the
    paper's theta: "n-4f" is beta = theta - 2f, "n-4f-1" one fewer ("A Little Is Enough"'s code). The median is one of
    the elected values (lower for even theta; "upper": AggregaThor; "midpoint": numpy). f = 0 with the paper's theta
    is the mean.

    A kept value is at most as far from the median as some honest value. It may nevertheless lie outside the honest
    range: the proof of Proposition 2 counts f discarded values on each side of the median, but all 2f may be on one
    side.
    """

    p: Norm = 2.0
    inner: Inner = Field(default_factory=_default_inner, validate_default=True)
    theta: Literal["n-2f", "n-2f-2"] = "n-2f"
    keep: Literal["n-4f", "n-4f-1"] = "n-4f"
    middle: Literal["lower", "upper", "midpoint"] = "lower"

    properties: ClassVar[frozenset[Property]] = frozenset(
        {
            Property.PERMUTATION,
            Property.TRANSLATION,
            Property.SCALING,
            Property.INPUT_RANGE,
            Property.HONEST_WIDTH,
        }
    )

    @field_validator("inner", mode="before")
    @classmethod
    def _build_inner(cls, value: Any, info: ValidationInfo) -> Any:
        from narses.rules import RULES  # the registry holds this class

        p = info.data.get("p", 2.0)
        table = {"name": value} if isinstance(value, str) else value
        if isinstance(table, Mapping) and isinstance(table.get("name"), str):
            entry = resolve("rule", RULES, table["name"], trusted=True)
            if not hasattr(entry, "selection_order"):
                supported = ", ".join(sorted(name for name in RULES if hasattr(RULES[name], "selection_order")))
                raise ValueError(f"bulyan cannot repeat {table['name']!r}: expected one of {supported}")
            if "p" in {field.name for field in fields(entry)}:
                table = {"p": p, **table}
        inner = build("rule", RULES, table, trusted=True)
        if not isinstance(inner, Inner):
            raise ValueError(f"bulyan cannot repeat {inner!r}: it has no selection_order")
        if inner.mixes and p != 2:
            raise ValueError(f"{type(inner).__name__} mixes updates, which bulyan repeats for p = 2 only, not p = {p}")
        if inner.p != p:
            raise ValueError(f"its p = {inner.p} differs from bulyan's p = {p}; give p once, to bulyan")
        return inner

    def __post_init__(self) -> None:
        # Elections among mixtures, or of sets of equal diameter, tie on ordinary data: then the order of the rows decides.
        claims: frozenset[Property] = getattr(self.inner, "properties", frozenset())
        if getattr(self.inner, "mixes", False) or Property.PERMUTATION not in claims:
            object.__setattr__(self, "properties", type(self).properties - {Property.PERMUTATION})

    def min_updates(self, f: int) -> int:
        # Only one combination needs more than the paper: at n = 4f + 3 it would keep n - 4f - 3 = 0 values.
        return 4 * f + (4 if (self.theta, self.keep) == ("n-2f-2", "n-4f-1") else 3)

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        require(self, updates, f)
        theta = len(updates) - 2 * f - (2 if self.theta == "n-2f-2" else 0)
        beta = theta - 2 * f - (1 if self.keep == "n-4f-1" else 0)
        selected_T = torch.tensor(sorted(self.inner.selection_order(updates, f, theta)))
        vector_D = updates.per_coordinate(Nearest(beta, _MIDDLE[self.middle]), rows=selected_T)
        return Aggregation(vector_D, selected_T)
