"""One run from its first round to its last. The loop thread owns all of this; tensor work leaves it through `executor`."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import structlog

from narses import datasets, flat
from narses.diagnostics import as_line
from narses.rules import extra_rows
from narses.task import Task
from narses_server.config import CheckpointConfig, RunConfig
from narses_server.matrix import UpdateMatrix
from narses_server.model import initial_model
from narses_server.published import Published
from narses_server.refusals import RefusalLog
from narses_server.round import Decision, Policy, Round, Step, Verdict
from narses_server.scoreboard import Scoreboard
from narses_server.session import Sessions
from narses_server.state import Closed, State
from narses_server.watch import Watch

log = structlog.get_logger("narses.server")


class Run:
    """One run: its task, sessions, matrix and open round.

    Built in the executor, because it loads data and allocates; played on the loop.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        data_dir: Path | None,
        device: str,
        output: Path | None,
        watch: Watch,
        limit: Callable[[int, int, int], int],
        checkpoint: CheckpointConfig | None = None,
    ) -> None:
        """limit(n, D, the rule's extra vectors) -> the memory budget in bytes; raises ConfigError before anything is allocated.

        With checkpoint, the run goes on where an earlier process got to.
        """
        self.config = config
        self._watch = watch
        dataset = datasets.load(datasets.make(config.task.dataset, trusted=True), data_dir)
        module = initial_model(config.task, dataset)
        self.state = state = State(config, module, watch, output=output, checkpoint=checkpoint, dataset=dataset)
        self._first_round = 0 if state.resumed is None else state.resumed.rounds
        self.task = Task(
            run_id=state.run_id,
            run_name=config.name,
            n=config.round.n,
            rounds=config.round.rounds,
            model=config.task.model,
            dataset=config.task.dataset,
            partition=config.task.partition,
            batch=config.task.batch,
            micro_batch=config.task.micro_batch,
            update=config.task.update,
            local_steps=config.task.local_steps,
            local_momentum=config.task.local_momentum,
            local_l2=config.task.local_l2,
            seed=config.task.seed,
            learning_rate=config.optimizer.schedule,
            dimension=len(state.parameters_D),
            layout=flat.layout_hash(module),
            chunk_bytes=config.task.chunk_bytes,
            digest=config.task.digest,
        )
        self.memory_budget = limit(self.task.n, self.task.dimension, extra_rows(state.rule, self.task.n))
        self.matrix = UpdateMatrix(self.task.n, self.task.dimension)
        self.sessions = Sessions(self.task.n)
        self.policy = Policy(
            n=config.round.n,
            f=config.round.f,
            min_updates=state.rule.min_updates,
            quorum=config.round.quorum_required,
            deadline=config.round.deadline,
            absent=config.round.absent,
            on_deadline=config.round.on_deadline,
        )
        self.published: Published | None = None
        self.round: Round | None = None
        self.refusals = RefusalLog(config.name)
        self.refused_this_round: dict[int, str] = {}
        self._drain_at: float | None = None
        self._changed = asyncio.Event()  # something the open round's decision depends on
        self._newer = asyncio.Event()  # replaced at every publication; set when a newer one exists
        self._scores = Scoreboard(
            config, module, data_dir=data_dir, device=device, output=output, watch=watch, resumed=state.resumed
        )

    # -- what the service asks -------------------------------------------------------------------------------------------

    async def published_after(self, after_round: int | None) -> Published:
        """The first publication after `after_round`, waiting for it; the caller sets the deadline."""
        while True:
            current = self.published
            if current is not None and (current.finished or after_round is None or current.round > after_round):
                return current
            await self._newer.wait()

    def closes_in(self) -> float:
        """Seconds until the open round's deadline."""
        return self.round.closes_at - self._now() if self.round is not None else 0.0

    @property
    def over(self) -> bool:
        """Whether the last parameters are published: nobody joins any more."""
        return self.published is not None and self.published.finished

    @property
    def current_round(self) -> int:
        """The index of the open round; after the last one, the number of rounds played."""
        if self.round is not None:
            return self.round.index
        return self.published.round if self.published is not None else 0

    def offer(self, worker: int, round_: int, digest: bytes, *, finite: bool) -> Verdict:
        """A complete update has arrived in its row."""
        if self.round is None:
            return Verdict("ROUND_NOT_OPEN", "no round is open")
        verdict = self.round.offer(worker, round_, digest, finite=finite)
        if not verdict.reason and not verdict.duplicate:
            self._watch.arrived(worker, self._now() - self.round.opened)
            self.refused_this_round.pop(worker, None)
        self._changed.set()
        return verdict

    def joined(self) -> None:
        """A session opened or closed."""
        self._watch.connected(self.sessions.connected)
        self._changed.set()

    def drain(self, within: float) -> None:
        """Open no further round; cut the open one after `within` seconds."""
        self._drain_at = self._now() + within
        self._changed.set()

    # -- the run ---------------------------------------------------------------------------------------------------------

    async def play(self, executor: Executor, start_timeout: float) -> dict[str, Any]:
        """Play every round; returns the summary that is also written to the output folder."""
        config, started = self.config, time.monotonic()
        self._off = executor
        outcome = "completed"
        if self._first_round < self.task.rounds:
            await self._all_joined(self._now() + start_timeout)
        else:
            log.warning(
                "nothing to play: an earlier process finished this run; to play it again rename it or remove its output",
                run=config.name,
            )
        log.info(
            "run started",
            run=config.name,
            n=self.task.n,
            f=config.round.f,
            rule=config.round.rule["name"],
            rounds=self.task.rounds,
            dimension=self.task.dimension,
            joined=self.sessions.connected,
            first_round=self._first_round,
        )
        for warning in config.warnings():
            log.warning(warning, run=config.name)
        first = time.monotonic()
        self._scores.start(executor)
        last = self._first_round  # rounds played
        newest: Published | None = await self._run(self.state.encode, self.task, last)
        while newest is not None and last < self.task.rounds:
            if self._drain_at is not None:
                outcome = "drained"
                break
            decision = await self._collect(self._open(last, newest))
            if decision.step is Step.AGGREGATE:
                # Nobody needs the closed round's parameters: their frames go before the next ones are made.
                newest = self.published = None
                newest = await self._close(last, decision)
            elif decision.step is Step.SKIP:
                log.warning("round closed without a step", run=config.name, round=last, why=decision.why)
                self._watch.timed_out()
                self._scores.line({"round": last, "outcome": "skipped", "why": decision.why})
                newest = dataclasses.replace(newest, round=last + 1)
                await self._run(self.state.save, last + 1, self._scores.extra())  # or a kill would open it again
            else:
                outcome = "diverged" if decision.step is Step.DIVERGED else "drained"
                log.warning("run ends early", run=config.name, round=last, why=decision.why)
                break
            last += newest is not None
        self.round = None
        if newest is None:
            outcome = "diverged"
            self._watch.failed()
            log.warning("run ends early", run=config.name, round=last, why="the step made parameters non-finite")
            newest = await self._run(self.state.encode, self.task, last)
        if outcome == "drained":
            await self._run(self.state.save, last, self._scores.extra())
        self._publish(dataclasses.replace(newest, finished=True))
        seconds = time.monotonic() - first
        await self._scores.evaluate(last, self.state.parameters_D)
        summary = {
            "run": config.name,
            "outcome": outcome,
            "rounds": last,
            "rounds_per_second": round((last - self._first_round) / seconds, 2),
            "seconds": round(time.monotonic() - started, 3),
            "digest": newest.digest.hex(),
        }
        summary = await self._scores.finish(summary, self.state.parameters_D)
        self._watch.run_ended(completed=outcome == "completed")
        return summary

    async def _all_joined(self, until: float) -> None:
        while self.sessions.connected < self.task.n and self._drain_at is None:
            if not await self._wait(until):
                log.warning("starting without everybody", joined=self.sessions.connected, expected=self.task.n)
                return

    def _open(self, index: int, published: Published) -> Round:
        """Open round `index` on `published`; in one breath, so that whoever pulls it may push to it."""
        self.round = Round(index, published.digest, self.policy, self._now())
        self.refused_this_round = {}
        self._publish(published)
        self._watch.opened(index, self.state.learning_rate(index))
        return self.round

    async def _collect(self, open_round: Round) -> Decision:
        """Wait until `open_round` may close."""
        restarts = 0
        while True:
            decision = open_round.next(self._now())
            if decision.step is not Step.WAIT:
                return decision
            if open_round.restarts > restarts:
                restarts = open_round.restarts
                missing = sorted(set(range(self.task.n)) - open_round.accepted.keys())
                log.warning(
                    "deadline", run=self.config.name, round=open_round.index, why=decision.why, missing=missing[:20]
                )
                self._watch.timed_out()
            until = decision.until
            if self._drain_at is not None:
                if self._now() >= self._drain_at:
                    open_round.closed = True
                    return Decision(Step.WAIT, f"draining: {decision.why}")
                until = min(until, self._drain_at)
            await self._wait(until)

    async def _wait(self, until: float) -> bool:
        """Wait for a change, at most until time `until`; False at the deadline."""
        self._changed.clear()
        try:
            async with asyncio.timeout_at(until):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _close(self, index: int, decision: Decision) -> Published | None:
        """Aggregate and step: the next round's parameters, encoded; None if they are no longer finite."""
        assert self.round is not None
        opened, collected = self.round.opened, self._now()
        closed: Closed = await self._run(
            self.state.close, self.task, index, self.matrix.rows_ND, decision.rows, decision.f, self._scores.extra()
        )
        if closed.published is None:
            return None
        seconds = self._now() - opened
        phases = {"collect": collected - opened, **closed.seconds}
        self._watch.closed(decision.rows, closed.selected, closed.norm, seconds, phases)
        line = {
            "round": index,
            "outcome": "completed",
            "participants": len(decision.rows),
            "selected": closed.selected,
            "refused": self.refused_this_round,
            "aggregate_norm": closed.norm,
            "seconds": round(seconds, 6),
        }
        if closed.diagnostics is not None:
            self._watch.diagnosed(decision.rows, closed.diagnostics)
            line["diagnostics"] = as_line(decision.rows, closed.diagnostics)
        self._scores.line(line)
        if self._scores.due(index + 1):
            await self._scores.evaluate_beside(index + 1, self.state.parameters_D)
        return closed.published

    def _publish(self, published: Published) -> None:
        self.published = published
        newer, self._newer = self._newer, asyncio.Event()
        newer.set()

    async def _run(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._off, function, *arguments)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
