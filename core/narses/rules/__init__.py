"""Aggregation rules: (N, D) updates -> one (D,) vector that survives the f liars among them.

A rule is a frozen pydantic dataclass in one file; being listed in RULES buys it the contract tests.

 1. It is called as rule(updates, f, context) and its first line is `require(self, updates, f)`: fewer than
    min_updates(f) updates, or an f that is negative or no whole number, MUST raise InputError. Entries are finite:
    `Updates.of` saw to that.
 2. It MUST ask only the questions of `Updates`, and MUST NOT write to what they return unless it is documented as
    fresh.
 3. The input MUST NOT be written to.
 4. vector_D MUST be fresh memory, shape (D,), of the updates' dtype and device.
 5. Finite input of any size MUST give finite output: intermediate sums are float64, and 1e30 may be squared.
 6. Exact ties MUST go to the smallest row; equal values inside a coordinate to the smaller value.
 7. The same input MUST give the same bits on one machine's CPU, whatever torch's thread count; randomness MUST be a
    function of (a seed field, context.round).
 8. Identical rows MUST give that row, at every f the rule accepts; in float32 exactly. Exempt are rules whose formula
    sets lengths, each named with its reason in the contract tests (`gives_back`).
 9. Hyper-parameters MUST be fields, with defaults from the paper's text; f MUST NOT be one. min_updates MUST NOT fall
    as f grows.
10. `properties` MUST list what the rule claims (`Property`), and no more.
11. `selected` MUST hold the rows used whole, or whole but shortened, ascending; None where every row has a say, or where
    rows were mixed before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, cast

from narses.errors import ConfigError
from narses.registry import build
from narses.rules.base import (
    Aggregation,
    Context,
    Property,
    Rule,
    TrustedBatch,
    check,
    extra_rows,
    require,
    trusted_samples,
)
from narses.rules.brute import Brute
from narses.rules.bucketing import Bucketing
from narses.rules.bulyan import Bulyan
from narses.rules.caf import Caf
from narses.rules.centered_clipping import CenteredClipping
from narses.rules.clipping import Arc, Clipping
from narses.rules.dnc import Dnc
from narses.rules.fl_trust import FlTrust
from narses.rules.geometric_median import GeometricMedian
from narses.rules.krum import Krum, MultiKrum, krum_scores
from narses.rules.mean import Mean
from narses.rules.mean_around_median import MeanAroundMedian
from narses.rules.median import Median
from narses.rules.medoid import Medoid
from narses.rules.nnm import Nnm
from narses.rules.phocas import Phocas
from narses.rules.sign_guard import SignGuard
from narses.rules.trimmed_mean import TrimmedMean
from narses.rules.two_means import TwoMeans
from narses.rules.zeno import Zeno

__all__ = [
    "RULES",
    "Aggregation",
    "Arc",
    "Brute",
    "Bucketing",
    "Bulyan",
    "Caf",
    "CenteredClipping",
    "Clipping",
    "Context",
    "Dnc",
    "FlTrust",
    "GeometricMedian",
    "Krum",
    "Mean",
    "MeanAroundMedian",
    "Median",
    "Medoid",
    "MultiKrum",
    "Nnm",
    "Phocas",
    "Property",
    "Rule",
    "SignGuard",
    "TrimmedMean",
    "TrustedBatch",
    "TwoMeans",
    "Zeno",
    "check",
    "extra_rows",
    "krum_scores",
    "make",
    "require",
    "rule_table",
    "trusted_samples",
]

RULES: dict[str, type] = {
    "arc": Arc,
    "brute": Brute,
    "bucketing": Bucketing,
    "bulyan": Bulyan,
    "caf": Caf,
    "centered-clipping": CenteredClipping,
    "clipping": Clipping,
    "dnc": Dnc,
    "fl-trust": FlTrust,
    "geometric-median": GeometricMedian,
    "krum": Krum,
    "mean": Mean,
    "mean-around-median": MeanAroundMedian,
    "median": Median,
    "medoid": Medoid,
    "multi-krum": MultiKrum,
    "nnm": Nnm,
    "phocas": Phocas,
    "sign-guard": SignGuard,
    "trimmed-mean": TrimmedMean,
    "two-means": TwoMeans,
    "zeno": Zeno,
}

_DEEPEST_TABLE = 8


def make(table: str | Mapping[str, Any] | Rule, *, trusted: bool = True) -> Rule:
    """The rule that `table` describes: a name, a table with a name and fields (nested for a rule in a rule), or a Rule.

    trusted = False is for tables that came over the wire: no import strings anywhere in them, and no deep nesting.
    Raises ConfigError naming the entry and the wrong field.
    """
    if not trusted:
        _refuse_imports(table)
    rule = build("rule", RULES, table, trusted=trusted)
    if not callable(rule) or not callable(getattr(rule, "min_updates", None)):
        raise ConfigError(f"rule {table!r}: expected a name, a table with a name, or a Rule")
    return cast(Rule, rule)


def rule_table(rule: Rule) -> dict[str, Any]:
    """The canonical table of `rule`: its name and the fields that differ from their defaults, ready for JSON.

    make(rule_table(rule)) == rule. A class outside RULES is named by its import string.
    """
    cls = type(rule)
    name = next((name for name, entry in RULES.items() if entry is cls), f"{cls.__module__}:{cls.__qualname__}")
    values = {field.name: _plain(getattr(rule, field.name)) for field in fields(cast(Any, cls))}
    for key in list(values):
        rest = {other: value for other, value in values.items() if other != key}
        try:
            redundant = cls(**rest) == rule
        except (TypeError, ValueError):
            continue
        if redundant:
            values = rest
    return {"name": name, **values}


def _plain(value: Any) -> Any:
    if callable(getattr(value, "min_updates", None)):
        return rule_table(value)
    return "inf" if value == float("inf") else value


def _refuse_imports(table: Any) -> None:
    pending = [(table, 1)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, str) and ":" in value:
            raise ConfigError(f"rule {value!r}: import strings are accepted from one's own configuration only")
        if isinstance(value, Mapping | list | tuple):
            if depth > _DEEPEST_TABLE:
                raise ConfigError(f"rule table nested more than {_DEEPEST_TABLE} deep")
            pending += [(item, depth + 1) for item in (value.values() if isinstance(value, Mapping) else value)]
