"""The daemons as child processes: started together, listened to, and none of them left behind.

A daemon needs seconds to import PyTorch before it looks at its configuration, and an address it is to be told may only
be known later. So each is started at once with `--config /dev/stdin`, and its configuration follows when it is known.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from narses_lab.errors import DaemonError

LINE_BYTES = 1 << 20
LAST_LINES = 12
LINE_CHARACTERS = 400
STOP_SECONDS = 5.0


class Event(NamedTuple):
    """One line of a daemon's log; name "exited" with a code is made up here when a process has ended."""

    daemon: str
    name: str
    fields: dict[str, Any]


class Daemon:
    """One child process. `arguments` starts with a console script of this installation."""

    def __init__(self, name: str, arguments: Sequence[str], folder: Path) -> None:
        self.name = name
        self.arguments = tuple(arguments)
        self.config_file = folder / "config" / f"{name}.toml"
        self.log_file = folder / "logs" / f"{name}.log"
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self._folder = folder
        self._config_pipe = -1
        self._process: asyncio.subprocess.Process | None = None

    @property
    def command(self) -> str:
        """What a person would type, in the output folder, to start this daemon."""
        return shlex.join([*self.arguments, "--config", str(self.config_file.relative_to(self._folder))])

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it in a process group of its own, so that Ctrl-C reaches it through us and only once."""
        script = Path(sys.executable).parent / self.arguments[0]
        reading, self._config_pipe = os.pipe()
        try:
            self._process = await asyncio.create_subprocess_exec(
                script,
                *self.arguments[1:],
                *("--config", "/dev/stdin", "--set", 'log.format="json"'),
                stdin=reading,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                cwd=self._folder,
                limit=LINE_BYTES,
                process_group=0,
            )
        except FileNotFoundError:
            raise DaemonError(f"{script}: there is no such program; install Narses into this environment") from None
        finally:
            os.close(reading)

    async def configure(self, toml: str) -> None:
        """Let it go on with this configuration, which is also written down for the reader."""
        self.config_file.write_text(toml, encoding="utf-8")
        await asyncio.to_thread(self._deliver, toml.encode())

    def _deliver(self, toml: bytes) -> None:
        # in a thread: a pipe holds 64 KiB, and nobody reads it before the imports are done
        pipe, self._config_pipe = self._config_pipe, -1
        try:
            with os.fdopen(pipe, "wb") as file:
                file.write(toml)
        except BrokenPipeError:
            pass  # it has died; that is an event of its own, with its last words

    async def listen(self, events: asyncio.Queue[Event]) -> None:
        """Put every line it logs into `events`, then how it ended."""
        assert self._process is not None
        assert self._process.stderr is not None
        with self.log_file.open("wb") as log:
            while line := await self._process.stderr.readline():
                log.write(line)
                text = line.decode("utf-8", "replace").rstrip()
                self.last_lines.append(text)
                if (fields := _parsed(text)) is not None:
                    events.put_nowait(Event(self.name, fields.pop("event"), fields))
        events.put_nowait(Event(self.name, "exited", {"code": await self._process.wait()}))

    def signal(self, *, kill: bool) -> None:
        """Ask it to stop, or make it. Nothing if it has ended."""
        if self._config_pipe >= 0:
            os.close(self._config_pipe)
            self._config_pipe = -1
        if self._process is not None and self._process.returncode is None:
            if kill:
                self._process.kill()
            else:
                self._process.terminate()


class Fleet:
    """All daemons of one experiment. Leaving the context ends what still runs, whatever the reason for leaving."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._listeners: list[asyncio.Task[None]] = []  # one per daemon, in their order
        self.daemons: dict[str, Daemon] = {}

    async def __aenter__(self) -> Self:
        for name in ("config", "logs"):
            (self._folder / name).mkdir(exist_ok=True)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for daemon in self.daemons.values():
                daemon.signal(kill=False)
            if self._listeners:
                await asyncio.wait(self._listeners, timeout=STOP_SECONDS)
        finally:
            for daemon in self.daemons.values():
                daemon.signal(kill=True)
            if self._listeners:
                await asyncio.wait(self._listeners, timeout=STOP_SECONDS)

    async def start(self, name: str, *arguments: str) -> Daemon:
        """Start the daemon `name`; it waits for its configuration."""
        daemon = self.daemons[name] = Daemon(name, arguments, self._folder)
        await daemon.start()
        self._listeners.append(asyncio.create_task(daemon.listen(self._events)))
        return daemon

    async def next(self, until: float) -> Event:
        """The next event of any daemon; TimeoutError at loop time `until`."""
        async with asyncio.timeout_at(until):
            return await self._events.get()

    async def drain(self, daemon: Daemon) -> None:
        """Ask `daemon` to stop while the others are still there to finish what it waits for; wait for its end."""
        daemon.signal(kill=False)
        listener = self._listeners[list(self.daemons.values()).index(daemon)]
        await asyncio.wait((listener,), timeout=STOP_SECONDS)

    def ended_badly(self, event: Event) -> DaemonError:
        """The error for an "exited" event that should not have come."""
        daemon, code = self.daemons[event.daemon], event.fields["code"]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return DaemonError(f"{daemon.command}\n{how} before its time. {self._last_lines(daemon)}")

    def stuck(self, why: str) -> DaemonError:
        """The error for a fleet that makes no progress."""
        running = [daemon for daemon in self.daemons.values() if daemon.running]
        return DaemonError("\n".join([why, *(self._last_lines(daemon, 3) for daemon in running)]))

    def _last_lines(self, daemon: Daemon, count: int = LAST_LINES) -> str:
        lines = "".join(f"\n  {line[:LINE_CHARACTERS]}" for line in list(daemon.last_lines)[-count:])
        return f"The last lines of {daemon.log_file}:{lines or ' it said nothing'}"


def _parsed(text: str) -> dict[str, Any] | None:
    """The log line as a table, None for anything else."""
    try:
        fields = json.loads(text)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and isinstance(fields.get("event"), str) else None
