"""What passes through the proxy in one run, and how long it is held back.

The hold rule (ARCHITECTURE 6): updates are held until all those that are waited for have been seen, or a downstream session
that was waited for ends, or half of the round's remaining time has passed. Then the attack crafts from what was seen, at least
two rows; else everything goes on untouched. A dead worker behind the proxy never costs a round.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

import numpy as np
import structlog

from narses.errors import ConfigError
from narses.observe.metrics import Metrics
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses.task import Task
from narses_adversary.config import ProxyConfig
from narses_adversary.craft import Crafter, Forged, Row

log = structlog.get_logger("narses.proxy")

FEWEST_ROWS = 2
"""Statistics of fewer rows than this say nothing, so the attack does not craft from them."""


class Hold:
    """One round's updates, held until they are crafted from. `rewritten` is set once it is known what each member sends."""

    def __init__(self, header: pb.RoundHeader, members: tuple[int, ...], opened: float) -> None:
        self.header = header
        self.members = members
        self.opened = opened
        self.until = opened + header.closes_in_ms / 2000
        self.seen: dict[int, Row] = {}
        self.decided = asyncio.Event()
        self.forged: Forged | None = None


class Traffic:
    """One run as the proxy carries it: sessions, the open round, its parameters, its hold."""

    def __init__(self, task: Task, config: ProxyConfig, executor: Executor, metrics: Metrics) -> None:
        self.task = task
        self._config = config
        self._executor = executor
        self._metrics = metrics
        self._live: dict[int, int] = {}  # worker -> open downstream sessions that act for it
        self._carried: set[int] = set()  # every worker that ever joined through here
        self._holds: dict[int, Hold] = {}
        self._deciding: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._parameters: tuple[int, Row] | None = None
        plan = config.plan_for(task.run_name)
        self._crafter = Crafter(task, plan, config.seed) if plan is not None else None
        self._attack = "none" if plan is None else plan.name
        metrics.declare("attack", [self._attack])
        if plan is not None:
            log.info("attack", run=task.run_name, attack=plan.name, knows="intercepted")

    @property
    def attacking(self) -> bool:
        """Whether this run is attacked at all; if not, frames pass unread."""
        return self._crafter is not None

    def joined(self, workers: frozenset[int]) -> None:
        """A downstream session opened."""
        for worker in workers:
            self._live[worker] = self._live.get(worker, 0) + 1
        self._carried |= workers
        self._wake()

    def left(self, workers: frozenset[int]) -> None:
        """A downstream session ended; nobody waits for its workers any more."""
        for worker in workers:
            self._live[worker] -= 1
            if not self._live[worker]:
                del self._live[worker]
        self._wake()

    def published(self, header: pb.RoundHeader, parameters_D: Row) -> None:
        """A round's parameters passed on their way down."""
        if self._parameters is None or self._parameters[0] < header.round:
            self._parameters = (header.round, parameters_D)

    def opened(self, header: pb.RoundHeader) -> None:
        """A round's header passed: the round is open, and the clock of its hold starts."""
        if self._crafter is None or header.finished or header.not_modified or header.round in self._holds:
            return
        candidates = self._config.workers if self._config.workers is not None else tuple(self._carried)
        try:
            members = self._crafter.members(header.round, candidates, header.f)
        except ConfigError as error:
            log.warning("attack impossible", run=self.task.run_name, round=header.round, why=str(error))
            return
        if not members:
            return
        hold = Hold(header, members, asyncio.get_running_loop().time())
        self._holds = {r: h for r, h in self._holds.items() if r + 2 > header.round}
        self._holds[header.round] = hold
        task = asyncio.create_task(self._decide(hold))
        self._deciding.add(task)
        task.add_done_callback(self._deciding.discard)

    def hold(self, round_: int) -> Hold | None:
        """The hold of an attacked round; None where updates of `round_` pass untouched."""
        return self._holds.get(round_)

    def saw(self, hold: Hold, worker: int, row: Row) -> None:
        """A complete update came; once the hold is decided it is too late to count."""
        if not hold.decided.is_set():
            hold.seen[worker] = row
            self._wake()

    def close(self) -> None:
        """The run is over: let go of everything."""
        for task in self._deciding:
            task.cancel()
        for hold in self._holds.values():
            hold.decided.set()

    async def _decide(self, hold: Hold) -> None:
        """Apply the hold rule, then craft. Whatever fails, the updates go on."""
        try:
            waited = frozenset(self._live)
            async with asyncio.timeout_at(hold.until):
                while not (waited & self._live.keys()) <= hold.seen.keys() or not hold.seen:
                    changed = self._changed
                    await changed.wait()
        except TimeoutError:
            log.info(
                "held until half of the deadline", run=self.task.run_name, round=hold.header.round, seen=len(hold.seen)
            )
        try:
            await self._craft(hold)
        except Exception:
            log.exception("the attack failed; updates pass untouched", run=self.task.run_name, round=hold.header.round)
        finally:
            hold.decided.set()
            self._metrics.observe(
                "narses_proxy_injected_delay_seconds", asyncio.get_running_loop().time() - hold.opened
            )

    async def _craft(self, hold: Hold) -> None:
        if len(hold.seen) < FEWEST_ROWS or self._crafter is None:
            log.warning("too few updates seen to craft from", round=hold.header.round, seen=len(hold.seen))
            return
        known = self._parameters
        parameters_D = known[1] if known is not None and known[0] == hold.header.round else None
        loop = asyncio.get_running_loop()
        hold.forged = await loop.run_in_executor(
            self._executor, self._crafter.craft, hold.header, parameters_D, dict(hold.seen), hold.members
        )
        if hold.forged is not None:
            self._metrics.observe("narses_proxy_rewrite_duration_seconds", hold.forged.seconds, attack=self._attack)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def replacement(hold: Hold, worker: int) -> Row | None:
    """What the member `worker` sends instead; None: its own update, untouched."""
    if hold.forged is None or worker not in hold.members:
        return None
    return np.ascontiguousarray(hold.forged.rows[worker], dtype=np.float32)
