"""The RPC handlers: who is calling, decode, call the domain, translate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import Executor
from typing import Any, NoReturn

import grpc
import structlog

from narses.errors import RefusedError
from narses.observe.logs import clip
from narses.rpc.convert import task_to_wire
from narses.rpc.status import TOKEN_KEY, grpc_code, trailing
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses_server.coordinator import Run
from narses_server.push import PushStream
from narses_server.session import Session, refused
from narses_server.watch import Watch

log = structlog.get_logger("narses.server")

SERVICE = "narses.rpc.v1.ParameterServerService"
POLL_SECONDS = 10.0
"""Longest wait of one Pull, and the interval of "waiting" notices: proxies in between cut calls that are silent for longer."""

Context = grpc.aio.ServicerContext[Any, Any]


class Service:
    """ParameterServerService over whatever run is open. Push and Pull move raw frames (narses.rpc.codec)."""

    def __init__(self, executor: Executor, watch: Watch) -> None:
        self._executor = executor
        self._watch = watch
        self._run: Run | None = None
        self._sessions: dict[bytes, tuple[Run, Session]] = {}
        self._over: pb.Notice | None = None  # why no further run will open
        self._told: set[int] = set()  # workers that know it
        self._changed = asyncio.Event()  # replaced at every change of run or state

    # -- what the server tells it ----------------------------------------------------------------------------------------

    def open(self, run: Run) -> None:
        """Sessions may join `run` from now on."""
        self._run = run
        self._wake()

    def close(self) -> None:
        """The open run is finished: its sessions end, nobody joins it any more."""
        self._run = None
        self._wake()

    async def end(self, kind: pb.NoticeKind, message: str, workers: int, within: float) -> None:
        """No further run will open. Returns when workers 0..workers-1 have been told, or after `within` seconds."""
        self._over = pb.Notice(kind=kind, message=message)
        self._wake()
        try:
            async with asyncio.timeout(within):
                while not self._told.issuperset(range(workers)):
                    await self._changed.wait()
        except TimeoutError:
            log.info("some daemons were not told that the runs are over", told=sorted(self._told))

    def _tell(self, workers: Iterable[int]) -> None:
        """The workers have been sent the last word; not before, because they may have hung up meanwhile."""
        self._told.update(workers)
        self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's methods; Push and Pull without protobuf on the way in or out."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Join": grpc.unary_stream_rpc_method_handler(
                    self.join, pb.JoinRequest.FromString, pb.JoinResponse.SerializeToString
                ),
                "Pull": grpc.unary_stream_rpc_method_handler(self.pull, pb.PullRequest.FromString),
                "Push": grpc.stream_stream_rpc_method_handler(self.push),
                "Leave": grpc.unary_unary_rpc_method_handler(
                    self.leave, pb.LeaveRequest.FromString, pb.LeaveResponse.SerializeToString
                ),
            },
        )

    # -- RPCs ------------------------------------------------------------------------------------------------------------

    async def join(self, request: pb.JoinRequest, context: Context) -> AsyncIterator[pb.JoinResponse]:
        """The session: lasts as long as this stream."""
        self._watch.in_progress("join", 1)
        try:
            while self._run is None or self._run.over:
                if self._over is not None:
                    yield pb.JoinResponse(notice=self._over)
                    self._tell(request.workers)
                    return
                if not await self._change():
                    yield pb.JoinResponse(notice=pb.Notice(kind=pb.NOTICE_KIND_WAITING, message="no run is open yet"))
            run = self._run
            try:
                session = run.sessions.open(request.workers, context.peer(), clip(request.software))
            except RefusedError as error:
                log.warning("join refused", reason=error.reason, why=error.message, peer=context.peer())
                await _abort(context, error)
            self._sessions[session.token] = (run, session)
            log.info("joined", run=run.config.name, workers=sorted(session.workers), software=session.software)
            run.joined()
            try:
                yield pb.JoinResponse(task=task_to_wire(run.task), session=session.token)
                while self._run is run and run.sessions.find(session.token) is not None:
                    await self._change()
                notice = self._farewell(run, session)
                yield pb.JoinResponse(notice=notice)
                if notice is self._over:
                    self._tell(session.workers)
            finally:
                self._sessions.pop(session.token, None)
                run.sessions.close(session)
                run.joined()
        finally:
            self._watch.in_progress("join", -1)

    async def pull(self, request: pb.PullRequest, context: Context) -> None:
        """The round after the one the caller has done with."""
        self._watch.in_progress("pull", 1)
        try:
            run, _ = await self._session(context, "pull")
            if request.run_id != run.task.run_id:
                self._watch.pulled("denied")
                await _abort(context, refused("UNKNOWN_RUN", "the pull is for another run than the session"))
            after = request.after_round if request.HasField("after_round") else None
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    published = await run.published_after(after)
            except TimeoutError:
                header = pb.RoundHeader(run_id=run.task.run_id, round=run.current_round, not_modified=True)
                await context.write(pb.PullResponse(header=header).SerializeToString())
                self._watch.pulled("not_modified")
                return
            header = published.header(
                run.task.run_id,
                run.task.n,
                run.policy.f,
                run.state.rule_table,
                run.closes_in(),
                run.state.durable_round,
            )
            await context.write(pb.PullResponse(header=header).SerializeToString())
            for frame in published.frames:
                await context.write(frame)
            self._watch.pulled("ok", published.byte_length)
        finally:
            self._watch.in_progress("pull", -1)

    async def push(self, _: object, context: Context) -> None:
        """A cohort's updates, one verdict each."""
        self._watch.in_progress("push", 1)
        try:
            run, session = await self._session(context, "push")
            stream = PushStream(run, session, self._executor, self._watch, context.write)
            try:
                await stream.serve(context.read)
            except RefusedError as error:
                run.refusals.tell("push stream cut", error.reason, why=error.message, peer=session.peer)
                await _abort(context, error)
        finally:
            self._watch.in_progress("push", -1)

    async def leave(self, _: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:
        """End the session now."""
        run, session = await self._session(context, "leave")
        self._sessions.pop(session.token, None)
        run.sessions.close(session)
        run.joined()
        self._wake()
        return pb.LeaveResponse()

    async def _session(self, context: Context, rpc: str) -> tuple[Run, Session]:
        """The session whose token the caller presents."""
        metadata = context.invocation_metadata() or ()
        token = next((value for key, value in metadata if key == TOKEN_KEY), b"")
        found = self._sessions.get(token) if isinstance(token, bytes) else None
        if found is None:
            if rpc == "pull":
                self._watch.pulled("denied")
            elif rpc == "push":
                self._watch.verdict(None, "NO_SESSION")
            await _abort(context, refused("NO_SESSION", "no live session has this token; join first"))
        return found

    async def _change(self) -> bool:
        """Wait for a change of run or state, at most one poll interval; False if none came."""
        try:
            async with asyncio.timeout(POLL_SECONDS):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _farewell(self, run: Run, session: Session) -> pb.Notice:
        if self._over is not None:
            return self._over
        if run.sessions.find(session.token) is None:
            return pb.Notice(kind=pb.NOTICE_KIND_RUN_FINISHED, message="you left")
        return pb.Notice(kind=pb.NOTICE_KIND_RUN_FINISHED, message=f"run {run.config.name} is finished")


async def _abort(context: Context, error: RefusedError) -> NoReturn:
    await context.abort(grpc_code(error.code), error.message, trailing(error.reason))
    raise AssertionError("abort raises")
