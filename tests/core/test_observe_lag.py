from __future__ import annotations

import asyncio
import time

from narses.observe.lag import NAME, LagSummary, LoopLag
from narses.observe.metrics import Metrics


async def loop_turns(seconds: float) -> None:
    """Wait on the loop's own clock."""
    done = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, done.set)
    await asyncio.wait_for(done.wait(), 10)


async def test_a_blocked_loop_is_seen_by_its_length() -> None:
    metrics = Metrics("worker")
    lag = LoopLag(metrics, interval_s=0.01)
    lag.start()
    await loop_turns(0.05)
    lag.reset()

    time.sleep(0.3)  # noqa: ASYNC251 what this test is about
    await loop_turns(0.05)
    lag.stop()

    summary = lag.summary()
    # every tick due during the block counts: about 30 with delays from 0.3 s down to 0
    assert summary.ticks >= 30
    assert summary.max_s >= 0.28
    assert 0.05 < summary.p50_s < summary.p99_s <= summary.max_s
    count = metrics.registry.get_sample_value(f"{NAME}_bucket", {"le": "+Inf"})
    beyond = count - metrics.registry.get_sample_value(f"{NAME}_bucket", {"le": "0.1"})  # type: ignore[operator]
    assert beyond >= 15


async def test_stop_ends_the_ticks_and_start_begins_anew() -> None:
    lag = LoopLag(interval_s=0.005)
    assert lag.summary() == LagSummary(0, 0.0, 0.0, 0.0)
    lag.start()
    await loop_turns(0.03)
    lag.stop()
    ticks = lag.summary().ticks

    await loop_turns(0.03)
    assert lag.summary().ticks == ticks > 0

    lag.start()
    await loop_turns(0.03)
    lag.stop()
    assert lag.summary().ticks > ticks
