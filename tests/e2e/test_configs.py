"""The programs as installed, and the sample configurations as shipped. In this process: an import of torch takes seconds."""

from __future__ import annotations

import shlex
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from narses.config import read_toml
from narses_server.config import ServerConfig
from narses_worker.config import WorkerConfig

ROOT = Path(__file__).parents[2]
SAMPLES = sorted((ROOT / "deploy/config").glob("*.toml"))
PROGRAMS = {script.name: script for script in distribution("narses").entry_points if script.group == "console_scripts"}
COMMANDS = [
    *([name] for name in PROGRAMS),
    ["narses", "demo"],
    ["narses-adversary", "worker"],
    ["narses-adversary", "proxy"],
]


def run(monkeypatch: pytest.MonkeyPatch, *command: str) -> int:
    """What the console script does, up to the exit code."""
    monkeypatch.setattr(sys, "argv", list(command))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        PROGRAMS[command[0]].load()()
    return int(end.value.code or 0)


def test_the_programs() -> None:
    assert set(PROGRAMS) == {"narses", "narses-server", "narses-worker", "narses-adversary"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert run(monkeypatch, *command, "--help") == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: ")
    assert "--help" in out
    assert err == ""


@pytest.mark.parametrize("command", [["narses-server"], ["narses-worker"], *COMMANDS[-2:]], ids=" ".join)
def test_every_daemon_has_the_same_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    run(monkeypatch, *command, "--help")
    out = capsys.readouterr().out
    assert all(option in out for option in ("--config", "--set", "SECTION.KEY=VALUE", "--check"))


@pytest.mark.parametrize("command", [["narses-server"], ["narses-worker"], *COMMANDS[-2:]], ids=" ".join)
def test_an_option_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert run(monkeypatch, *command, "--no-such-option") == 2
    err = capsys.readouterr().err
    assert "No such option" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda path: path.name)
def test_a_sample_is_valid_for_the_command_in_its_first_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sample: Path
) -> None:
    command = shlex.split(sample.read_text().splitlines()[0].removeprefix("#"))
    assert command[-2:] == ["--config", f"deploy/config/{sample.name}"]
    assert run(monkeypatch, *command, "--check") == 0
    out, err = capsys.readouterr()
    assert out.startswith("ok: ")
    assert err == ""
    assert run(monkeypatch, *command, "--check", "--set", "no_such_key=1") == 2
    assert "unknown key no_such_key (value 1)" in capsys.readouterr().err


def test_the_samples_fit_together() -> None:
    """Server, worker and adversary started with them train together; the proxy stands in front of that server."""
    trees: dict[str, dict[str, Any]] = {path.stem: read_toml(path) for path in SAMPLES}
    server = ServerConfig.of(trees["server"])
    workers = WorkerConfig.of(trees["worker"]).workers
    assert {tree["server"] for name, tree in trees.items() if name != "server"} == {server.listen}
    corrupted = WorkerConfig.of({**LEGAL, "workers": trees["adversary"]["workers"]}).workers
    assert sorted((*workers, *corrupted)) == list(range(server.round.n))
    assert len(corrupted) <= server.round.f
    listens = [tree[section]["listen"] for tree in trees.values() for section in ("metrics", "health")]
    listens += [trees["server"]["listen"], trees["proxy"]["listen"]]
    assert len(set(listens)) == len(listens), "they run on one machine"


LEGAL: dict[str, Any] = {"insecure": True}
