"""worker.toml and the program's command line: every mistake in one sentence, and exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narses.errors import ConfigError
from narses_worker import app
from narses_worker.config import WorkerConfig, parse_ids

LEGAL: dict[str, Any] = {"server": "127.0.0.1:50051", "insecure": True, "workers": [0, 1]}


def test_the_smallest_configuration() -> None:
    config = WorkerConfig.of(LEGAL)
    assert config.workers == (0, 1)
    assert (config.device, config.data_dir, config.metrics.listen) == ("auto", None, "")
    assert WorkerConfig.of({**LEGAL, "data_dir": "data"}).data_dir == Path("data")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("0", (0,)),
        ("0-5,8", (0, 1, 2, 3, 4, 5, 8)),
        ("3, 1 ,2", (1, 2, 3)),
        ("7-7", (7,)),
        ([5, 2], (2, 5)),
        ((1,), (1,)),
        (4, (4,)),
        ("4095", (4095,)),
    ],
)
def test_ids(text: Any, ids: tuple[int, ...]) -> None:
    assert parse_ids(text) == WorkerConfig.of({**LEGAL, "workers": text}).workers == ids


@given(st.sets(st.integers(0, 4095), min_size=1, max_size=50))
def test_ids_as_ranges_and_as_a_list_are_the_same(ids: set[int]) -> None:
    ordered = sorted(ids)
    assert parse_ids(",".join(map(str, ordered))) == parse_ids(ordered) == tuple(ordered)
    runs, first = [], ordered[0]
    for here, following in zip(ordered, [*ordered[1:], None], strict=True):
        if following != here + 1:
            runs.append(f"{first}-{here}")
            first = following if following is not None else 0
    assert parse_ids(",".join(runs)) == tuple(ordered)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("", "expected worker ids such as"),
        ("a", "'a': expected worker ids such as"),
        ("1-", "expected worker ids such as"),
        ("-1", "expected worker ids such as"),
        ("5-2", "'5-2': expected worker ids such as"),
        ("1,,2", "expected worker ids such as"),
        ("0-99999999999", "at most 4096 workers"),
        ("1,1", "an id is there twice"),
        ("0-3,2", "an id is there twice"),
        ([], "expected one or more ids"),
        ([-1], "expected one or more ids from 0 to 4095"),
        ([4096], "expected one or more ids from 0 to 4095"),
        ([2**32], "expected one or more ids from 0 to 4095"),
        ([0, 0], "an id is there twice"),
        ([0.5], "workers.0 = 0.5"),
        (["0"], "workers.0 = '0'"),
        ([True], "workers.0 = True"),
        (None, "workers = None"),
        ({"0": 1}, "workers = "),
    ],
)
def test_ids_that_are_none(value: Any, complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        WorkerConfig.of({**LEGAL, "workers": value}, "worker.toml")
    assert str(error.value).startswith("worker.toml: workers")
    assert complaint in str(error.value)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no workers": ({"workers": ...}, "workers is required"),
    "an unknown key": ({"serverr": "a:1"}, "unknown key serverr (value 'a:1')"),
    "an unknown key in a section": ({"metrics": {"port": 1}}, "unknown key metrics.port (value 1)"),
    "a wrong type": ({"threads": "two"}, "threads = 'two'"),
    "no thread": ({"threads": 0}, "threads = 0"),
    "another device": ({"device": "tpu"}, "device = 'tpu': input should be 'auto', 'cpu' or 'cuda'"),
    "plaintext by accident": ({"insecure": False}, "set insecure = true"),
    "plaintext to another machine": ({"server": "10.0.0.1:1"}, "set insecure_remote = true"),
    "plaintext to a name": ({"server": "trainer:1"}, "set insecure_remote = true"),
    "no port": ({"server": "127.0.0.1"}, "address '127.0.0.1': expected host:port"),
    "port 0": ({"server": "127.0.0.1:0"}, "port 0 is no address to connect to"),
    "a port that cannot be": ({"server": "127.0.0.1:99999"}, "expected host:port with a port of 0 to 65535"),
    "a metrics address that is none": ({"metrics": {"listen": "9100"}}, "address '9100': expected host:port"),
    "a timeout of 0": ({"connect_timeout": 0.0}, "connect_timeout = 0.0: input should be greater than 0"),
    "a timeout for ever": ({"session_timeout": float("inf")}, "session_timeout = inf"),
    "another log format": ({"log": {"format": "xml"}}, "log.format = 'xml'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake(case: str) -> None:
    changes, sentence = MISTAKES[case]
    tree = {key: value for key, value in {**LEGAL, **changes}.items() if value is not ...}
    with pytest.raises(ConfigError) as error:
        WorkerConfig.of(tree, "worker.toml")
    assert sentence in str(error.value)
    assert str(error.value).startswith("worker.toml: ")
    assert "\n" not in str(error.value)


def test_another_machine_may_be_accepted() -> None:
    assert WorkerConfig.of({**LEGAL, "server": "[2001:db8::1]:50051", "insecure_remote": True}).insecure_remote


def _main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["narses-worker", *arguments])
    with pytest.raises(SystemExit) as end:
        app.main()
    return int(end.value.code or 0)


def test_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(monkeypatch, "--check", "--set", "workers=0-2", "--set", "insecure=true") == 0
    assert capsys.readouterr() == ("ok: workers 0, 1, 2 for 127.0.0.1:50051\n", "")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--check"], "error: command line: workers is required"),
        (["--set", "workers=0", "--set", "insecure=true", "--set", "devise=cpu"], "unknown key devise (value 'cpu')"),
        (["--set", "workers=0-a"], "'0-a': expected worker ids"),
        (["--set", "workers"], "--set workers: expected section.key=value"),
        (["--config", "absent.toml"], "absent.toml: no such configuration file"),
    ],
)
def test_a_mistake_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert _main(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
