"""The one preallocated matrix of updates, and the right to write a row of it."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from narses.flat import aligned_rows
from narses.rpc.intake import INLINE_BYTES, Intake


class UpdateMatrix:
    """(n, D) float32, rows padded to 64 bytes, allocated and touched once per run and reused every round.

    A row has at most one writer: taking it cancels the previous one and waits for the chunk it is writing, so two streams of
    one worker never interleave. A row whose update was accepted is never taken again in its round (the service sees to that).
    """

    def __init__(self, n: int, dimension: int) -> None:
        self.rows_ND: NDArray[np.float32] = aligned_rows(n, dimension)
        self.row_bytes = dimension * 4
        self.bytes_reserved = n * self.rows_ND.strides[0]
        self._writers: list[RowWriter | None] = [None] * n
        self._taking = [asyncio.Lock() for _ in range(n)]

    async def take(self, worker: int, algorithm: str) -> RowWriter:
        """The right to write row `worker`, taken from whoever holds it."""
        async with self._taking[worker]:
            previous = self._writers[worker]
            if previous is not None:
                previous.superseded = True
                if previous.busy is not None:
                    await asyncio.wait((previous.busy,))
            writer = RowWriter(Intake(self.rows_ND[worker], algorithm))
            self._writers[worker] = writer
            return writer

    def release(self, worker: int, writer: RowWriter) -> None:
        """Give row `worker` back."""
        if self._writers[worker] is writer and writer.busy is None:
            self._writers[worker] = None


class RowWriter:
    """One stream's right to fill one row; `superseded` once a newer stream has taken it."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self.superseded = False
        self.busy: asyncio.Future[None] | None = None

    async def absorb(self, chunk: memoryview, executor: Executor) -> None:
        """Take `chunk` in, on the loop thread if small, else in `executor`."""
        if len(chunk) <= INLINE_BYTES:
            self.intake.absorb(chunk)
            return
        job = asyncio.get_running_loop().run_in_executor(executor, self.intake.absorb, chunk)
        self.busy = job
        # Shielded: a cancelled stream must not leave a thread writing into a row that somebody else takes.
        job.add_done_callback(self._idle)
        await asyncio.shield(job)

    def _idle(self, job: asyncio.Future[None]) -> None:
        self.busy = None
        if not job.cancelled():
            job.exception()  # retrieved here too, because a cancelled stream no longer awaits it
