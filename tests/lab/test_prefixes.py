"""Clean prefixes are played once, and a run that starts from one ends as if it had been played whole."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from narses.errors import ConfigError
from narses_lab.experiment.cells import Cell, cells_of
from narses_lab.experiment.config import ExperimentConfig
from narses_lab.experiment.folder import Folder
from narses_lab.experiment.local import LocalRun, Setup
from narses_lab.experiment.prefixes import shared
from narses_lab.experiment.run import Experiment, play
from narses_server.config import RunConfig

ALIE: dict[str, Any] = {"name": "alie", "z": 1.5, "start_round": 6}
IPM: dict[str, Any] = {"name": "ipm", "epsilon": 10.0, "start_round": 4, "where": "all", "members": "random-per-round"}


def config(**changes: Any) -> ExperimentConfig:
    tree: dict[str, Any] = {
        "name": "test",
        "transport": "local",
        "device": "cpu",
        "task": {"model": "softmax", "dataset": "digits", "batch": 16},
        "round": {"n": 7, "f": 2, "rounds": 10, "rule": "krum"},
        "optimizer": {"learning_rate": 0.5, "momentum": 0.9},
        "evaluate": {"every": 3},
    }
    return ExperimentConfig.of({**tree, **changes}, "test.toml")


def planned(folder: Path, **changes: Any) -> list[tuple[str, tuple[int, ...], tuple[str, int] | None]]:
    """(the run's attack or what it is, its milestones, where it starts), in the order of play."""
    cells = cells_of(config(**changes))
    names = {cell.name: cell.attack.table["name"] if cell.attack else "clean" for cell in cells}
    order = []
    for cell in shared(cells, Folder(folder)):
        start = cell.run.start
        source = None if start is None else (names.get(start.run, "prefix"), start.round)
        order.append((names.get(cell.name, "prefix"), cell.run.milestones, source))
    return order


def test_the_run_without_attack_is_everybodys_prefix(tmp_path: Path) -> None:
    assert planned(
        tmp_path, matrix={"attack": [ALIE, IPM, "none", {**ALIE, "start_round": 0, "label": "at once"}]}
    ) == [
        ("clean", (4, 6), None),
        ("alie", (), ("clean", 6)),
        ("ipm", (), ("clean", 4)),
        ("alie", (), None),
    ]


def test_without_one_a_prefix_is_played_for_two_or_more(tmp_path: Path) -> None:
    assert planned(tmp_path / "two", matrix={"attack": [ALIE, IPM]}) == [
        ("prefix", (4, 6), None),
        ("alie", (), ("prefix", 6)),
        ("ipm", (), ("prefix", 4)),
    ]
    assert planned(tmp_path / "one", attack=ALIE) == [("alie", (), None)]


def test_other_settings_are_no_prefix(tmp_path: Path) -> None:
    order = planned(tmp_path, seeds=2, matrix={"attack": ["none", ALIE], "round": {"rule": ["krum", "median"]}})
    assert [what for what, _, _ in order] == ["clean"] * 4 + ["alie"] * 4


def test_what_workers_have_gathered_cannot_be_taken_over(tmp_path: Path) -> None:
    task = {"model": "softmax", "dataset": "digits", "batch": 16, "local_momentum": 0.9}
    order = planned(tmp_path, task=task, matrix={"attack": ["none", ALIE]})
    assert order == [("clean", (), None), ("alie", (), None)]


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Key -> what its run left."""
    found = {}
    for path in folder.glob("runs/*/summary.json"):
        if path.parent.name.startswith("prefix-"):
            continue
        summary = json.loads(path.read_text())
        lines = [json.loads(line) for line in (path.parent / "rounds.jsonl").read_text().splitlines()]
        found[json.loads((path.parent / "run.json").read_text())["key"]] = {
            **{
                key: summary[key]
                for key in ("digest", "accuracy", "best_accuracy", "best_round", "final_loss", "rounds")
            },
            "selected": [line["selected"] for line in lines],
        }
    return found


def played(experiment: ExperimentConfig, folder: Path) -> int:
    whole = Experiment(experiment, "", (), cells_of(experiment))
    return play(whole, Folder(folder), Console(file=io.StringIO()), "narses run")


@pytest.mark.parametrize("attacks", [["none", ALIE, IPM], [ALIE, IPM]], ids=["with the clean run", "with a prefix"])
def test_it_ends_as_if_it_had_been_played_whole(tmp_path: Path, attacks: list[Any]) -> None:
    assert played(config(matrix={"attack": attacks}), tmp_path / "shared") == 3
    for number, attack in enumerate(attacks):  # alone, nothing is shared
        played(config(attack=attack), tmp_path / f"alone-{number}")
    whole: dict[str, Any] = {}
    for number in range(len(attacks)):
        whole |= results(tmp_path / f"alone-{number}")
    assert results(tmp_path / "shared") == whole
    assert len({result["digest"] for result in whole.values()}) == len(attacks)


def test_an_attack_added_later_is_played_from_what_is_there(tmp_path: Path) -> None:
    assert played(config(matrix={"attack": ["none", ALIE]}), tmp_path) == 2
    clean = next(path for path in (tmp_path / "runs").iterdir() if (path / "milestones").exists())
    later = {**ALIE, "z": 0.5}
    with_it = config(
        matrix={"attack": ["none", ALIE, {**later, "label": "weaker"}, {**later, "label": "sooner", "start_round": 5}]}
    )
    todo = shared(Folder(tmp_path).known(cells_of(with_it)), Folder(tmp_path))
    starts = [None if cell.run.start is None else (cell.run.start.run, cell.run.start.round) for cell in todo]
    assert starts == [(clean.name, 6), None], (
        "there is no milestone after 5 rounds, and a finished run is not asked for one"
    )
    assert played(with_it, tmp_path) == 2


def test_a_run_under_another_name_is_found_by_its_key(tmp_path: Path) -> None:
    played(config(matrix={"round": {"rule": ["krum", "median"]}}), tmp_path)
    more = config(seeds=2, matrix={"attack": ["none"], "round": {"f": [2], "rule": ["median", "krum", "mean"]}})
    cells = Folder(tmp_path).known(cells_of(more))
    assert sorted(cell.labels["round.rule"] for cell in cells if Folder(tmp_path).done(cell)) == ["krum", "median"]
    assert played(more, tmp_path) == 4


def _only(cell: Cell, folder: Path, **changes: Any) -> Any:
    run = RunConfig.of({**cell.run.model_dump(), **changes})
    return asyncio.run(LocalRun(Cell(run, None, cell.key, {}), Setup(folder)).play())


def test_a_start_that_is_not_there_or_of_other_settings(tmp_path: Path) -> None:
    (cell,) = cells_of(config())
    with pytest.raises(ConfigError, match=r"start names the state of run 'nobody' after 4 rounds, which is not in"):
        _only(cell, tmp_path, start={"run": "nobody", "round": 4})
    _only(cell, tmp_path, name="source", milestones=(4,))
    with pytest.raises(ConfigError, match=r"after 5 rounds, which is not in .*milestones = \[5\]"):
        _only(cell, tmp_path, name="later", start={"run": "source", "round": 5})
    (other,) = cells_of(config(optimizer={"learning_rate": 0.4, "momentum": 0.9}))
    with pytest.raises(ConfigError, match="belongs to another configuration"):
        _only(other, tmp_path, name="other", start={"run": "source", "round": 4})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"milestones": (11,)}, r"milestones = \[11\]: the run has 10 rounds"),
        ({"start": {"run": "x", "round": 10}}, r"start\.round = 10: nothing is left to play of 10 rounds"),
    ],
)
def test_outside_the_run(changes: dict[str, Any], why: str) -> None:
    (cell,) = cells_of(config())
    with pytest.raises(ConfigError, match=why):
        RunConfig.of({**cell.run.model_dump(), **changes})
