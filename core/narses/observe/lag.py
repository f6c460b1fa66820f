"""Event-loop lag: how late callbacks run. The one number that shows that something blocks the loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import NamedTuple

from narses.observe.metrics import Metrics

NAME = "narses_event_loop_lag_seconds"
WINDOW = 4096
MAX_BACKLOG_TICKS = 10_000


class LagSummary(NamedTuple):
    """ticks and max_s cover everything since start or reset; p50_s and p99_s the last 4,096 ticks. Seconds."""

    ticks: int
    p50_s: float
    p99_s: float
    max_s: float


class LoopLag:
    """Ticks every `interval_s` seconds and records how late each tick ran.

    The tick is the measurement itself, not polling: it asks nothing and waits for nothing; its delay is what any
    callback due at that moment would have suffered. Ticks keep their due times: after a block of ten intervals ten
    delays are recorded, not one, so that a long block weighs by its length (no coordinated omission).
    """

    def __init__(self, metrics: Metrics | None = None, interval_s: float = 0.05) -> None:
        assert interval_s > 0
        self._metrics = metrics
        self._interval_s = interval_s
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._ticks = 0
        self._max_s = 0.0
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin on the running loop; a second start without stop is our bug."""
        assert self._handle is None
        loop = asyncio.get_running_loop()
        self._due = loop.time() + self._interval_s
        self._handle = loop.call_at(self._due, self._tick, loop)

    def stop(self) -> None:
        """End; what was recorded stays readable."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def reset(self) -> None:
        """Forget what was recorded here (the histogram keeps it), e.g. after a benchmark's warm-up."""
        self._recent.clear()
        self._ticks = 0
        self._max_s = 0.0

    def summary(self) -> LagSummary:
        """Percentiles by nearest rank; zeros while nothing was recorded."""
        if not self._recent:
            return LagSummary(0, 0.0, 0.0, 0.0)
        ordered = sorted(self._recent)
        last = len(ordered) - 1
        return LagSummary(self._ticks, ordered[round(last * 0.5)], ordered[round(last * 0.99)], self._max_s)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        # a machine that slept for hours owes no history
        self._due = max(self._due, now - MAX_BACKLOG_TICKS * self._interval_s)
        while self._due <= now:
            self._record(now - self._due)
            self._due += self._interval_s
        self._handle = loop.call_at(self._due, self._tick, loop)

    def _record(self, lag_s: float) -> None:
        self._recent.append(lag_s)
        self._ticks += 1
        self._max_s = max(self._max_s, lag_s)
        if self._metrics is not None:
            self._metrics.observe(NAME, lag_s)
