"""Workers that push parameters, and workers with momentum, through a real server: the same training, and it survives kills."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file
from torch import Tensor

from narses.combine import Mean
from narses.config import STRICT
from narses.rules import Aggregation, Context, Property
from narses.updates import Updates
from tests.cluster import Cluster, cluster, undisturbed
from tests.disk import as_a_kill_leaves_it

SETTINGS: dict[str, Any] = {"n": 7, "f": 1, "rounds": 12, "evaluate": 6}
TASK: dict[str, Any] = {"model": "softmax", "dataset": "digits", "batch": 16, "chunk_bytes": 1024}
CONSTANT: dict[str, Any] = {"learning_rate": 0.2}


async def _final(folder: Path, rule: Any, task: dict[str, Any], optimizer: dict[str, Any]) -> Tensor:
    """The last parameters of a run."""
    settings = {**SETTINGS, "rule": rule, "task": {**TASK, **task}, "optimizer": optimizer, "output": str(folder)}
    async with cluster(**settings) as c:
        assert (await c.summary())["outcome"] == "completed"
    tensors = load_file(folder / "run" / "final.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.mark.parametrize(
    "rule", ["mean", "median", "trimmed-mean", "mean-around-median", "krum", "multi-krum", "bulyan"]
)
async def test_one_step_of_parameters_is_one_gradient(tmp_path: Path, rule: str) -> None:
    gradients = await _final(tmp_path / "g", rule, {}, CONSTANT)
    parameters = await _final(tmp_path / "p", rule, {"update": "parameters"}, CONSTANT)
    assert (parameters - gradients).abs().max() < 2e-6
    assert gradients.abs().max() > 0.01


async def test_under_the_mean_momentum_may_be_the_servers_or_the_workers(tmp_path: Path) -> None:
    server = await _final(tmp_path / "s", "mean", {}, {**CONSTANT, "momentum": 0.9})
    for name, task in (
        ("gradients", {"local_momentum": 0.9}),
        ("parameters", {"update": "parameters", "local_momentum": 0.9}),
    ):
        worker = await _final(tmp_path / name, "mean", task, CONSTANT)
        assert (worker - server).abs().max() < 2e-5, name


@dataclass(frozen=True, config=STRICT)
class Halved:
    """Half the mean: no rule that moves with its inputs, so of parameters it must see the differences."""

    properties: ClassVar[frozenset[Property]] = frozenset()

    def min_updates(self, f: int) -> int:
        return 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        return Aggregation(updates.per_coordinate(Mean()).div_(2))


async def test_a_rule_that_does_not_move_gets_differences(tmp_path: Path) -> None:
    rule = f"{__name__}:Halved"
    halved = await _final(tmp_path / "h", rule, {"update": "parameters"}, CONSTANT)
    slower = await _final(tmp_path / "m", "mean", {"update": "parameters"}, {"learning_rate": 0.1})
    assert (halved - slower).abs().max() < 2e-6


KINDS: dict[str, dict[str, Any]] = {
    "steps": {"update": "parameters", "local_steps": 3},
    "pass": {"update": "parameters", "local_steps": "pass", "batch": 64},
    "shard": {"batch": "shard", "micro_batch": 100},
    "momentum": {"local_momentum": 0.9},
    "everything": {"update": "parameters", "local_steps": 2, "local_momentum": 0.9, "local_l2": 1e-3},
}


@pytest.mark.parametrize("kind", KINDS)
async def test_one_digest_whatever_the_cohorts(kind: str) -> None:
    settings = {**SETTINGS, "rule": "median", "task": {**TASK, **KINDS[kind]}}
    expected = await undisturbed(**settings)
    for daemons in ([[0, 1, 2], [3, 4], [5, 6]], [[i] for i in range(7)]):
        async with cluster(daemons=daemons, **settings) as c:
            summary = await c.summary()
        assert summary["digest"] == expected
    assert summary["final_accuracy"] > 0.5


async def _all_join(c: Cluster, state: Path) -> None:
    for index, workers in enumerate(([0, 1, 2], [3, 4, 5, 6])):
        await c.start(workers, state_dir=str(state / str(index)))


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("kind", ["momentum", "everything"])
async def test_momentum_follows_a_server_that_resumes(tmp_path: Path, kind: str, every: int) -> None:
    """Server and workers were killed together: on each copy of their disks fresh ones end with the same parameters."""
    settings = {**SETTINGS, "rule": "median", "task": {**TASK, **KINDS[kind]}}
    expected = await undisturbed(**settings)
    copies = []
    settings["checkpoint"] = {"every": every}
    async with cluster(daemons=[], output=str(tmp_path / "now" / "out"), **settings) as c:
        await _all_join(c, tmp_path / "now" / "state")
        for round_ in (1, 5, 6, 11):
            await c.until_round(round_)
            copies.append(tmp_path / f"copy-{round_}")
            # In this order, as a kill leaves it: momentum is on disk before the server makes the round durable.
            as_a_kill_leaves_it(tmp_path / "now" / "out", copies[-1] / "out")
            as_a_kill_leaves_it(tmp_path / "now" / "state", copies[-1] / "state")
        assert (await c.summary())["digest"] == expected

    for folder in copies:
        async with cluster(daemons=[], output=str(folder / "out"), **settings) as c:
            await _all_join(c, folder / "state")
            assert (await c.summary())["digest"] == expected, folder.name


async def test_a_worker_killed_alone_takes_its_momentum_up_again(tmp_path: Path) -> None:
    settings = {**SETTINGS, "rule": "median", "task": {**TASK, **KINDS["everything"]}}
    expected = await undisturbed(**settings)
    async with cluster(daemons=[[0, 1, 2]], **settings) as c:
        member = await c.start([3, 4, 5, 6], state_dir=str(tmp_path))
        for round_ in (3, 7):
            await c.until_round(round_)
            await c.kill(member)
            await c.until_joined(3)
            member = await c.start([3, 4, 5, 6], state_dir=str(tmp_path))
        assert (await c.summary())["digest"] == expected
