"""examples/own-model: a model and a data set from outside, over real gRPC, and what happens without permission."""

from __future__ import annotations

import sys
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file

from narses import datasets, models
from narses.config import read_toml
from narses.errors import ConfigError
from narses_adversary.config import AdversaryConfig
from narses_server.config import ServerConfig
from narses_worker.config import WorkerConfig
from tests.cluster import Cluster

EXAMPLE = Path(__file__).parents[2] / "examples" / "own-model"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.delitem(sys.modules, "own_model", raising=False)


@asynccontextmanager
async def _cluster(**changes: Any) -> AsyncIterator[Cluster]:
    """The example's server with everything small."""
    tree = read_toml(EXAMPLE / "server.toml") | {"listen": "127.0.0.1:0", "keep_large_blocks": False}
    tree["round"] |= {"rounds": 40}
    del tree["output"]
    with mock.patch("narses_server.app.FAREWELL_SECONDS", 0.5):
        cluster = Cluster(ServerConfig.of(tree | changes))
        await cluster.open()
        try:
            yield cluster
        finally:
            await cluster.close()


async def test_the_example_trains_and_its_model_can_be_used(tmp_path: Path) -> None:
    allow = read_toml(EXAMPLE / "worker.toml")["allow"]
    async with _cluster(output=str(tmp_path)) as c:
        await c.start(range(8), allow=allow)
        await c.start(range(8, 10), allow=allow)
        summary = await c.summary()
    assert (summary["outcome"], summary["rounds"]) == ("completed", 40)
    assert summary["best_accuracy"] > 0.8

    data = datasets.load("own_model:Spirals", None, trusted=True)
    module = models.make({"name": "own_model:SpiralNet", "hidden": 64}, trusted=True).build(data.shape, data.classes, 0)
    module.load_state_dict(load_file(tmp_path / "spirals" / "final.safetensors"))
    right = module.eval()(data.test_inputs).argmax(1) == data.test_labels
    assert right.double().mean().item() == pytest.approx(summary["final_accuracy"])


async def test_the_digest_does_not_depend_on_who_hosts_whom() -> None:
    """BatchNorm and dropout over real gRPC, in one daemon and in three."""
    allow = read_toml(EXAMPLE / "worker.toml")["allow"]
    digests = set()
    for cohorts in ([range(10)], [range(1), range(1, 7), range(7, 10)]):
        async with _cluster(round={"n": 10, "f": 2, "rule": "trimmed-mean", "rounds": 8}) as c:
            for workers in cohorts:
                await c.start(workers, allow=allow)
            digests.add((await c.summary())["digest"])
    assert len(digests) == 1


async def test_a_worker_without_permission_ends_with_the_line_that_is_missing() -> None:
    async with _cluster(drain_timeout=0.1) as c:
        worker = await c.start(range(10), allow=["own_model:SpiralNet"])
        error = await worker.ended()
    assert isinstance(error, ConfigError)
    assert str(error) == (
        "dataset 'own_model:Spirals': import strings are accepted from one's own configuration only; if that code is yours, "
        'let this program import it with the line allow = ["own_model:SpiralNet", "own_model:Spirals"] in its '
        "configuration file"
    )


@pytest.mark.parametrize(
    ("file", "config"),
    [("server.toml", ServerConfig), ("worker.toml", WorkerConfig), ("adversary.toml", AdversaryConfig)],
)
def test_the_files_are_valid(file: str, config: type[ServerConfig | WorkerConfig]) -> None:
    config.load(EXAMPLE / file)


def test_the_readme_shows_the_line_that_the_files_have() -> None:
    text = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    line = next(line.strip() for line in text.splitlines() if line.strip().startswith("allow ="))
    for file in ("worker.toml", "adversary.toml"):
        assert tomllib.loads(line)["allow"] == read_toml(EXAMPLE / file)["allow"]
