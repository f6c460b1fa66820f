from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from narses.observe import catalogue
from narses.observe.catalogue import CATALOGUE, ROLES, Metric, markdown, of_role

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def test_the_page_is_made_from_the_catalogue() -> None:
    assert markdown() == DOCS.read_text(), "run: python -m narses.observe.catalogue > docs/metrics.md"


def test_the_command_prints_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(catalogue.__file__, run_name="__main__")

    assert capsys.readouterr().out == markdown()


def test_names_are_unique() -> None:
    names = [metric.name for metric in CATALOGUE]

    assert len(names) == len(set(names))


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_metric_follows_the_naming_rules(metric: Metric) -> None:
    assert re.fullmatch(r"(narses|grpc)(_[a-z0-9]+)+", metric.name)
    assert (metric.kind == "counter") == metric.name.endswith("_total")
    assert (metric.kind == "info") == metric.name.endswith("_info")
    if metric.kind == "histogram":
        assert metric.name.endswith("_seconds")
    if "timestamp" in metric.name:
        assert metric.name.endswith("_timestamp_seconds")
    assert metric.roles
    assert set(metric.roles) <= set(ROLES)
    assert re.fullmatch(r"[A-Zf1].+\.", metric.help)
    assert "|" not in metric.help
    assert "\n" not in metric.help


@pytest.mark.parametrize("metric", CATALOGUE, ids=lambda metric: metric.name)
def test_only_labels_from_our_own_tables_are_open(metric: Metric) -> None:
    for label, values in metric.labels.items():
        if values is None:
            assert metric.kind == "info" or label in {"worker", "rule", "attack"}
        else:
            assert len(values) == len(set(values)) > 0


def test_roles_see_their_own_metrics_only() -> None:
    assert all(not metric.name.startswith("narses_server_") for metric in of_role("worker"))
    assert {"narses_build_info", "narses_server_round"} <= {metric.name for metric in of_role("server")}
    # the adversary daemon runs the worker's client and trainer
    assert {"narses_worker_round", "narses_adversary_active"} <= {metric.name for metric in of_role("adversary")}
