"""The real console scripts as processes of their own: to the end, killed and restarted, told to stop, started wrongly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECONDS = 60.0
QUIET = ["--set", "metrics.listen=", "--set", "health.listen=", "--set", "log.format=json"]
Event = dict[str, Any]


class Program:
    """A running console script; its log is read as it comes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.events: list[Event] = []
        self.text = ""
        self._news = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for raw in self.process.stderr:
            line = raw.decode()
            self.text += line
            with contextlib.suppress(json.JSONDecodeError):
                self.events.append(json.loads(line))
            self._news.set()

    async def event(self, what: str, such: Callable[[Event], bool] = lambda event: True) -> Event:
        """The first event of this name and kind, waited for."""
        try:
            async with asyncio.timeout(SECONDS):
                while True:
                    for event in self.events:
                        if event.get("event") == what and such(event):
                            return event
                    assert not self._reading.done(), f"it ended before {what!r}:\n{self.text}"
                    self._news.clear()
                    news = asyncio.create_task(self._news.wait())
                    await asyncio.wait((news, self._reading), return_when=asyncio.FIRST_COMPLETED)
                    news.cancel()
        except TimeoutError:
            raise AssertionError(f"waited {SECONDS:.0f} s for {what!r}:\n{self.text}") from None

    async def ends(self) -> int:
        """The exit code; nothing that a user can cause shows a traceback."""
        async with asyncio.timeout(SECONDS):
            code = await self.process.wait()
            await self._reading
        assert "Traceback" not in self.text, self.text
        return code


@contextlib.asynccontextmanager
async def console() -> AsyncIterator[Callable[..., Any]]:
    """Starts programs; whatever still runs at the end is killed."""
    running: list[Program] = []

    async def start(name: str, *arguments: str) -> Program:
        process = await asyncio.create_subprocess_exec(
            BIN / name, *arguments, cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
        )
        running.append(Program(process))
        return running[-1]

    try:
        yield start
    finally:
        for program in running:
            with contextlib.suppress(ProcessLookupError):
                program.process.kill()
            await program.process.wait()
            await program._reading


def server(output: Path, *sets: str) -> list[str]:
    """The arguments of a server on a free port, from the sample configuration."""
    overrides = ["listen=127.0.0.1:0", f"output={output}", "drain_timeout=2.0", *sets]
    return ["--config", "deploy/config/server.toml", *QUIET, *(item for s in overrides for item in ("--set", s))]


def worker(port: int, workers: str, *sets: str) -> list[str]:
    """The arguments of a worker daemon, from the sample configuration."""
    overrides = [f"server=127.0.0.1:{port}", f"workers={workers}", *sets]
    return ["--config", "deploy/config/worker.toml", *QUIET, *(item for s in overrides for item in ("--set", s))]


async def test_a_worker_killed_with_sigkill_and_restarted_does_not_change_a_bit(tmp_path: Path) -> None:
    """The same experiment twice, on one server and with one set of daemons; in the second run one daemon is killed."""
    runs = 'runs=[{ name = "undisturbed" }, { name = "disturbed" }]'
    async with console() as start:
        played = await start("narses-server", *server(tmp_path, runs, "round.rounds=200", "evaluate.every=50"))
        port = (await played.event("listening"))["port"]
        faithful, mortal = [await start("narses-worker", *worker(port, ids)) for ids in ("0-6", "7-11")]
        await played.event("evaluated", lambda event: event["run"] == "disturbed" and event["round"] == 50)
        mortal.process.send_signal(signal.SIGKILL)
        assert await mortal.process.wait() == -signal.SIGKILL
        restarted = await start("narses-worker", *worker(port, "7-11"))
        assert [await program.ends() for program in (played, faithful, restarted)] == [0, 0, 0], played.text
        joins = [event for event in played.events if event["event"] == "joined" and event["run"] == "disturbed"]
        assert [event["workers"][0] for event in joins].count(7) == 2, "before the kill and after it"
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("undisturbed", "disturbed")]
    assert [summary["outcome"] for summary in summaries] == ["completed", "completed"]
    assert [summary["rounds"] for summary in summaries] == [200, 200]
    assert summaries[0]["digest"] == summaries[1]["digest"]
    assert summaries[0]["accuracy"] == summaries[1]["accuracy"]
    assert summaries[0]["final_accuracy"] > 0.8


async def test_sigterm_drains(tmp_path: Path) -> None:
    async with console() as start:
        endless = await start(
            "narses-server", *server(tmp_path, "round.rounds=1000000", "round.n=2", "round.f=0", "round.rule=mean")
        )
        port = (await endless.event("listening"))["port"]
        daemon = await start("narses-worker", *worker(port, "0-1"))
        await endless.event("progress")
        endless.process.terminate()
        assert await endless.ends() == 0
        summary = json.loads((tmp_path / "digits" / "summary.json").read_text())
        assert summary["outcome"] == "drained"
        assert 0 < summary["rounds"] < 1_000_000
        assert summary["final_accuracy"] is not None, "evaluated on the way out"
        await daemon.event("trying again")
        daemon.process.terminate()
        assert await daemon.ends() == 0


async def test_what_goes_wrong_at_the_start_is_one_sentence(tmp_path: Path) -> None:
    """Each in a process of its own, all at once; what needs no process is tested beside each program's configuration."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with console() as start:
            cases: list[tuple[Program, int, list[str]]] = [
                (
                    await start("narses-server", *server(tmp_path, f"listen=127.0.0.1:{port}")),
                    2,
                    [f"listen = 127.0.0.1:{port}", "choose another port"],
                ),
                (
                    await start("narses-worker", *worker(9, "0", "connect_timeout=0.5")),
                    1,
                    ["no server answered at 127.0.0.1:9 for 0.5 s", "check the address and that the server runs"],
                ),
                (
                    await start("narses-worker", *worker(9, "0", "conect_timeout=1")),
                    2,
                    ["unknown key conect_timeout (value 1)"],
                ),
            ]
            for program, code, sentences in cases:
                assert await program.ends() == code, program.text
                errors = [line for line in program.text.splitlines() if line.startswith("error: ")]
                assert len(errors) == 1, program.text
                assert all(sentence in errors[0] for sentence in sentences), errors
