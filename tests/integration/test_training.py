"""Training over gRPC: it learns, and the bits of the result depend on the task alone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from narses.errors import RefusedError
from narses.rpc.v1 import parameter_server_pb2 as pb
from tests.cluster import cluster, undisturbed

TWELVE: dict[str, Any] = {
    "n": 12,
    "f": 2,
    "rule": "krum",
    "rounds": 60,
    "batch": 32,
    "model": {"name": "mlp", "hidden": 32},
}
FOUR: dict[str, Any] = {"n": 4, "rounds": 12}
COHORTS = {
    "1x12": [list(range(12))],
    "3x4": [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
    "12x1": [[worker] for worker in range(12)],
    "shuffled": [[11, 0, 5], [1, 10, 2, 9], [3, 8, 4, 7, 6]],
}


@pytest.mark.parametrize("cohorts", COHORTS)
async def test_it_learns_and_cohorts_do_not_matter(cohorts: str) -> None:
    async with cluster(**TWELVE, evaluate=20, daemons=COHORTS[cohorts]) as c:
        summary = await c.summary()
        assert (summary["outcome"], summary["rounds"]) == ("completed", 60)
        assert summary["final_accuracy"] > 0.8
        assert [after for after, _ in summary["accuracy"]] == [20, 40, 60]
        assert summary["best_accuracy"] == max(accuracy for _, accuracy in summary["accuracy"])
        assert c.counted() == {"accepted": 12 * 60}
        assert all([await member.ended() is None for member in c.daemons]), "NO_MORE_RUNS ends daemons"
    assert summary["digest"] == await undisturbed(**TWELVE)


async def test_another_seed_gives_another_digest() -> None:
    digests = {await undisturbed(**FOUR, seed=seed) for seed in (1, 2, 3)}
    assert len(digests) == 3


async def test_chunks_digests_and_threads_do_not_matter() -> None:
    """Large chunks pass through executor threads on both sides; the digest algorithm only names the bytes."""
    large: dict[str, Any] = {**FOUR, "rounds": 3, "model": {"name": "mlp", "hidden": 512}}
    expected = await undisturbed(**large)
    assert await undisturbed(**large, chunk_bytes=100_000) == expected
    assert await undisturbed(**large, chunk_bytes=4 << 20) == expected
    sha256 = [{"name": "sha256", "task": {"digest": "sha256"}}]
    async with cluster(**large, runs=sha256) as c:
        first = (await c.summary())["digest"]
    assert first != expected
    assert first == await undisturbed(**large, chunk_bytes=65_537, runs=sha256)


async def test_run_after_run_with_the_same_daemons(tmp_path: Path) -> None:
    """Other rules, models, seeds and rosters; a run is the same whether others came before it or not."""
    runs = [
        {"name": "mean"},
        {"name": "median", "round": {"rule": "median", "f": 1}},
        {"name": "deep/mlp", "task": {"model": {"name": "mlp", "hidden": 8}}, "round": {"rounds": 3}},
        {"name": "seed", "task": {"seed": 2}},
        {"name": "again"},
    ]
    async with cluster(**FOUR, runs=runs, evaluate=6, output=str(tmp_path), daemons=[[0, 1], [2, 3]]) as c:
        summaries = {summary["run"]: summary for summary in await c.summaries()}
        assert list(summaries) == [run["name"] for run in runs]
        assert {summary["outcome"] for summary in summaries.values()} == {"completed"}
        assert c.metric("narses_server_runs_total", outcome="completed") == 5
        assert [await member.ended() for member in c.daemons] == [None, None]
    digests = {name: summary["digest"] for name, summary in summaries.items()}
    assert digests["mean"] == digests["again"] == await undisturbed(**FOUR)
    assert digests["seed"] == await undisturbed(**FOUR, seed=2)
    assert len(set(digests.values())) == 4
    for name, summary in summaries.items():
        folder = tmp_path / name
        assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        assert [line["round"] for line in lines] == list(range(summary["rounds"]))
        assert all(line["participants"] == 4 and line["refused"] == {} for line in lines)
        assert sum(tensor.size for tensor in load_file(folder / "final.safetensors").values()) > 0
        assert {path.name for path in folder.iterdir() if path.is_file()} == {
            *("summary.json", "rounds.jsonl", "final.safetensors", "best.safetensors")
        }


async def test_a_roster_that_shrinks_refuses_the_daemon_that_has_no_place() -> None:
    runs = [{"name": "four"}, {"name": "two", "round": {"n": 2}}]
    async with cluster(**FOUR, runs=runs, daemons=[[0, 1], [2, 3]]) as c:
        assert [summary["outcome"] for summary in await c.summaries()] == ["completed", "completed"]
        assert await c.daemons[0].ended() is None
        error = await c.daemons[1].ended()
        assert isinstance(error, RefusedError)
        assert error.reason == "UNKNOWN_WORKER"
        assert "worker 2 is not in this run's roster 0..1" in str(error)


async def test_a_client_that_comes_before_the_run_waits_for_it() -> None:
    """Its stream stays open; the task comes when there is one."""
    async with cluster(**FOUR, daemons=[[0, 1, 2]]) as c:
        raw = await c.raw_session([3])
        assert raw.task.run_name == "run"
        assert (raw.task.n, raw.task.rounds, raw.task.seed) == (4, 12, 1)
        pulled = await raw.pull()
        assert (pulled.header.n, pulled.header.f, pulled.header.rule) == (4, 0, '{"name":"mean"}')
        assert 0 < pulled.header.closes_in_ms <= 60_000
        assert not pulled.header.HasField("durable_round")
        await raw.play()
        assert (await raw.notice()).kind == pb.NOTICE_KIND_NO_MORE_RUNS
        assert (await c.summary())["digest"] == await undisturbed(**FOUR)


async def test_a_pull_waits_for_its_round() -> None:
    async with cluster(**FOUR, daemons=[[0, 1, 2]]) as c:
        raw = await c.raw_session([3])
        first = await raw.pull()
        waiting = asyncio.create_task(raw.pull(after=0))
        again = await raw.pull()
        assert again.header.round == first.header.round == 0
        assert (again.parameters_D == first.parameters_D).all()
        assert not waiting.done()
        await raw.send(raw.update(3, first))
        assert (await waiting).header.round == 1
        await raw.play(after=0)
        await c.summary()


async def test_a_long_poll_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narses_server.service.POLL_SECONDS", 0.05)
    async with cluster(**FOUR, daemons=[[0, 1, 2]]) as c:
        raw = await c.raw_session([3])
        pulled = await raw.pull(after=0)
        assert pulled.header.not_modified
        assert (pulled.header.round, pulled.header.byte_length) == (0, 0)
        assert c.metric("narses_server_pulls_total", outcome="not_modified") >= 1
        await raw.play()
        assert (await c.summary())["digest"] == await undisturbed(**FOUR)


async def test_momentum_l2_and_fading_reach_the_server() -> None:
    runs = [
        {"name": "plain"},
        {"name": "momentum", "optimizer": {"momentum": 0.9}},
        {"name": "l2", "optimizer": {"l2": 0.1}},
        {"name": "fading", "optimizer": {"fading": 5.0}},
        {"name": "iid", "task": {"partition": "iid"}},
        {"name": "batch", "task": {"batch": 8}},
    ]
    async with cluster(**{**FOUR, "rounds": 3}, runs=runs) as c:
        digests = [summary["digest"] for summary in await c.summaries()]
        assert len(set(digests)) == len(runs)
        assert c.metric("narses_server_learning_rate") == 0.5


async def test_training_that_diverges_says_so() -> None:
    """The parameters that were finite last are the result: digest, accuracy and file are all theirs."""
    settings: dict[str, Any] = {**FOUR, "learning_rate": 1e38, "model": {"name": "mlp", "hidden": 4}}
    async with cluster(**settings, evaluate=50) as c:
        summary = await c.summary()
        assert summary["outcome"] == "diverged"
        assert summary["rounds"] < 12
        assert summary["final_loss"] is None or summary["final_loss"] >= 0
        assert c.metric("narses_server_runs_total", outcome="failed") == 1
        assert await c.daemons[0].ended() is None
