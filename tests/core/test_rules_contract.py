"""The contract of narses.rules, for every registry entry and its notable variants: listing a rule here tests it."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

import narses
from narses.errors import ConfigError, InputError
from narses.rules import RULES, Aggregation, Context, Property, Rule, check, make, rule_table, trusted_samples
from narses.updates import Updates
from tests.oracles import rules as oracle
from tests.oracles import trust


@dataclass(frozen=True)
class Case:
    """One rule as the battery runs it. exact: whole numbers leave its decisions free of rounding, so ties can be compared."""

    table: dict[str, Any]
    exact: bool = True
    rule: Rule = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rule", make(self.table))

    def __str__(self) -> str:
        return ",".join([self.table["name"], *(f"{k}={v}" for k, v in self.table.items() if k != "name")])

    def oracle(self, x_ND: Tensor, f: int) -> oracle.Result:
        return oracle.aggregate(self.table, x_ND.double().numpy(), f)


VARIANTS: dict[str, list[dict[str, Any]]] = {
    "arc": [{}, {"rule": {"name": "krum"}}],
    "bucketing": [{}, {"size": 3, "seed": 5}, {"rule": {"name": "median"}}],
    "brute": [{}, {"p": 1.0}, {"p": "inf"}],
    "bulyan": [
        {},
        {"theta": "n-2f-2", "middle": "upper"},
        {"keep": "n-4f-1", "inner": {"name": "krum", "neighbours": "n-f", "power": 1}},
        {"middle": "midpoint"},
        {"p": "inf"},
        {"theta": "n-2f-2", "keep": "n-4f-1"},
        {"theta": "n-2f-2", "middle": "upper", "inner": {"name": "multi-krum"}},
        {"p": 1.0, "inner": {"name": "medoid"}},
        {"inner": {"name": "brute"}},
        {"inner": {"name": "geometric-median"}},
        {"inner": {"name": "median"}},
    ],
    "caf": [{}],
    "centered-clipping": [{}, {"radius": 0.5, "iterations": 3}],
    "clipping": [{}, {"radius": 0.5, "rule": {"name": "krum"}}],
    "dnc": [{}, {"iterations": 3, "subsample": 4, "c": 0.5, "seed": 3}],
    "fl-trust": [{}],
    "geometric-median": [{}],
    "krum": [{}, {"p": 1.0}, {"p": "inf"}, {"p": 3.0}, {"neighbours": "n-f", "power": 1}, {"neighbours": "n-f-1"}],
    "mean": [{}],
    "mean-around-median": [{}, {"keep": "n-2f"}, {"keep": "n-f-1"}],
    "median": [{}],
    "medoid": [{}, {"p": 1.0}, {"p": "inf"}],
    "multi-krum": [{}, {"m": 2}, {"m": 1, "p": 1.0}, {"neighbours": "n-f-1", "power": 1}],
    "nnm": [{}, {"rule": {"name": "krum"}}, {"rule": {"name": "arc", "rule": {"name": "median"}}}],
    "phocas": [{}],
    "sign-guard": [{}, {"fraction": 1.0, "lower": 0.5, "upper": 1.5, "quantile": 0.3}],
    "trimmed-mean": [{}],
    "two-means": [{"threshold": 1.0}, {"threshold": 0.0}, {"threshold": 1.7, "relative": True}],
    "zeno": [{}, {"penalty": "mean", "rho_ratio": 10.0}],
}
# Sums of roots of whole numbers are rounded, so equal sums of different terms need not be equal in two orders of summation.
ROUNDED = [{"p": 3.0}, {"power": 1}, {"neighbours": "n-f", "power": 1}, {"neighbours": "n-f-1", "power": 1}]
# What these decide is not exact for whole numbers: eigenvectors, losses, distances between means or shortened rows.
NEVER_EXACT = [
    *({"name": name} for name in ("caf", "dnc", "geometric-median", "zeno")),
    *({"name": name, "rule": {"name": "krum"}} for name in ("arc", "nnm")),
    {"name": "clipping", "radius": 0.5, "rule": {"name": "krum"}},
]
# Their weights follow from lengths and distances, which for float32 rows are summed in part in float32, or their rows are
# rounded before the second rule: the error is relative to the result's largest coordinate, not to each.
WEIGHING = {
    *("arc", "bucketing", "caf", "centered-clipping", "clipping", "fl-trust", "geometric-median", "nnm", "sign-guard"),
}


def is_exact(name: str, fields: dict[str, Any]) -> bool:
    if (name, fields) == ("medoid", {}):
        return False  # it sums roots
    if {"name": name} in NEVER_EXACT or {"name": name, **fields} in NEVER_EXACT:
        return False
    return fields not in ROUNDED and fields.get("inner", {}) == {}


CASES = [
    Case({"name": name, **fields}, exact=is_exact(name, fields))
    for name, variants in VARIANTS.items()
    for fields in variants
]
FLOATS = [torch.float32, torch.float64]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float64"])


def normal(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def required(name: str) -> set[str]:
    """The fields that a rule has no default for."""
    return {f.name for f in dataclasses.fields(cast(Any, RULES[name])) if f.default is dataclasses.MISSING}


def sizes(case: Case) -> list[tuple[int, int]]:
    """(n, f): the fewest updates and a few more, without, with one and with three Byzantine ones."""
    return [(max(case.rule.min_updates(f), f) + more, f) for f in (0, 1, 3) for more in (0, 1, 4)]


def sizes_away_from_ties(case: Case) -> list[tuple[int, int]]:
    """f > 0: to keep one of two values is to break the tie between both neighbours of their midpoint."""
    return [(n, f) for n, f in sizes(case) if f]


def context(case: Case, x_ND: Tensor) -> Context | None:
    """None, except for rules that cannot be called without trusted data."""
    return trust.context(x_ND.shape[1]) if trusted_samples(case.rule) else None


def run(case: Case, x_ND: Tensor, f: int) -> Aggregation:
    return case.rule(Updates.of(x_ND), f, context(case, x_ND))


def gives_back(case: Case, row_D: Tensor) -> bool:
    """Whether MUST 8 binds the rule for this row. It cannot bind three rules that set lengths: tested in their own files."""
    match case.table["name"]:
        case "fl-trust":
            return False  # every update gets the length of the server's own gradient
        case "centered-clipping" | "clipping":
            # The first step is from zero, and by the radius at most; no update is longer than the radius.
            return float(row_D.double().norm()) <= case.rule.radius  # type: ignore[attr-defined]
    return True


def claiming(claimed: Property) -> Any:
    return pytest.mark.parametrize("case", [case for case in CASES if claimed in case.rule.properties], ids=str)


def test_every_registry_entry_is_tested() -> None:
    assert VARIANTS.keys() == RULES.keys() == oracle.ORACLES.keys()
    for name, variants in VARIANTS.items():
        assert any(variant.keys() == required(name) for variant in variants), name


def test_the_documented_table_of_claims_is_the_rules_own() -> None:
    page = Path(__file__).parents[2] / "docs" / "adding-a-rule.md"
    rows = [line.strip("|").split("|") for line in page.read_text().splitlines() if line.startswith("| `")]
    order = [
        {Property.PERMUTATION},
        {Property.TRANSLATION},
        {Property.SCALING},
        {Property.INPUT_RANGE},
        {Property.HONEST_RANGE},
        {Property.HONEST_WIDTH},
        {Property.IS_INPUT},
    ]

    documented = {
        row[0].strip(" `"): set().union(*(claims for claims, cell in zip(order, row[1:], strict=True) if cell.strip()))
        for row in rows
    }

    assert documented == {name: set(cls.properties) for name, cls in RULES.items()}  # type: ignore[attr-defined]


@every_case
def test_is_a_documented_frozen_value_with_known_claims(case: Case) -> None:
    cls = type(case.rule)
    assert hash(case.rule) == hash(make(case.table))
    assert case.rule == make(case.table)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert "n >= " in inspect.getdoc(cls)  # type: ignore[operator]
    assert all(isinstance(claim, Property) for claim in cls.properties)  # type: ignore[attr-defined]
    assert "f" not in case.table


@every_case
def test_table_round_trip(case: Case) -> None:
    table = rule_table(case.rule)

    assert make(json.loads(json.dumps(table, allow_nan=False)), trusted=False) == case.rule
    assert rule_table(make(table)) == table
    least = {key: case.table[key] for key in ("name", *required(case.table["name"]))}
    assert rule_table(make(least)) == least


@every_case
def test_minimum_is_enforced_and_never_falls(case: Case) -> None:
    needs = [case.rule.min_updates(f) for f in range(9)]

    assert needs == sorted(needs)
    for f, n in enumerate(needs):
        if n >= f:
            check(case.rule, n, f)
            run(case, normal(n, 2), f)
        if n > 1:
            with pytest.raises(InputError, match=rf"f = {f}.*n = {n - 1}"):
                run(case, normal(n - 1, 2), f)
            with pytest.raises(ConfigError, match=rf"f = {f}.*n = {n - 1}"):
                check(case.rule, n - 1, f)


@every_case
@pytest.mark.parametrize("f", [-1, 1.0, True, None, "1", 100])
def test_senseless_f_is_refused(case: Case, f: Any) -> None:
    with pytest.raises(InputError, match="f = "):
        run(case, normal(40, 2), f)
    with pytest.raises(ConfigError, match="f = "):
        check(case.rule, 40, f)


@every_case
@every_dtype
def test_result_is_fresh_and_input_untouched(case: Case, dtype: torch.dtype) -> None:
    for n, f in sizes(case):
        x_ND = normal(n, 5, seed=n, dtype=dtype)
        before_ND = x_ND.clone()

        result = run(case, x_ND, f)
        again = run(case, x_ND, f)

        assert result.vector_D.shape == (5,)
        assert (result.vector_D.dtype, result.vector_D.device) == (x_ND.dtype, x_ND.device)
        assert torch.equal(result.vector_D, again.vector_D)
        pointers = [t.untyped_storage().data_ptr() for t in (x_ND, result.vector_D, again.vector_D)]
        assert len(set(pointers)) == 3
        result.vector_D.fill_(math.nan)
        assert torch.equal(x_ND, before_ND)
        if result.selected is not None:
            assert result.selected.tolist() == sorted(set(result.selected.tolist()))
            assert 0 <= int(result.selected[0]) <= int(result.selected[-1]) < n
        if result.scores is not None:
            assert result.scores.shape == (n,)


@every_case
@every_dtype
def test_agrees_with_the_paper_in_float64(case: Case, dtype: torch.dtype) -> None:
    for (n, f), scale in itertools.product(sizes(case), (1.0, 1e8, 1e15, 1e30, 1e-23)):
        x_ND = (normal(n, 6, seed=10 * n + f, dtype=torch.float64) * scale).to(dtype)

        result = run(case, x_ND, f)
        vector_D, selected, scores = case.oracle(x_ND, f)

        tolerance = 1e-7 if dtype == torch.float32 else 1e-13
        rounded = case.table["name"] in WEIGHING and dtype == torch.float32
        absolute = 1e-6 * np.abs(vector_D).max() if rounded else 1e-14 * scale
        if case.table["name"] == "geometric-median" and not rounded:
            absolute = 1e-8 * np.abs(vector_D).max()  # where its iteration ends
        np.testing.assert_allclose(result.vector_D.double().numpy(), vector_D, rtol=tolerance, atol=absolute)
        assert (None if result.selected is None else result.selected.tolist()) == selected
        if scores is not None and result.scores is not None:
            # A float32 distance is right to 1e-6 of itself (narses.kernels.distances), its square to 2e-6.
            np.testing.assert_allclose(result.scores.numpy(), scores, rtol=2e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case.exact], ids=str)
def test_ties_go_to_the_smallest_row(case: Case) -> None:
    """A few small whole numbers: equal rows, equal distances and equal scores everywhere."""
    for seed, (n, f) in itertools.product(range(15), sizes(case)):
        x_ND = torch.randint(-2, 3, (n, 3), generator=torch.Generator().manual_seed(seed)).float()

        result = run(case, x_ND, f)
        vector_D, selected, _ = case.oracle(x_ND, f)

        assert (None if result.selected is None else result.selected.tolist()) == selected
        np.testing.assert_allclose(result.vector_D.numpy(), vector_D, rtol=1e-6, atol=1e-12)


@every_case
@pytest.mark.parametrize("value", [0.0, 0.1, -3.0e38, 1e-45])
def test_identical_rows_give_that_row(case: Case, value: float) -> None:
    for n, f in sizes(case):
        result = run(case, torch.full((n, 3), value), f)

        if not gives_back(case, torch.full((3,), value)):
            assert bool(result.vector_D.isfinite().all())
            continue
        assert torch.equal(result.vector_D, torch.full((3,), value))
        if result.selected is not None and len(result.selected) == 1:
            assert int(result.selected[0]) == 0
        wide_D = run(case, torch.full((n, 3), value, dtype=torch.float64), f).vector_D
        torch.testing.assert_close(wide_D, torch.full((3,), value, dtype=torch.float64), rtol=4e-16, atol=0)


@every_case
@every_dtype
def test_any_finite_input_gives_finite_output(case: Case, dtype: torch.dtype) -> None:
    extremes = [0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 3.4e38, -3.4e38, 1e-45, 1e-23, -1e-38]
    if dtype == torch.float64:
        extremes += [1e200, -1.7e308, 1.7e308, 5e-324, 1e-200]
    values = torch.tensor(extremes, dtype=dtype)
    for seed, (n, f) in itertools.product(range(4), sizes(case)):
        generator = torch.Generator().manual_seed(seed)
        x_ND = values[torch.randint(len(values), (n, 8), generator=generator)]
        x_ND[: n // 2] = x_ND[n - 1]

        vector_D = run(case, x_ND, f).vector_D

        assert bool(vector_D.isfinite().all())
        if Property.INPUT_RANGE in case.rule.properties:
            assert bool(((x_ND.amin(dim=0) <= vector_D) & (vector_D <= x_ND.amax(dim=0))).all())


@every_case
def test_bits_do_not_depend_on_threads_or_on_where_the_rows_lie(case: Case) -> None:
    f, n = 3, case.rule.min_updates(3) + 3
    x_ND = normal(n, 3001)
    spread_nP = torch.full((2 * n, 3008), math.nan)
    spread_nP[::2, :3001] = x_ND
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(case, x_ND, f)
        torch.set_num_threads(4)
        four = run(case, x_ND, f)
    finally:
        torch.set_num_threads(threads)
    elsewhere = case.rule(Updates.of(spread_nP[:, :3001], rows=list(range(0, 2 * n, 2))), f, context(case, x_ND))

    for other in (four, elsewhere):
        assert torch.equal(one.vector_D, other.vector_D)
        assert (one.selected is None) == (other.selected is None)
        assert one.selected is None or torch.equal(one.selected, other.selected)  # type: ignore[arg-type]


@claiming(Property.PERMUTATION)
def test_permutation(case: Case) -> None:
    # f = 3: for f <= 2 Bulyan's last elections have one neighbour, where two nearest neighbours always tie.
    for more in (0, 1, 4):
        n = max(case.rule.min_updates(3), 3) + more
        x_ND = normal(n, 6, seed=n, dtype=torch.float64)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(more))

        straight, permuted = run(case, x_ND, 3), run(case, x_ND[order], 3)

        torch.testing.assert_close(permuted.vector_D, straight.vector_D, rtol=1e-13, atol=1e-13)
        if straight.selected is not None and permuted.selected is not None:
            assert set(order[permuted.selected].tolist()) == set(straight.selected.tolist())
        if straight.scores is not None and permuted.scores is not None:
            assert torch.equal(permuted.scores, straight.scores[order])


@claiming(Property.TRANSLATION)
def test_translation(case: Case) -> None:
    for n, f in sizes_away_from_ties(case):
        x_ND, c_D = normal(n, 6, seed=n, dtype=torch.float64), normal(1, 6, seed=99, dtype=torch.float64)[0]

        moved_D = run(case, x_ND + c_D, f).vector_D

        torch.testing.assert_close(moved_D, run(case, x_ND, f).vector_D + c_D, rtol=1e-12, atol=1e-12)


@claiming(Property.SCALING)
@pytest.mark.parametrize("scale", [2.0**-30, 0.1, 7.0, 2.0**80])
def test_positive_scaling(case: Case, scale: float) -> None:
    for n, f in sizes_away_from_ties(case):
        x_ND = normal(n, 6, seed=n, dtype=torch.float64)

        scaled_D = run(case, x_ND * scale, f).vector_D

        torch.testing.assert_close(scaled_D, run(case, x_ND, f).vector_D * scale, rtol=1e-12, atol=1e-14 * scale)


@claiming(Property.IS_INPUT)
def test_result_is_the_selected_input(case: Case) -> None:
    for n, f in sizes(case):
        x_ND = normal(n, 6, seed=n)
        x_ND[:, 0] = -0.0

        result = run(case, x_ND, f)

        assert result.selected is not None
        (row,) = result.selected.tolist()
        assert torch.equal(result.vector_D.view(torch.int32), x_ND[row].view(torch.int32))


def attacked(n: int, f: int, seed: int) -> tuple[Tensor, Tensor]:
    """n updates of which the f last are placed near, at and far beyond the honest ones; returns (all, honest)."""
    generator = torch.Generator().manual_seed(seed)
    honest_HD = torch.randint(-3, 4, (n - f, 4), generator=generator).float()
    reach = torch.tensor([1.0, 2.0, 5.0, 1e9])[torch.randint(4, (f, 4), generator=generator)]
    lies_FD = reach * torch.randint(-4, 5, (f, 4), generator=generator)
    if seed % 2:
        lies_FD = lies_FD[:1].expand(f, 4)  # colluding: the same vector from all
    return torch.cat([honest_HD, lies_FD]), honest_HD


@claiming(Property.HONEST_RANGE)
def test_stays_in_the_honest_range_whatever_f_send(case: Case) -> None:
    assert_near_honest_range(case, width=0)


@claiming(Property.HONEST_WIDTH)
def test_stays_within_one_honest_width_whatever_f_send(case: Case) -> None:
    assert_near_honest_range(case, width=1)


def assert_near_honest_range(case: Case, width: int) -> None:
    for seed, f, more in itertools.product(range(40), (1, 2, 3), (0, 1, 2)):
        x_ND, honest_HD = attacked(case.rule.min_updates(f) + more, f, seed)
        low_D, high_D = honest_HD.amin(dim=0), honest_HD.amax(dim=0)
        slack_D = width * (high_D - low_D)

        vector_D = run(case, x_ND, f).vector_D

        assert bool(((low_D - slack_D <= vector_D) & (vector_D <= high_D + slack_D)).all())


@every_case
def test_aggregate_takes_names_tables_rules_arrays_and_lists(case: Case) -> None:
    x_ND = normal(case.rule.min_updates(1) + 1, 3)
    expected_D = run(case, x_ND, 1).vector_D

    for rule, x in ((case.table, x_ND), (case.rule, x_ND.numpy()), (rule_table(case.rule), Updates.of(x_ND))):
        assert torch.equal(narses.aggregate(rule, x, 1, context(case, x_ND)).vector_D, expected_D)
    listed_D = narses.aggregate(case.table, x_ND.tolist(), 1, context(case, x_ND)).vector_D
    torch.testing.assert_close(listed_D, expected_D)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_case
def test_gpu_agrees_with_cpu(case: Case) -> None:
    for n, f in sizes(case):
        x_ND = normal(n, 70_001, seed=n)

        there, here = run(case, x_ND.cuda(), f), run(case, x_ND, f)

        assert there.vector_D.is_cuda
        absolute = 1e-6 * float(here.vector_D.abs().max()) if case.table["name"] in WEIGHING else 1e-12
        torch.testing.assert_close(there.vector_D.cpu(), here.vector_D, rtol=2e-7, atol=absolute)
        assert here.selected is None or torch.equal(there.selected, here.selected)  # type: ignore[arg-type]
