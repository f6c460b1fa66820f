"""The programs under measurement, started as users start them; their JSON logs, memory and CPU time from outside."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.result import ROOT

START_SECONDS = 120.0
STOP_SECONDS = 15.0
GRACE_SECONDS = 5.0


def console(module: str, config: Path, *sets: str) -> list[str]:
    """The command line of a console script, without depending on where it is installed."""
    script = [sys.executable, "-c", f"from {module}.app import main; main()", "--config", str(config)]
    return [*script, *(word for text in sets for word in ("--set", text))]


def cpu_seconds(pid: int) -> float:
    """CPU time, user and system, of all threads of process `pid`, to the nanosecond (clock_getcpuclockid(3))."""
    return time.clock_gettime((~pid << 3) | 2)


def memory_bytes(pid: int, field: str = "VmHWM") -> int:
    """A field of /proc/<pid>/status; VmHWM is the largest resident size so far."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


class Program:
    """One started process.

    `log` holds what it logged, with the moment ("at", monotonic seconds), its CPU seconds ("cpu") and those of its
    `companions` ("companions_cpu") at arrival.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid
        self.log: list[dict[str, Any]] = []
        self.companions: list[Program] = []
        self._news = asyncio.Condition()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, command: list[str]) -> Self:
        """Start `command`, which logs JSON lines on stderr."""
        return cls(await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, cwd=ROOT))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _read(self) -> None:
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"event": line.decode(errors="replace").rstrip(), "level": "unparsed"}
            entry |= {"at": time.monotonic(), "cpu": self.cpu()}
            entry["companions_cpu"] = sum(other.cpu() for other in self.companions)
            async with self._news:
                self.log.append(entry)
                self._news.notify_all()

    def cpu(self) -> float:
        """CPU seconds so far; 0 once it has ended."""
        try:
            return cpu_seconds(self.pid)
        except OSError:
            return 0.0

    async def until(self, event: str, within: float = START_SECONDS, **fields: Any) -> dict[str, Any]:
        """The first log entry `event` with these fields, past or to come.

        RuntimeError if this program or a companion ends first, TimeoutError after `within` seconds.
        """
        found = asyncio.create_task(self._found(event, fields))
        programs = [self, *self.companions]
        try:
            async with asyncio.timeout(within):
                await asyncio.wait({found, *(p._reading for p in programs)}, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait({found}, timeout=GRACE_SECONDS)  # a companion may end well, and first
            if found.done():
                return found.result()
            ended = next(p for p in programs if p._reading.done())
            last = "\n".join(str(entry["event"]) for entry in ended.log[-5:])
            raise RuntimeError(f"a program ended before {event!r} was logged; its last words:\n{last}")
        finally:
            found.cancel()

    async def _found(self, event: str, fields: dict[str, Any]) -> dict[str, Any]:
        def entry() -> dict[str, Any] | None:
            return next((e for e in self.log if e["event"] == event and fields.items() <= e.items()), None)

        async with self._news:
            while (hit := entry()) is None:
                await self._news.wait()
            return hit

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if it does not drain in time."""
        if self._process.returncode is None:
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reading
