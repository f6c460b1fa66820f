"""One session that passes through the proxy, and how much of its traffic may wait there."""

from __future__ import annotations

import asyncio

from narses.rpc.options import MESSAGE_LIMIT
from narses_adversary.hold import Traffic

FRAME_OVERHEAD = 256
"""What a queued frame costs beside its bytes, generously: many empty frames are no way around the budget."""


class Budget:
    """Bytes that one session's streams may have waiting behind holds; when it is used up they are not read any further.

    It holds one update for each of the session's workers, and MESSAGE_LIMIT for whatever else comes. A session's ids are
    its own, so all sessions together hold n updates, plus MESSAGE_LIMIT each.
    """

    def __init__(self, workers: int, row_bytes: int) -> None:
        self.limit = workers * (row_bytes + 8 * FRAME_OVERHEAD) + MESSAGE_LIMIT
        self.used = 0
        self._freed = asyncio.Event()

    async def take(self, size: int) -> None:
        """Wait until `size` bytes more may be kept. A lone frame may always."""
        while self.used and self.used + size > self.limit:
            freed = self._freed
            await freed.wait()
        self.used += size

    def give(self, size: int) -> None:
        """They are gone."""
        self.used -= size
        freed, self._freed = self._freed, asyncio.Event()
        freed.set()


class Carried:
    """One session that passes through: its run and workers, and its streams of updates that are not over yet."""

    def __init__(self, traffic: Traffic, workers: frozenset[int]) -> None:
        self.traffic = traffic
        self.workers = workers
        self.budget = Budget(len(workers), traffic.task.dimension * 4)
        self.pushing = 0
        self.quiet = asyncio.Event()
        self.quiet.set()
        self.over = asyncio.Event()
        self.finished = False  # the server has said so

    def streams(self, change: int) -> None:
        """A stream began (1) or is over (-1)."""
        self.pushing += change
        (self.quiet.clear if self.pushing else self.quiet.set)()
