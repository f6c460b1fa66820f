"""The public client of a Narses server: join, pull, push. Digests are checked and made here; retries are the daemon's."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from numpy.typing import NDArray

from narses.errors import DamagedError, NarsesError, RefusedError, SessionLostError, UnreachableError
from narses.observe.metrics import Metrics
from narses.rpc.codec import DecodeError, chunk_frame, parse_pull, update_frame
from narses.rpc.convert import task_from_wire
from narses.rpc.digest import Hasher, hasher
from narses.rpc.intake import INLINE_BYTES, Intake
from narses.rpc.interceptors import client_attempt
from narses.rpc.options import CHANNEL_OPTIONS
from narses.rpc.status import REASON_KEY, REFUSALS, TOKEN_KEY
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses.task import Task

SERVICE = "/narses.rpc.v1.ParameterServerService/"
PULL_SECONDS = 30.0  # the server answers a long poll after 10 s at most
LEAVE_SECONDS = 5.0
NOTICE_SECONDS = 30.0  # and sends a notice every 10 s while no run is open


@dataclass(frozen=True)
class Pulled:
    """A round's parameters (D,) as float32, or, where header.not_modified, none."""

    header: pb.RoundHeader
    parameters_D: NDArray[np.float32]


class Client:
    """One channel to a server. `executor`: where large chunks are copied and hashed."""

    def __init__(self, address: str, executor: Executor, metrics: Metrics | None = None) -> None:
        self.address = address
        self._executor = executor
        self.metrics = metrics
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._join: Any = self._channel.unary_stream(
            SERVICE + "Join", pb.JoinRequest.SerializeToString, pb.JoinResponse.FromString
        )
        self._pull: Any = self._channel.unary_stream(SERVICE + "Pull", pb.PullRequest.SerializeToString)
        self._push: Any = self._channel.stream_stream(SERVICE + "Push")
        self._leave: Any = self._channel.unary_unary(
            SERVICE + "Leave", pb.LeaveRequest.SerializeToString, pb.LeaveResponse.FromString
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def join(self, workers: Sequence[int], software: str) -> Session | pb.Notice:
        """A session for `workers` once a run is open, or the notice that none will open.

        RefusedError with the server's reason (UNKNOWN_WORKER, SESSION_ALIVE); UnreachableError if nobody answers.
        """
        call = self._join(pb.JoinRequest(workers=workers, software=software))
        try:
            while True:
                async with asyncio.timeout(NOTICE_SECONDS):
                    response = await call.read()
                if response is grpc.aio.EOF:
                    raise await ended(call, self.address)
                if response.WhichOneof("message") == "task":
                    return Session(self, call, task_from_wire(response.task), response.session, self._executor)
                if response.notice.kind != pb.NOTICE_KIND_WAITING:
                    call.cancel()
                    notice: pb.Notice = response.notice
                    return notice
        except TimeoutError:
            call.cancel()
            raise UnreachableError(f"{self.address}: no answer to Join within {NOTICE_SECONDS:.0f} s") from None
        except grpc.aio.AioRpcError as error:
            raise translated(error, self.address) from None
        except BaseException:
            call.cancel()
            raise


class Session:
    """One joined session. Ends with its Join stream; `notice` completes with the server's last word, or raises."""

    def __init__(self, client: Client, call: Any, task: Task, token: bytes, executor: Executor) -> None:
        self.task = task
        self.client = client
        self._call = call
        self._executor = executor
        self._metadata = ((TOKEN_KEY, token),)
        self._parameters_D = np.empty(task.dimension, np.float32)
        self.notice: asyncio.Task[pb.Notice] = asyncio.create_task(self._listen())

    async def _listen(self) -> pb.Notice:
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                if response.WhichOneof("message") == "notice":
                    return response.notice  # type: ignore[no-any-return]
        except grpc.aio.AioRpcError as error:
            raise translated(error, self.client.address) from None
        raise await ended(self._call, self.client.address)

    async def pull(self, after_round: int | None) -> Pulled:
        """The first round after `after_round`. The array is reused by the next pull.

        RefusedError (NO_SESSION, UNKNOWN_RUN), UnreachableError, or DamagedError if the payload is not what its header says.
        """
        request = pb.PullRequest(run_id=self.task.run_id, after_round=after_round)
        method = SERVICE + "Pull"
        call = self.client._pull(request, metadata=self._metadata, timeout=PULL_SECONDS)
        try:
            with attempt(self.client, method):
                return await self._receive(call)
        except grpc.aio.AioRpcError as error:
            raise translated(error, self.client.address) from None
        except DecodeError:
            raise DamagedError(f"{self.client.address} sent a Pull frame that cannot be parsed") from None
        finally:
            call.cancel()

    async def _receive(self, call: Any) -> Pulled:
        first = await call.read()
        if first is grpc.aio.EOF:
            raise await ended(call, self.client.address)
        message = parse_pull(first)
        if isinstance(message, memoryview) or message.WhichOneof("frame") != "header":
            raise DamagedError(f"{self.client.address} answered Pull without a header")
        header = message.header
        if header.not_modified:
            return Pulled(header, self._parameters_D)
        if header.byte_length != self._parameters_D.nbytes:
            raise DamagedError(
                f"{self.client.address} announced {header.byte_length} bytes of parameters, the Task has "
                f"{self._parameters_D.nbytes}"
            )
        intake = Intake(self._parameters_D, self.task.digest)
        while (frame := await call.read()) is not grpc.aio.EOF:
            chunk = parse_pull(frame)
            if not isinstance(chunk, memoryview) or not intake.fits(chunk):
                raise DamagedError(f"{self.client.address} sent more parameters than it announced, or a second header")
            if len(chunk) <= INLINE_BYTES:
                intake.absorb(chunk)
            else:
                await asyncio.get_running_loop().run_in_executor(self._executor, intake.absorb, chunk)
        if not intake.complete:
            raise await ended(call, self.client.address)
        if intake.digest() != header.digest:
            raise DamagedError(f"{self.client.address}: parameters of round {header.round} do not have their digest")
        if self.client.metrics is not None:
            self.client.metrics.inc("narses_worker_received_bytes_total", intake.received, rpc="pull")
        return Pulled(header, self._parameters_D)

    def push(self, timeout: float) -> Push:
        """A stream for a cohort's updates: `async with session.push(60) as push`. timeout: seconds for the whole stream."""
        return Push(self, timeout)

    async def leave(self) -> None:
        """End the session; a server that is gone already does not mind.

        Its last word on the session is waited for: after "no more runs" it may be gone before one could ask again.
        """
        try:
            await self.client._leave(pb.LeaveRequest(), metadata=self._metadata, timeout=LEAVE_SECONDS)
            await asyncio.wait({self.notice}, timeout=LEAVE_SECONDS)
        except grpc.aio.AioRpcError:
            return
        finally:
            self.close()

    def close(self) -> None:
        """Drop the Join stream, which ends the session at the server."""
        self._call.cancel()
        if self.notice.done() and not self.notice.cancelled():
            self.notice.exception()  # seen: the stream's end is no news after this
        self.notice.cancel()


class Push:
    """One Push RPC. Verdicts are read beside the writing; a client that waited for them could deadlock with a proxy."""

    def __init__(self, session: Session, timeout: float) -> None:
        self._session = session
        self._call: Any = session.client._push(metadata=session._metadata, timeout=timeout)
        self._verdicts: asyncio.Task[list[pb.PushResponse]] = asyncio.create_task(self._read())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._verdicts.done():
            self._verdicts.cancel()
        await asyncio.gather(self._verdicts, return_exceptions=True)
        self._call.cancel()

    async def _read(self) -> list[pb.PushResponse]:
        verdicts = []
        while (raw := await self._call.read()) is not grpc.aio.EOF:
            verdicts.append(pb.PushResponse.FromString(raw))
        return verdicts

    async def send(self, worker: int, round_: int, base: bytes, row_D: NDArray[np.float32]) -> None:
        """Send one update: `row_D` (D,) float32, computed from the parameters with digest `base`.

        The row must stay as it is until this returns. UnreachableError or RefusedError if the stream is broken.
        """
        task = self._session.task
        header = pb.UpdateHeader(
            run_id=task.run_id,
            worker=worker,
            round=round_,
            base_digest=base,
            dtype=pb.DATA_TYPE_FLOAT32,
            byte_length=row_D.nbytes,
        )
        state = hasher(task.digest)
        payload = row_D.view(np.uint8).data
        if len(payload) <= task.chunk_bytes:
            state.update(payload)
            await self.write(update_frame(header, payload, pb.UpdateTrailer(digest=state.digest())))
        else:
            await self._send_in_chunks(header, payload, state)
        if self._session.client.metrics is not None:
            self._session.client.metrics.inc("narses_worker_sent_bytes_total", row_D.nbytes, rpc="push")

    async def _send_in_chunks(self, header: pb.UpdateHeader, payload: memoryview, state: Hasher) -> None:
        chunk_bytes = self._session.task.chunk_bytes
        await self.write(pb.PushRequest(header=header).SerializeToString())
        for at in range(0, len(payload), chunk_bytes):
            # On the loop thread: a hop to another costs what hashing a piece does, and gRPC sends the one before it meanwhile.
            piece = payload[at : at + chunk_bytes]
            state.update(piece)
            await self.write(chunk_frame(piece))
        await self.write(pb.PushRequest(trailer=pb.UpdateTrailer(digest=state.digest())).SerializeToString())

    async def write(self, frame: bytes) -> None:
        """Write one raw PushRequest frame."""
        try:
            await self._call.write(frame)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await ended(self._call, self._session.client.address) from None

    async def finish(self) -> list[pb.PushResponse]:
        """No more updates: every verdict, in order of decision."""
        try:
            with attempt(self._session.client, SERVICE + "Push"):
                await self._call.done_writing()
                return await self._verdicts
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise await ended(self._call, self._session.client.address) from None


def attempt(client: Client, method: str) -> Any:
    """Count one RPC attempt where metrics are kept."""
    return client_attempt(client.metrics, method) if client.metrics is not None else contextlib.nullcontext()


async def ended(call: Any, address: str) -> NarsesError:
    """The error for a stream that ended too early, from its status."""
    code = await call.code()
    return _error(code, await call.details() or "", await call.trailing_metadata() or (), address)


def translated(error: grpc.aio.AioRpcError, address: str) -> NarsesError:
    """An RPC's failure as an error of narses.errors."""
    return _error(error.code(), error.details() or "", error.trailing_metadata() or (), address)


def _error(code: grpc.StatusCode, details: str, trailing: Iterable[tuple[str, Any]], address: str) -> NarsesError:
    reason = next((value for key, value in trailing if key == REASON_KEY), "")
    if isinstance(reason, str) and reason in REFUSALS:
        cls = SessionLostError if REFUSALS[reason].action == "join" else RefusedError
        return cls(REFUSALS[reason].code, reason, details)
    return UnreachableError(f"{address}: {code.name if code else 'stream ended'} {details}".rstrip())
