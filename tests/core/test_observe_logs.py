from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from narses.errors import ConfigError
from narses.observe.logs import TRACEBACK_LIMIT, VALUE_LIMIT, clip, configure


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    structlog.reset_defaults()


@given(st.one_of(st.text(max_size=300), st.binary(max_size=300)), st.integers(1, 150))
def test_clip_is_bounded_and_printable(text: str | bytes, limit: int) -> None:
    clipped = clip(text, limit)

    assert len(clipped) <= limit
    assert clipped.isprintable()


@given(st.text(max_size=20), st.text(max_size=20))
def test_clip_keeps_different_texts_apart(one: str, other: str) -> None:
    assert (clip(one, 1000) == clip(other, 1000)) == (one == other)


def test_clip_shows_what_it_did() -> None:
    assert clip("plain, ärgerlich") == "plain, ärgerlich"
    assert clip("a\n2026 [error] forged\x1b[2J\u202e") == r"a\n2026 [error] forged\x1b[2J\u202e"
    assert clip("x" * 121) == "x" * 119 + "…"
    assert clip(b"\xff\n") == r"\\xff\n"


def test_json_is_one_object_per_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json", "info")

    structlog.get_logger().info("round closed", round=3, why="all\nhere")
    structlog.get_logger().debug("not at this level")
    try:
        raise ValueError("peer said \x1b[2J")
    except ValueError:
        structlog.get_logger().exception("failed")

    out, err = capsys.readouterr()
    assert out == ""
    closed, failed = map(json.loads, err.splitlines())
    assert closed["event"] == "round closed"
    assert (closed["round"], closed["why"], closed["level"]) == (3, r"all\nhere", "info")
    assert closed["timestamp"].endswith("Z")
    assert "ValueError: peer said \\x1b[2J" in failed["exception"]
    assert failed["exception"].count("\n") >= 3


def test_console_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    configure("console", "warning")

    structlog.get_logger().warning("refused", message="x\n2026-01-01 [error] forged\x1b[2J", long="y" * 10_000)

    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err
    assert len(err) < VALUE_LIMIT + 500


@pytest.mark.parametrize("format_", ["json", "console"])
def test_a_traceback_is_bounded_and_shows_no_local_variables(format_, capsys) -> None:  # type: ignore[no-untyped-def]
    configure(format_, "info")
    secret = "hun" + "ter2"
    try:
        raise RuntimeError("z" * 100_000)
    except RuntimeError:
        structlog.get_logger().exception("failed")

    err = capsys.readouterr().err
    assert secret not in err
    assert TRACEBACK_LIMIT // 2 < len(err) < TRACEBACK_LIMIT + 500


def test_loggers_of_the_standard_library_join(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json", "info")

    try:
        raise KeyError("k\x1b")
    except KeyError:
        logging.getLogger("grpc._cython.cygrpc").exception("from %s\n", "grpc")
    logging.getLogger("asyncio").info("chatter")

    [line] = capsys.readouterr().err.splitlines()
    event = json.loads(line)
    assert (event["event"], event["level"], event["logger"]) == (r"from grpc\n", "error", "grpc._cython.cygrpc")
    assert "KeyError: 'k\\x1b'" in event["exception"]


def test_configuring_twice_does_not_log_twice(capsys: pytest.CaptureFixture[str]) -> None:
    configure("json", "info")
    configure("json", "debug")

    logging.getLogger("grpc").warning("once")
    structlog.get_logger().debug("once")

    assert len(capsys.readouterr().err.splitlines()) == 2


def test_wrong_settings_are_told() -> None:
    with pytest.raises(ConfigError, match="log format 'xml': expected one of console, json"):
        configure("xml")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="log level 'loud': expected one of debug, info, warning, error"):
        configure("json", "loud")  # type: ignore[arg-type]
