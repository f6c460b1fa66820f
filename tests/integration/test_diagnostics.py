"""[diagnostics] on a real server: in rounds.jsonl and the metrics, and without any effect on what is learnt."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narses.errors import ConfigError
from tests.cluster import cluster, experiment, undisturbed

SETTINGS: dict[str, Any] = {"n": 7, "f": 2, "rule": "krum", "rounds": 6}
TASK: dict[str, Any] = {"model": "softmax", "dataset": "digits", "batch": 16, "chunk_bytes": 1024}


async def _lines(folder: Path, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any], Any]:
    async with cluster(output=str(folder), **{**SETTINGS, **changes}) as c:
        summary = await c.summary()
        metrics = c.server.surroundings.metrics.registry
    lines = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]
    return lines, summary, metrics


@pytest.mark.parametrize("mode", ["exact", "sampled"])
async def test_they_are_in_the_lines_and_the_metrics_and_change_nothing(tmp_path: Path, mode: str) -> None:
    lines, summary, metrics = await _lines(tmp_path, diagnostics={"mode": mode, "every": 2, "byzantine": [0, 3]})
    assert summary["digest"] == await undisturbed(**SETTINGS)
    assert ["diagnostics" in line for line in lines] == [True, False] * 3
    for line in lines[::2]:
        found = line["diagnostics"]
        (winner,) = line["selected"]
        assert found["distances"][str(winner)] == 0.0, "Krum's aggregate is an update"
        assert found["cosines"][str(winner)] == pytest.approx(1.0, abs=1e-6)
        assert sorted(map(int, found["norms"])) == list(range(7))
        assert (found["estimate"], found["sampled"]) == (False, None), "650 columns need no sample"
        assert found["norm"] == pytest.approx(line["aggregate_norm"], rel=1e-5)
        assert found["bound"] == pytest.approx(1 / math.sqrt(2 * (5 + (2 * 3 + 4 * 4) / 1)), rel=1e-5)
    last = lines[4]["diagnostics"]
    ratio = metrics.get_sample_value("narses_server_worker_distance_ratio", {"worker": "5"})
    assert ratio == pytest.approx(last["distances"]["5"] / float(np.median(list(last["distances"].values()))), rel=1e-4)
    inner = metrics.get_sample_value("narses_server_resilience_inner_product_ratio", {"reference": "honest_oracle"})
    assert inner == pytest.approx(last["inner_ratio"], rel=1e-4)


async def test_without_known_liars_the_reference_is_an_estimate(tmp_path: Path) -> None:
    lines, _, metrics = await _lines(tmp_path, diagnostics={"mode": "exact"}, rule="median")
    assert all(line["diagnostics"]["estimate"] for line in lines)
    assert metrics.get_sample_value("narses_server_resilience_angle_radians", {"reference": "estimate"}) > 0


async def test_updates_that_are_parameters_are_measured_from_the_rounds(tmp_path: Path) -> None:
    rate = {"learning_rate": 0.2}
    gradients, _, _ = await _lines(tmp_path / "g", rule="median", diagnostics={"mode": "exact"}, optimizer=rate)
    parameters, _, _ = await _lines(
        tmp_path / "p",
        rule="median",
        diagnostics={"mode": "exact"},
        optimizer=rate,
        task={**TASK, "update": "parameters"},
    )
    for one, two in zip(gradients, parameters, strict=True):
        first, second = one["diagnostics"], two["diagnostics"]
        assert second["norm"] == pytest.approx(0.2 * first["norm"], rel=1e-3)
        assert second["inner_ratio"] == pytest.approx(first["inner_ratio"], rel=1e-2)
        for worker, cosine in first["cosines"].items():
            assert second["cosines"][worker] == pytest.approx(cosine, abs=1e-3)


async def test_absent_workers_have_none(tmp_path: Path) -> None:
    settings = {
        "round_": {"quorum": 5, "deadline": 0.5, "absent": "byzantine"},
        "start_timeout": 0.2,
        "f": 2,
        "rounds": 1,
    }
    lines, _, _ = await _lines(
        tmp_path, rule="median", daemons=[[0, 1, 2, 4, 6]], diagnostics={"byzantine": [0]}, **settings
    )
    assert sorted(map(int, lines[0]["diagnostics"]["distances"])) == [0, 1, 2, 4, 6]


def test_known_liars_are_workers_and_not_all_of_them() -> None:
    for wrong in ([7], list(range(7))):
        with pytest.raises(ConfigError, match=r"diagnostics\.byzantine = .*: expected some of the workers 0 to 6"):
            experiment(**SETTINGS, diagnostics={"byzantine": wrong})
