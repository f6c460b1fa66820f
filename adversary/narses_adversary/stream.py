"""One Push stream through the proxy: everything is read at once, held updates wait, nothing is reordered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np

from narses.observe.metrics import Metrics
from narses.rpc.codec import DecodeError, chunk_frame, parse_push
from narses.rpc.digest import hasher
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses_adversary.craft import Row
from narses_adversary.hold import Hold, Traffic, replacement


class Intercepted:
    """One update on its way through: its header as it came, its payload, its trailer once it is complete."""

    def __init__(self, hold: Hold, header: pb.UpdateHeader, raw: bytes, dimension: int) -> None:
        self.hold = hold
        self.header = header
        self.raw_header = raw
        self.raw_trailer = b""
        self.row_D = np.empty(dimension, np.float32)
        self.received = 0

    def fits(self, chunk: memoryview) -> bool:
        return self.received + len(chunk) <= self.row_D.nbytes

    def absorb(self, chunk: memoryview) -> None:
        self.row_D.view(np.uint8)[self.received : self.received + len(chunk)] = np.frombuffer(chunk, np.uint8)
        self.received += len(chunk)

    def so_far(self, chunk_bytes: int) -> Iterator[bytes]:
        """What has come, as frames."""
        yield self.raw_header
        payload = self.row_D.view(np.uint8).data[: self.received]
        for at in range(0, len(payload), chunk_bytes):
            yield chunk_frame(payload[at : at + chunk_bytes])
        if self.raw_trailer:
            yield self.raw_trailer


class Forwarder:
    """Downstream frames to the upstream call. A held update is written once its hold is decided; later ones queue behind it."""

    def __init__(self, traffic: Traffic, workers: frozenset[int], upstream: Any, metrics: Metrics) -> None:
        self._traffic = traffic
        self._workers = workers
        self._upstream = upstream
        self._metrics = metrics
        self._queue: asyncio.Queue[bytes | Intercepted | None] = asyncio.Queue()
        self._pending = 0  # queued and not yet written
        self._current: Intercepted | None = None
        self.rewritten: set[tuple[int, int]] = set()  # (worker, round)

    async def run(self, read: Any) -> None:
        """Until the client has sent its last frame and everything has been written upstream."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._write_all())
            while (frame := await read()) is not grpc.aio.EOF:
                self._metrics.inc("narses_proxy_received_bytes_total", len(frame), direction="downstream")
                await self._take(frame)
            await self._flush()
            self._queue.put_nowait(None)

    async def _take(self, frame: bytes) -> None:
        """Read just enough to know whether this update is to be held. What looks odd is passed on: the server will judge."""
        try:
            message = parse_push(frame)
        except DecodeError:
            await self._flush(frame)
            return
        current = self._current
        if isinstance(message, memoryview):
            if current is None or not current.fits(message):
                await self._flush(frame)
            else:
                current.absorb(message)
        elif message.WhichOneof("frame") == "header" and current is None:
            await self._begin(message.header, frame)
        elif message.WhichOneof("frame") == "trailer" and current is not None:
            self._complete(current, frame)
        else:
            await self._flush(frame)

    async def _begin(self, header: pb.UpdateHeader, frame: bytes) -> None:
        hold = self._traffic.hold(header.round) if header.run_id == self._traffic.task.run_id else None
        honest_size = header.byte_length == self._traffic.task.dimension * 4
        if hold is None or not honest_size or header.worker not in self._workers or header.worker in hold.seen:
            self._metrics.inc("narses_proxy_messages_total", rpc="push", action="forwarded")
            await self._pass(frame)
        else:
            self._current = Intercepted(hold, header, frame, self._traffic.task.dimension)

    def _complete(self, update: Intercepted, frame: bytes) -> None:
        update.raw_trailer = frame
        if update.received == update.row_D.nbytes:
            self._traffic.saw(update.hold, update.header.worker, update.row_D)
        self._queue.put_nowait(update)
        self._pending += 1
        self._current = None

    async def _flush(self, frame: bytes | None = None) -> None:
        """Give up on the update in hand, if any: pass on what has come of it, then `frame`."""
        if self._current is not None:
            for held in self._current.so_far(self._traffic.task.chunk_bytes):
                await self._pass(held)
            self._current = None
        if frame is not None:
            await self._pass(frame)

    async def _pass(self, frame: bytes) -> None:
        """Send on as it came, in order: at once (so the client feels the server's back-pressure), or behind what is held."""
        if self._pending:
            self._queue.put_nowait(frame)
            self._pending += 1
        else:
            await self._write(frame)

    async def _write_all(self) -> None:
        while (item := await self._queue.get()) is not None:
            if isinstance(item, bytes):
                await self._write(item)
            else:
                await self._release(item)
            self._pending -= 1
        await self._upstream.done_writing()

    async def _release(self, update: Intercepted) -> None:
        await update.hold.decided.wait()  # at the latest at half of the deadline: Traffic sees to that
        task, header = self._traffic.task, update.header
        row_D = replacement(update.hold, header.worker)
        if row_D is None:
            frames = update.so_far(task.chunk_bytes)
        else:
            self.rewritten.add((header.worker, header.round))
            frames = rewritten_frames(update, row_D, task.chunk_bytes, task.digest)
        action = "forwarded" if row_D is None else "rewritten"
        self._metrics.inc("narses_proxy_messages_total", rpc="push", action=action)
        for frame in frames:
            await self._write(frame)

    async def _write(self, frame: bytes) -> None:
        await self._upstream.write(frame)
        self._metrics.inc("narses_proxy_sent_bytes_total", len(frame), direction="upstream")


def rewritten_frames(update: Intercepted, row_D: Row, chunk_bytes: int, algorithm: str) -> Iterator[bytes]:
    """The update with another payload: same header, new digest. A signature is lost: the proxy has no worker's key."""
    state = hasher(algorithm)
    payload = row_D.view(np.uint8).data
    yield update.raw_header
    for at in range(0, len(payload), chunk_bytes):
        piece = payload[at : at + chunk_bytes]
        state.update(piece)
        yield chunk_frame(piece)
    yield pb.PushRequest(trailer=pb.UpdateTrailer(digest=state.digest())).SerializeToString()
