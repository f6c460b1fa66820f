"""A server that is killed at any instant goes on where its disk says, and ends with the same parameters.

What a kill leaves is what the disk held at that instant: the output folder is copied while the run goes on, and a fresh server
is started on each copy.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from pydantic.dataclasses import dataclass

from narses import models
from narses.combine import Mean
from narses.config import STRICT
from narses.errors import ConfigError
from narses.observe.metrics import Metrics
from narses.rules import Aggregation, Context
from narses.updates import Updates
from narses_server.config import CheckpointConfig
from narses_server.state import Extra, State
from narses_server.watch import Watch
from tests.cluster import cluster, experiment, undisturbed

SETTINGS: dict[str, Any] = {"n": 4, "f": 1, "rule": "median", "rounds": 40, "evaluate": 10}
MOMENTUM: dict[str, Any] = {"optimizer": {"learning_rate": 0.1, "momentum": 0.9, "fading": 100.0}}


def _copy(folder: Path, to: Path) -> Path:
    """As a kill leaves it: files that are renamed or pruned meanwhile may be missing."""

    def copy(source: str, target: str) -> None:
        try:
            shutil.copyfile(source, target)
        except FileNotFoundError:
            return

    shutil.copytree(folder, to, copy_function=copy)
    return to


@pytest.mark.parametrize("every", [1, 7])
async def test_every_copy_of_the_disk_ends_with_the_same_digest(tmp_path: Path, every: int) -> None:
    settings = {**SETTINGS, **MOMENTUM}
    expected = await undisturbed(**settings)
    copies = []
    async with cluster(output=str(tmp_path / "first"), checkpoint={"every": every}, **settings) as c:
        for round_ in (1, 2, 13, 14, 39):
            await c.until_round(round_)
            copies.append((round_, _copy(tmp_path / "first", tmp_path / f"copy-{round_}")))
        assert (await c.summary())["digest"] == expected

    for round_, folder in copies:
        async with cluster(output=str(folder), checkpoint={"every": every}, **settings) as c:
            summary = await c.summary()
            played = c.metric("narses_server_rounds_total", outcome="completed")
        assert summary["digest"] == expected, f"killed in round {round_}"
        assert played <= 40 - round_ // every * every, "no durable round is played again"
        lines = [json.loads(line) for line in (folder / "run" / "rounds.jsonl").read_text().splitlines()]
        assert [line["round"] for line in lines][-1] == 39
        assert len({line["round"] for line in lines}) == len(lines), "no round is there twice"


async def test_a_finished_run_is_not_played_again(tmp_path: Path) -> None:
    folder = str(tmp_path)
    async with cluster(output=folder, checkpoint={}, **SETTINGS) as c:
        first = await c.summary()

    async with cluster(output=folder, checkpoint={}, daemons=[], **SETTINGS) as c:
        second = await c.summary()

    assert second["digest"] == first["digest"]
    assert second["best_accuracy"] == first["best_accuracy"]
    assert second["accuracy"] == first["accuracy"]


async def test_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    async with cluster(output=str(tmp_path), checkpoint={}, **SETTINGS) as c:
        await c.summary()

    with pytest.raises(ConfigError, match=r"checkpoint-0000000040\.safetensors belongs to another configuration"):
        async with cluster(output=str(tmp_path), checkpoint={}, daemons=[], **{**SETTINGS, "rule": "mean"}) as c:
            await c.summary()


@dataclass(frozen=True, config=STRICT)
class Remembering:
    """A rule of one's own that keeps a state from round to round."""

    def min_updates(self, f: int) -> int:
        return 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        return Aggregation(updates.per_coordinate(Mean()), state="what would be lost")


def test_a_rules_state_is_refused_rather_than_lost(tmp_path: Path) -> None:
    config = experiment(rule=f"{__name__}:Remembering", n=1, output=str(tmp_path), checkpoint={}).resolved[0]
    module = models.make("softmax").build((8, 8), 10, 1)
    state = State(config, module, Watch(Metrics("server")), output=tmp_path, checkpoint=CheckpointConfig())
    task = mock.Mock(rounds=9, digest="blake3", chunk_bytes=1024)

    with pytest.raises(ConfigError, match="keeps a state from round to round, which checkpoints of this version"):
        state.close(task, 0, np.zeros((1, 650), np.float32), (0,), 0, Extra({}, {}))
