"""What aggregation rules have in common: protocol, result, claimed properties, and when one may be called."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

from pydantic import AfterValidator, BeforeValidator, Field
from torch import Tensor

from narses.errors import ConfigError, InputError
from narses.updates import Updates


class Aggregation(NamedTuple):
    """What a rule returns.

    `state` is dense tensors of any length and of the common types, everything that the rule must know of the rounds so far;
    an empty one is the same as None. The server keeps it apart from `vector_D`, steps with that, and saves the state where
    it makes rounds durable, so that a run which was killed goes on with the same bits.
    """

    vector_D: Tensor
    selected: Tensor | None = None  # rows used whole, ascending (CPU, int64); None where every row has a say
    scores: Tensor | None = None  # the rule's own score per row (CPU, float64) where it has one; the smallest wins
    state: Mapping[str, Tensor] | None = None  # of the few stateful rules, named: handed back next round, checkpointed


class TrustedBatch(Protocol):
    """A few samples of the server's own data, drawn anew for every round; for rules that judge updates by them."""

    def gradient(self, parameters_D: Tensor) -> Tensor:
        """The gradient of `loss` at `parameters_D` (D,), as (D,) float32 on the CPU."""

    def loss(self, parameters_D: Tensor) -> float:
        """The mean loss over the samples at `parameters_D` (D,)."""


@dataclass(frozen=True)
class Context:
    """The round a rule is called in, for the few that need it; randomness is a function of (the rule's seed, round)."""

    round: int
    parameters_D: Tensor | None = None
    learning_rate: float | None = None
    state: Mapping[str, Tensor] | None = None  # what the rule's last call returned; after a resume it is on the CPU
    trusted: TrustedBatch | None = None  # for rules with trusted_samples > 0


class Property(StrEnum):
    """What a rule may claim in `properties`; each claim is tested for every registry entry that makes it."""

    PERMUTATION = "permutation"  # reordering the rows reorders `selected` and changes nothing else, away from ties
    TRANSLATION = "translation"  # x + c for every row gives the result + c
    SCALING = "scaling"  # s x for every row, s > 0, gives s times the result
    INPUT_RANGE = "input-range"  # each coordinate lies between the smallest and the largest input
    HONEST_RANGE = "honest-range"  # ... between the smallest and the largest honest input, whatever f others send
    HONEST_WIDTH = (
        "honest-width"  # ... at most the honest range's width outside the honest range, whatever f others send
    )
    IS_INPUT = "is-input"  # the result is, bit for bit, the one row in `selected`


class Rule(Protocol):
    """A gradient aggregation rule: a frozen pydantic dataclass; its fields are hyper-parameters and configuration."""

    properties: ClassVar[frozenset[Property]]

    def min_updates(self, f: int) -> int:
        """The fewest updates among which the rule tolerates f Byzantine ones."""

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation: ...


def trusted_samples(rule: object) -> int:
    """How many samples of the server's own data `rule` wants in `Context.trusted`; 0: it needs none."""
    return int(getattr(rule, "trusted_samples", 0))


def extra_rows(rule: object, n: int) -> int:
    """How many vectors (D,) `rule` needs beside n updates and its result; 0 for all but those that change updates first."""
    wanted = getattr(rule, "extra_rows", None)
    return 0 if wanted is None else int(wanted(n))


def round_of(context: Context | None) -> int:
    """The round that randomness is drawn for: 0 where a rule is called without a context."""
    return 0 if context is None else context.round


def _norm_from_text(value: Any) -> Any:
    return math.inf if value == "inf" else value


def _check_norm(value: float) -> float:
    if not value >= 1:
        raise ValueError(f"p = {value}: expected a number >= 1 or inf")
    return value


# The p of an l_p norm. The text "inf" is what JSON has for infinity.
Norm = Annotated[float, BeforeValidator(_norm_from_text), AfterValidator(_check_norm)]

# A length, a ratio: larger than 0 and finite.
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def check(rule: Rule, n: int, f: int) -> None:
    """ConfigError, in one sentence with its remedy, if `rule` cannot tolerate f Byzantine updates among n."""
    sentence = _shortfall(rule, n, f)
    if sentence is not None:
        raise ConfigError(sentence)


def require(rule: Rule, updates: Updates, f: int) -> None:
    """InputError if `rule` may not be called with these updates and this f: the first line of every rule."""
    sentence = _shortfall(rule, len(updates), f)
    if sentence is not None:
        raise InputError(sentence)


def _shortfall(rule: Rule, n: int, f: int) -> str | None:
    name = type(rule).__name__
    if isinstance(f, bool) or not _is_index(f) or f < 0:
        return f"{name}: f = {f!r}, expected a whole number >= 0 of Byzantine updates"
    if f > n:
        return f"{name}: f = {f} Byzantine updates of n = {n}, expected f <= n"
    need = rule.min_updates(f)
    if n >= need:
        return None
    tolerated = max((g for g in range(f) if rule.min_updates(g) <= n), default=None)
    instead = "" if tolerated is None else f" or declare f <= {tolerated}"
    return f"{name} with f = {f} needs n >= {need} updates but has n = {n}: add {need - n}{instead}"


def _is_index(value: object) -> bool:
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
