"""One Push stream through the proxy: held updates wait, what came after them queues behind, nothing is reordered."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np

from narses.observe.metrics import Metrics
from narses.rpc.codec import DecodeError, chunk_frame, chunk_of, parse_push
from narses.rpc.digest import hasher
from narses.rpc.intake import INLINE_BYTES, Intake
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses_adversary.craft import Row
from narses_adversary.hold import Hold, Traffic
from narses_adversary.session import FRAME_OVERHEAD, Budget


class Intercepted:
    """One update on its way through: its header and trailer as they came, its payload in a row."""

    def __init__(self, hold: Hold, header: pb.UpdateHeader, raw: bytes, traffic: Traffic) -> None:
        self.hold = hold
        self.header = header
        self.row_D = np.empty(traffic.task.dimension, np.float32)
        self.intake = Intake(self.row_D, traffic.task.digest)
        self.raw_header = raw
        self.raw_trailer = b""
        self.completed = 0.0

    def so_far(self, chunk_bytes: int) -> Iterator[bytes]:
        """What has come, as frames."""
        yield self.raw_header
        payload = self.row_D.view(np.uint8).data[: self.intake.received]
        for at in range(0, len(payload), chunk_bytes):
            yield chunk_frame(payload[at : at + chunk_bytes])
        if self.raw_trailer:
            yield self.raw_trailer

    def rewritten(self, row_D: Row, chunk_bytes: int, algorithm: str) -> Iterator[bytes]:
        """The update with another payload: same header, new digest. A signature is lost: we have no worker's key."""
        state = hasher(algorithm)
        payload = row_D.view(np.uint8).data
        yield self.raw_header
        for at in range(0, len(payload), chunk_bytes):
            piece = payload[at : at + chunk_bytes]
            state.update(piece)
            yield chunk_frame(piece)
        yield pb.PushRequest(trailer=pb.UpdateTrailer(digest=state.digest())).SerializeToString()


class Forwarder:
    """Downstream frames to the upstream call.

    read_all() and write_all() run beside each other. `call` is the upstream call, opened when there is something to say: a
    server cuts a stream that is silent for as long as a hold may last.
    """

    def __init__(
        self, traffic: Traffic, workers: frozenset[int], budget: Budget, connect: Callable[[], Any], metrics: Metrics
    ) -> None:
        self.call: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.rewritten: set[tuple[int, int]] = set()  # (worker, round)
        self._traffic = traffic
        self._workers = workers
        self._budget = budget
        self._connect = connect
        self._metrics = metrics
        self._queue: deque[tuple[bytes | Intercepted, int]] = deque()  # and what it takes of the budget
        self._taken = 0
        self._queued = asyncio.Event()
        self._writing = False
        self._over = False
        self._current: Intercepted | None = None
        if not traffic.holding:
            self.connect()

    def connect(self) -> Any:
        """The upstream call, opened at the first need."""
        if not self.call.done():
            self.call.set_result(self._connect())
        return self.call.result()

    async def read_all(self, read: Any) -> None:
        """Until the client has sent its last frame."""
        try:
            while (frame := await read()) is not grpc.aio.EOF:
                await self._take(frame)
            await self._flush()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # upstream has ended: its status says why
        self._end()

    async def write_all(self) -> None:
        """Write what is queued, each update when its hold is decided, until the last; then half-close."""
        try:
            while self._queue or not self._over:
                if not self._queue:
                    self._queued.clear()
                    await self._queued.wait()
                    continue
                item, _ = self._queue[0]
                if isinstance(item, Intercepted):
                    await item.hold.decided.wait()  # at half of the deadline at the latest: Traffic sees to that
                    await self._release(item)
                else:
                    await self._write(item)
                self._give(self._queue.popleft()[1])
            await self.connect().done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # upstream has ended: its status says why

    def hang_up(self) -> bool:
        """The client is gone. Whether updates remain that it had completed: the server would have them but for the hold.

        What came after the last of them is dropped, as a server drops it.
        """
        self._current = None
        while self._queue and not isinstance(self._queue[-1][0], Intercepted):
            self._give(self._queue.pop()[1])
        self._end()
        return bool(self._queue)

    def close(self) -> None:
        """Give up on whatever is still queued."""
        self._queue.clear()
        self._give(self._taken)

    # -- reading ---------------------------------------------------------------------------------------------------------

    async def _take(self, frame: bytes) -> None:
        """Read just enough to know whether this update is to be held. What looks odd is passed on: the server will judge."""
        try:
            message = parse_push(frame)
        except DecodeError:
            await self._flush(frame)
            return
        current = self._current
        if isinstance(message, memoryview):
            self._metrics.inc("narses_proxy_received_bytes_total", len(message), direction="upstream")
            if current is None or not current.intake.fits(message):
                await self._flush(frame)
            elif len(message) <= INLINE_BYTES:
                current.intake.absorb(message)
            else:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._traffic.executor, current.intake.absorb, message)
        elif message.WhichOneof("frame") == "header" and current is None:
            await self._begin(message.header, frame)
        elif message.WhichOneof("frame") == "trailer" and current is not None and current.intake.complete:
            await self._complete(current, message.trailer, frame)
        elif message.WhichOneof("frame") == "update" and current is None:
            await self._whole(message.update, frame)
        else:
            await self._flush(frame)

    async def _whole(self, update: pb.Update, frame: bytes) -> None:
        """An update in one frame; to be held, it is taken as the three frames that it stands for."""
        if self._traffic.hold(update.header) is None:
            await self._untouched(frame)
            return
        await self._take(pb.PushRequest(header=update.header).SerializeToString())
        await self._take(chunk_frame(update.payload))
        await self._take(pb.PushRequest(trailer=update.trailer).SerializeToString())

    async def _begin(self, header: pb.UpdateHeader, frame: bytes) -> None:
        hold, task = self._traffic.hold(header), self._traffic.task
        mine = header.run_id == task.run_id and header.worker in self._workers
        if hold is None or not mine:
            await self._untouched(frame)
        elif (header.base_digest, header.dtype, header.byte_length) != (
            hold.header.digest,
            pb.DATA_TYPE_FLOAT32,
            task.dimension * 4,
        ):
            self._traffic.saw(hold, header.worker, None)
            await self._untouched(frame)
        else:
            await self._budget_for(task.dimension * 4 + len(frame))
            self._current = Intercepted(hold, header, frame, self._traffic)

    async def _complete(self, update: Intercepted, trailer: pb.UpdateTrailer, frame: bytes) -> None:
        sound = update.intake.finite and update.intake.digest() == trailer.digest
        await self._budget_for(len(frame))
        update.raw_trailer = frame
        update.completed = asyncio.get_running_loop().time()
        self._traffic.saw(update.hold, update.header.worker, update.row_D if sound else None)
        self._current = None
        self._put(update, update.row_D.nbytes + len(update.raw_header) + len(frame) + 2 * FRAME_OVERHEAD)

    async def _flush(self, frame: bytes | None = None) -> None:
        """Give up on the update in hand, if any: pass on what has come of it, then `frame`."""
        update, self._current = self._current, None
        if update is not None:
            self._traffic.saw(update.hold, update.header.worker, None)
            self._give(update.row_D.nbytes + len(update.raw_header) + FRAME_OVERHEAD)
            self._metrics.inc("narses_proxy_messages_total", rpc="push", action="forwarded")
            for held in update.so_far(self._traffic.task.chunk_bytes):
                await self._pass(held)
        if frame is not None:
            await self._pass(frame)

    async def _untouched(self, frame: bytes) -> None:
        self._metrics.inc("narses_proxy_messages_total", rpc="push", action="forwarded")
        await self._pass(frame)

    async def _pass(self, frame: bytes) -> None:
        """Send on as it came, in order: at once (so the client feels the server's back-pressure), or behind what is held."""
        if self._queue:
            await self._budget_for(len(frame))
            self._put(frame, len(frame) + FRAME_OVERHEAD)
        else:
            await self._write(frame)

    async def _budget_for(self, size: int) -> None:
        await self._budget.take(size + FRAME_OVERHEAD)
        self._taken += size + FRAME_OVERHEAD

    def _give(self, size: int) -> None:
        self._taken -= size
        self._budget.give(size)

    def _put(self, item: bytes | Intercepted, size: int) -> None:
        self._queue.append((item, size))
        self._queued.set()

    def _end(self) -> None:
        self._over = True
        self._queued.set()

    # -- writing ---------------------------------------------------------------------------------------------------------

    async def _release(self, update: Intercepted) -> None:
        task, header = self._traffic.task, update.header
        held = asyncio.get_running_loop().time() - update.completed
        self._metrics.observe("narses_proxy_injected_delay_seconds", held)
        row_D = update.hold.replacement(header.worker)
        if row_D is None:
            frames, action = update.so_far(task.chunk_bytes), "forwarded"
        else:
            self.rewritten.add((header.worker, header.round))
            frames, action = update.rewritten(row_D, task.chunk_bytes, task.digest), "rewritten"
        self._metrics.inc("narses_proxy_messages_total", rpc="push", action=action)
        for frame in frames:
            await self._write(frame)

    async def _write(self, frame: bytes) -> None:
        await self.connect().write(frame)
        payload = chunk_of(frame)
        if payload is not None:
            self._metrics.inc("narses_proxy_sent_bytes_total", len(payload), direction="upstream")
