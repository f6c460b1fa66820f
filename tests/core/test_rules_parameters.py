"""Agg({P - eta g_i}) = P - eta Agg({g_i}): rules that move with their inputs aggregate parameters as they would gradients.

ALGORITHMS 1.12. The step turns the direction round, so a rule must not care about the sign; numbers of updates are odd, where
the median of the values, and the lower one inside Bulyan, are the same seen from both sides.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from narses import rules
from narses.rules import Property
from narses.updates import Updates

REQUIRED = {"two-means": {"threshold": 1.0}}  # fields without a default
TABLES: list[Any] = [
    *({"name": name, **REQUIRED[name]} if name in REQUIRED else name for name in rules.RULES),
    {"name": "krum", "p": 1.5},
    {"name": "mean-around-median", "keep": "n-2f"},
]
MOVING = [
    table
    for table in TABLES
    if {Property.TRANSLATION, Property.SCALING} <= getattr(rules.make(table), "properties", frozenset())
]


def test_every_rule_of_the_papers_is_here() -> None:
    assert {"mean", "median", "trimmed-mean", "mean-around-median", "krum", "multi-krum", "bulyan"} <= {
        table for table in MOVING if isinstance(table, str)
    }


@pytest.mark.parametrize("table", MOVING, ids=str)
@settings(deadline=None)
@given(
    seed=st.integers(0, 2**31), f=st.integers(0, 3), more=st.integers(0, 3), eta=st.sampled_from([1e-3, 0.1, 0.5, 2.0])
)
def test_the_aggregate_of_parameters_is_a_step_along_that_of_gradients(
    table: Any, seed: int, f: int, more: int, eta: float
) -> None:
    rule = rules.make(table)
    n = max(rule.min_updates(f), 2 * f + 1) + more
    n += n % 2 == 0
    draws = torch.Generator().manual_seed(seed)
    gradients_ND = torch.randn(n, 7, generator=draws, dtype=torch.float64)
    gradients_ND[: min(f, n)] *= 50
    start_D = torch.randn(7, generator=draws, dtype=torch.float64)
    of_gradients = rule(Updates.of(gradients_ND), f)
    of_parameters = rule(Updates.of(start_D - eta * gradients_ND), f)

    torch.testing.assert_close(of_parameters.vector_D, start_D - eta * of_gradients.vector_D, rtol=1e-9, atol=1e-9)
    if of_gradients.selected is not None:
        assert of_parameters.selected is not None
        assert of_parameters.selected.tolist() == of_gradients.selected.tolist()
