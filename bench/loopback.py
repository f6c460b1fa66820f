"""What loopback gives without Narses: a raw TCP socket, and one unary protobuf message with the default allocator.

`python -m bench.loopback sink | unary-server | unary-client PORT` are the other sides, in processes of their own.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, NamedTuple, Self

import grpc

from bench.programs import cpu_seconds
from bench.result import ROOT
from narses.rpc.v1 import parameter_server_pb2 as pb

WRITE_BYTES = 1 << 20
UNARY_BYTES = 32 << 20
_METHOD = "/bench.Loopback/Push"
_UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Transfer(NamedTuple):
    """Wall seconds, and CPU seconds of both sides together."""

    seconds: float
    cpu: float


class _Child:
    """A helper process that answers each line on stdin with one on stdout."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "bench.loopback", *arguments]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT)
        self.pid = self._process.pid

    def line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def ask(self, text: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        return self.line()

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


class RawTcp:
    """One connection to a process that reads and forgets. The ceiling of anything that uses TCP here."""

    def __init__(self) -> None:
        self._sink = _Child("sink")
        self._socket = socket.create_connection(("127.0.0.1", int(self._sink.line())))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._sink.stop()

    def send(self, payload: memoryview) -> Transfer:
        """Send `payload` in writes of 1 MiB and wait until the other side has it."""
        cpu, begun = time.process_time() + cpu_seconds(self._sink.pid), time.perf_counter()
        self._socket.sendall(len(payload).to_bytes(8, "little"))
        for at in range(0, len(payload), WRITE_BYTES):
            self._socket.sendall(payload[at : at + WRITE_BYTES])
        self._socket.recv(1)
        seconds = time.perf_counter() - begun
        return Transfer(seconds, time.process_time() + cpu_seconds(self._sink.pid) - cpu)


class UnaryProtobuf:
    """The usual way: the tensor as `bytes` in one protobuf message of 32 MiB, one unary call, the default allocator."""

    def __init__(self) -> None:
        self._server = _Child("unary-server")
        self._client = _Child("unary-client", self._server.line().strip())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.stop()
        self._server.stop()

    def send(self, total: int) -> Transfer:
        """Send `total` bytes, one message after another."""
        before = cpu_seconds(self._client.pid) + cpu_seconds(self._server.pid)
        seconds = float(self._client.ask(str(total)))
        return Transfer(seconds, cpu_seconds(self._client.pid) + cpu_seconds(self._server.pid) - before)


def _sink() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
    buffer = memoryview(bytearray(WRITE_BYTES))
    while size := connection.recv(8, socket.MSG_WAITALL):
        left = int.from_bytes(size, "little")
        while left:
            left -= connection.recv_into(buffer[: min(left, WRITE_BYTES)])
        connection.sendall(b"x")


async def _unary_server() -> None:
    async def push(request: pb.PushRequest, _: Any) -> pb.PushResponse:
        return pb.PushResponse(round=len(request.chunk))

    server = grpc.aio.server(options=_UNLIMITED)
    method = grpc.unary_unary_rpc_method_handler(push, pb.PushRequest.FromString, pb.PushResponse.SerializeToString)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Loopback", {"Push": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


async def _unary_client(port: str) -> None:
    payload = bytes(UNARY_BYTES)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=_UNLIMITED) as channel:
        push: Any = channel.unary_unary(_METHOD, pb.PushRequest.SerializeToString, pb.PushResponse.FromString)
        while line := sys.stdin.readline():
            begun = time.perf_counter()
            for _ in range(int(line) // UNARY_BYTES):
                reply = await push(pb.PushRequest(chunk=payload))
                assert reply.round == UNARY_BYTES
            print(time.perf_counter() - begun, flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["sink"]:
            _sink()
        case ["unary-server"]:
            asyncio.run(_unary_server())
        case ["unary-client", port]:
            asyncio.run(_unary_client(port))
        case _:
            sys.exit("usage: python -m bench.loopback sink | unary-server | unary-client PORT")
