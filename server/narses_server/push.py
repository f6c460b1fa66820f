"""One stream of updates: frames in, rows filled, one verdict per update out."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

import grpc

from narses.errors import RefusedError
from narses.rpc.codec import DecodeError, parse_push
from narses.rpc.intake import Intake
from narses.rpc.status import OK, REFUSALS
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses_server.coordinator import Run
from narses_server.matrix import RowWriter
from narses_server.round import Verdict
from narses_server.session import Session, refused
from narses_server.watch import Watch

IDLE_SECONDS = 30.0
"""A stream that sends no frame inside an update for this long is cut: it would hold a row for nothing."""

PAUSE_SECONDS = 600.0
"""Between two updates a stream may be silent for longer: the next gradient is being computed, and only a handler is held."""

Read = Callable[[], Awaitable[Any]]
Write = Callable[[bytes], Awaitable[None]]


class _Update:
    """The update being received; decided once it has its verdict (then its remaining payload is discarded)."""

    def __init__(self, header: pb.UpdateHeader) -> None:
        self.header = header
        self.writer: RowWriter | None = None
        self.decided = False
        self.discarded = 0

    @property
    def intake(self) -> Intake:
        assert self.writer is not None
        return self.writer.intake


class PushStream:
    """Serves one Push RPC of `session`. Whatever can be refused is refused from the header, before a payload byte is kept."""

    def __init__(self, run: Run, session: Session, executor: Executor, watch: Watch, write: Write) -> None:
        self._run = run
        self._session = session
        self._executor = executor
        self._watch = watch
        self._write = write
        self._update: _Update | None = None

    async def serve(self, read: Read) -> None:
        """Until the client has sent its last update. RefusedError where the stream itself is broken."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(PAUSE_SECONDS) as silence:
                while (frame := await read()) is not grpc.aio.EOF:
                    await self._frame(frame)
                    silence.reschedule(loop.time() + self._patience)
            if self._update is not None and not self._update.decided:
                await self._decide(Verdict("INCOMPLETE", "the stream ended before the update's trailer; send again"))
        except TimeoutError:
            raise refused("INCOMPLETE", f"no frame came for {self._patience:g} s; send again") from None
        finally:
            await self._abandon()

    @property
    def _patience(self) -> float:
        return PAUSE_SECONDS if self._update is None else IDLE_SECONDS

    async def _frame(self, frame: bytes) -> None:
        try:
            message = parse_push(frame)
        except DecodeError:
            raise await self._broken("a frame cannot be parsed as PushRequest") from None
        if isinstance(message, memoryview):
            await self._chunk(message)
            return
        match message.WhichOneof("frame"):
            case "header":
                if self._update is not None:
                    raise await self._broken("a header came before the trailer of the update before it")
                await self._open(message.header)
            case "trailer":
                await self._commit(message.trailer)
            case "update":
                if self._update is not None:
                    raise await self._broken("a whole update came before the trailer of the update before it")
                await self._open(message.update.header)
                await self._chunk(memoryview(message.update.payload))
                await self._commit(message.update.trailer)
            case _:
                raise await self._broken("a frame is empty: expected a header, a chunk, a trailer or an update")

    async def _open(self, header: pb.UpdateHeader) -> None:
        self._update = update = _Update(header)
        verdict = self._admit(header)
        if verdict.reason:
            await self._decide(verdict)
            return
        algorithm = self._run.task.digest
        if not self._accepted(header.worker):
            update.writer = await self._run.matrix.take(header.worker, algorithm)
        # Asked again: while the row was waited for, another stream of this worker may have been accepted into it.
        if self._accepted(header.worker):
            if update.writer is not None:
                self._run.matrix.release(header.worker, update.writer)
            # The accepted row is part of the round and is not touched: a repetition is only hashed and compared.
            update.writer = RowWriter(Intake(None, algorithm, size=header.byte_length))

    def _accepted(self, worker: int) -> bool:
        return self._run.round is not None and worker in self._run.round.accepted

    def _admit(self, header: pb.UpdateHeader) -> Verdict:
        run, expected = self._run, self._run.matrix.row_bytes
        if run.sessions.find(self._session.token) is None:
            return Verdict("NO_SESSION", "the session has ended; join again")
        if header.worker not in self._session.workers:
            return Verdict("UNKNOWN_WORKER", f"worker {header.worker} does not belong to this session")
        if header.run_id != run.task.run_id:
            return Verdict("UNKNOWN_RUN", "the update is for another run than the session")
        if header.dtype != pb.DATA_TYPE_FLOAT32:
            return Verdict("WRONG_DTYPE", f"data type {header.dtype} came, {run.task.dtype} is expected")
        if header.byte_length != expected:
            return Verdict("WRONG_LENGTH", f"{header.byte_length} bytes were announced, {expected} are expected")
        if run.round is None:
            return Verdict("ROUND_NOT_OPEN", "no round is open")
        return run.round.admit(header.worker, header.round, header.base_digest)

    async def _chunk(self, chunk: memoryview) -> None:
        update = self._update
        if update is None:
            raise await self._broken("a chunk came before any header")
        if update.decided:
            update.discarded += len(chunk)
            if update.discarded > self._run.matrix.row_bytes + (8 << 20):
                raise await self._broken("payload keeps coming for an update that was refused")
            return
        self._watch.received(len(chunk))
        assert update.writer is not None
        if update.writer.superseded:
            await self._decide(Verdict("SUPERSEDED", "a newer push of this worker took over"))
        elif not update.intake.fits(chunk):
            await self._decide(
                Verdict("TOO_LARGE", f"more than the announced {update.header.byte_length} bytes of payload came")
            )
        else:
            await update.writer.absorb(chunk, self._executor)

    async def _commit(self, trailer: pb.UpdateTrailer) -> None:
        update = self._update
        if update is None:
            raise await self._broken("a trailer came before any header")
        if not update.decided:
            await self._decide(self._judge(update, trailer))
        self._update = None

    def _judge(self, update: _Update, trailer: pb.UpdateTrailer) -> Verdict:
        header = update.header
        assert update.writer is not None
        if update.writer.superseded:
            return Verdict("SUPERSEDED", "a newer push of this worker took over")
        if self._run.sessions.find(self._session.token) is None:
            return Verdict("NO_SESSION", "the session ended before the update's trailer; join again")
        if not update.intake.complete:
            return Verdict("WRONG_LENGTH", f"{update.intake.received} of {header.byte_length} announced bytes came")
        digest = update.intake.digest()
        if digest != trailer.digest:
            return Verdict("CHECKSUM", "the payload does not have the trailer's digest")
        return self._run.offer(header.worker, header.round, digest, finite=update.intake.finite)

    async def _decide(self, verdict: Verdict) -> None:
        """Count and send the verdict on the current update, and give its row back."""
        update = self._update
        assert update is not None
        header = update.header
        self._settle(update, verdict)
        response = pb.PushResponse(
            worker=header.worker,
            round=header.round,
            code=REFUSALS[verdict.reason].code if verdict.reason else OK,
            reason=verdict.reason,
            message=verdict.message,
            duplicate=verdict.duplicate,
            current_round=self._run.current_round,
        )
        await self._write(response.SerializeToString())

    def _settle(self, update: _Update, verdict: Verdict) -> None:
        update.decided = True
        worker = update.header.worker
        if update.writer is not None:
            self._run.matrix.release(worker, update.writer)
        mine = worker in self._session.workers
        self._watch.verdict(worker if mine else None, verdict.reason, duplicate=verdict.duplicate)
        if verdict.reason:
            self._run.refusals.tell(
                "update refused",
                verdict.reason,
                worker=worker,
                round=update.header.round,
                why=verdict.message,
                peer=self._session.peer,
            )
            if mine and update.header.round == self._run.current_round:
                self._run.refused_this_round[worker] = verdict.reason

    async def _broken(self, message: str) -> RefusedError:
        """The error that ends the stream; the update it was in, if any, is refused with it."""
        if self._update is not None and not self._update.decided:
            await self._decide(Verdict("PROTOCOL", message))
        elif self._update is None:
            self._watch.verdict(None, "PROTOCOL")
        return refused("PROTOCOL", message)

    async def _abandon(self) -> None:
        """The stream has ended: what it was in the middle of never existed."""
        update = self._update
        if update is not None and not update.decided:
            self._settle(update, Verdict("INCOMPLETE", "the stream ended before the update's trailer"))
        self._update = None
