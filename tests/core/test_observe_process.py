from __future__ import annotations

import signal
import subprocess
import sys

import pytest

import narses
from narses.errors import ConfigError
from narses.observe.catalogue import CATALOGUE
from narses.observe.process import address, build_info, is_loopback

# The package's own __init__ imports torch, which takes seconds per process; a bare package in its place does not.
DAEMON = """
import asyncio, sys, types
package = types.ModuleType("narses")
package.__path__ = {path!r}
sys.modules["narses"] = package
from narses.observe.process import stop_event

async def main():
    event = await stop_event()
    print("ready", flush=True)
    await event.wait()
    print("stopping", flush=True)
    {then}

asyncio.run(main())
"""


def daemon(then: str) -> subprocess.Popen[str]:
    code = DAEMON.format(then=then, path=list(narses.__path__))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_for_an_orderly_end(number: signal.Signals) -> None:
    with daemon("print('done', flush=True)") as process:
        process.send_signal(number)
        out, _ = process.communicate(timeout=30)

    assert (out, process.returncode) == ("stopping\ndone\n", 0)


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [(signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGTERM, signal.SIGINT, 130), (signal.SIGINT, signal.SIGINT, 130)],
)
@pytest.mark.parametrize("hang", ["await asyncio.Event().wait()", "import time; time.sleep(60)"], ids=["idle", "busy"])
def test_the_second_signal_ends_at_once(first: signal.Signals, second: signal.Signals, code: int, hang: str) -> None:
    with daemon(hang) as process:
        process.send_signal(first)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopping\n"
        process.send_signal(second)
        process.communicate(timeout=30)

    assert process.returncode == code


def test_build_info_has_the_labels_of_its_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    [labels] = [metric.labels for metric in CATALOGUE if metric.name == "narses_build_info"]
    monkeypatch.setenv("NARSES_REVISION", "0123abc")

    info = build_info()

    assert info.keys() == labels.keys()
    assert info["revision"] == "0123abc"
    assert info["python"] == ".".join(map(str, sys.version_info[:3]))
    assert info["version"][0].isdigit()
    assert info["torch"][0].isdigit()

    monkeypatch.delenv("NARSES_REVISION")
    assert build_info()["revision"]


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("127.0.0.1:50051", ("127.0.0.1", 50051)),
        ("localhost:0", ("localhost", 0)),
        ("narses-server.default.svc:65535", ("narses-server.default.svc", 65535)),
        ("[::1]:8080", ("::1", 8080)),
        ("[::]:8080", ("::", 8080)),
    ],
)
def test_addresses(text: str, parsed: tuple[str, int]) -> None:
    assert address(text) == parsed


WRONG_ADDRESSES = [
    *("", ":", "localhost", ":80", "host:", "host:http", "host:-1", "host:65536", "host:+1", "host: 1", "h:1_0", "h:²"),
    *("::1:80", "[::1]", "[::1]:", "[host]:1", "[]:1", "unix:/tmp/s:1", "http://h:1", "h h:1", "h\n:1"),
    *("h:" + "9" * 5000, "h:0000099999"),
]


@pytest.mark.parametrize("text", WRONG_ADDRESSES, ids=range(len(WRONG_ADDRESSES)))
def test_wrong_addresses_are_told(text: str) -> None:
    with pytest.raises(ConfigError, match="expected host:port"):
        address(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1", "localhost", "LOCALHOST"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "::ffff:10.0.0.1", "localhost.example.com", "127.0.0.1.nip.io", "127.1", ""]
)
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)
