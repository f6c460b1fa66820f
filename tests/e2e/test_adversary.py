"""narses-adversary as its user meets it: the console script, in processes of their own."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

BIN = Path(sys.executable).parent
SAMPLES = Path(__file__).parents[2] / "deploy" / "config"
SECONDS = 60.0

Process = subprocess.Popen[str]


def start(folder: Path, program: str, *arguments: str) -> Process:
    return subprocess.Popen(
        [str(BIN / program), *arguments], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: Process) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) when it has ended by itself."""
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on at the moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def events(err: str) -> list[dict[str, Any]]:
    """A daemon's log in JSON, where every line is an object."""
    return [json.loads(line) for line in err.splitlines()]


def test_help_check_and_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('insecure = true\nworkers = "0-1"\n[attack]\nname = "alei"\n')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = "{}:{}".format(*taken.getsockname())
        cases: list[tuple[list[str], int, list[str]]] = [
            (["proxy", "--help"], 0, ["--config", "--check", "--set", "rewrite"]),
            (["worker", "--config", str(SAMPLES / "adversary.toml"), "--check"], 0, ["ok", "workers 10, 11", "alie"]),
            (["worker", "--config", "bad.toml"], 2, ["error: ", "bad.toml", "alei", "alie"]),
            (["proxy", "--set", "insecure=true", "--set", f"listen={address}"], 2, ["error: ", address]),
        ]
        processes = [start(tmp_path, "narses-adversary", *arguments) for arguments, _, _ in cases]
        for process, (arguments, code, words) in zip(processes, cases, strict=True):
            got, out, err = end(process)
            assert got == code, (arguments, out, err)
            text = err if code else out
            assert not [word for word in words if word not in text], (arguments, text)
            if code:
                complaint = [line for line in err.splitlines() if line.startswith("error: ")]
                assert len(complaint) == 1
                assert "Traceback" not in err


def test_a_run_with_an_adversary_and_a_proxy_ends_well_in_every_process(tmp_path: Path) -> None:
    server_port, proxy_port = free_ports(2)
    server, proxy = f"127.0.0.1:{server_port}", f"127.0.0.1:{proxy_port}"
    common = ["--set", "insecure=true", "--set", "log.format=json"]
    daemon = [*common, "--set", "device=cpu", "--set", "connect_timeout=10.0"]
    (tmp_path / "server.toml").write_text(
        f"""
        listen = "{server}"
        output = "runs"
        [task]
        dataset = "digits"
        model = "softmax"
        batch = 16
        [round]
        n = 6
        f = 2
        rounds = 5
        [optimizer]
        learning_rate = 0.5
        [[runs]]
        name = "clean"
        [[runs]]
        name = "ipm"
        [[runs]]
        name = "alie"
        """
    )
    (tmp_path / "proxy.toml").write_text(
        '[[schedule]]\nruns = "ipm"\nattack = { name = "ipm", epsilon = 5.0, f_real = 2 }\n'
    )
    (tmp_path / "adversary.toml").write_text('[[schedule]]\nruns = "alie"\nattack = { name = "alie", z = 1.5 }\n')
    man = start(
        tmp_path,
        *("narses-adversary", "proxy", "--config", "proxy.toml", *common),
        *("--set", f"listen={proxy}", "--set", f"server={server}"),
    )
    others = [
        start(tmp_path, "narses-server", "--config", "server.toml", *common),
        start(tmp_path, "narses-worker", *daemon, "--set", f"server={proxy}", "--set", 'workers="0-3"'),
        start(
            tmp_path,
            *("narses-adversary", "worker", "--config", "adversary.toml", *daemon),
            *("--set", f"server={server}", "--set", 'workers="4-5"'),
        ),
    ]
    try:
        ended = [end(process) for process in others]
        man.send_signal(signal.SIGTERM)
        ended.append(end(man))
    finally:
        for process in (*others, man):
            process.kill()
            process.wait()
    assert [code for code, _, _ in ended] == [0, 0, 0, 0], [err[-3000:] for code, _, err in ended if code]
    log = {name: events(err) for name, (_, _, err) in zip(("server", "worker", "liar", "man"), ended, strict=True)}
    finished = [line for line in log["server"] if line["event"] == "run finished"]
    assert [(line["run"], line["outcome"], line["rounds"]) for line in finished] == [
        ("clean", "completed", 5),
        ("ipm", "completed", 5),
        ("alie", "completed", 5),
    ]
    assert len({line["digest"] for line in finished}) == 3
    for name, run, attack, knows in (("man", "ipm", "ipm", "intercepted"), ("liar", "alie", "alie", "own")):
        said = [line for line in log[name] if line["event"] == "attack"]
        assert [(line["run"], line["attack"], line["knows"]) for line in said] == [(run, attack, knows)]
    assert not [line for lines in log.values() for line in lines if line["level"] == "error"]
    assert log["man"][-1]["event"] == "stopped"
