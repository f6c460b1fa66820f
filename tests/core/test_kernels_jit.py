from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
import weakref

import pytest
from structlog.testing import capture_logs

from narses.kernels import jit, threads

ADD = """
define void @kernel(ptr %value, i64 %more) {{
  %before = load i64, ptr %value
  %middle = add i64 %before, %more
  %after = add i64 %middle, {}
  store i64 %after, ptr %value
  ret void
}}
"""
ARGUMENTS = (ctypes.c_void_p, ctypes.c_int64)


def adding(number: int) -> jit.Function | None:
    return jit.function(("test", number), lambda: ADD.format(number), ARGUMENTS)


@pytest.fixture
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has compiled nothing yet."""
    monkeypatch.setattr(jit, "_state", jit._State())


@pytest.mark.usefixtures("_fresh")
def test_compiled_once_per_key_and_freed_when_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "_KEPT", 2)
    one = adding(1)
    value = ctypes.c_int64(40)

    assert one is not None
    one(ctypes.addressof(value), 1)
    assert value.value == 42
    assert 0 < one.seconds < 10
    assert adding(1) is one
    two = weakref.ref(adding(2))
    assert adding(1) is one
    adding(3)
    gc.collect()
    assert two() is None, "the one least recently used is forgotten"
    assert adding(1) is one


@pytest.mark.usefixtures("_fresh")
def test_what_does_not_compile_is_logged_once_and_nothing_is_compiled_any_more() -> None:
    assert jit.available()
    with capture_logs() as lines:
        for _ in range(3):
            assert jit.function("broken", lambda: "no IR", ARGUMENTS) is None
            assert not jit.available()
            assert adding(1) is None

    assert [line["log_level"] for line in lines] == ["warning"]
    assert "parsing error" in lines[0]["reason"]


@pytest.mark.usefixtures("_fresh")
def test_a_missing_compiler_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    with capture_logs() as lines:
        for _ in range(3):
            assert not jit.available()
            assert adding(1) is None

    assert [line["log_level"] for line in lines] == ["warning"]
    assert "llvmlite" in lines[0]["reason"]


def test_refused_for_a_while() -> None:
    assert jit.available()
    with jit.refused():
        assert not jit.available()
        assert adding(1) is None
    assert adding(1) is not None


@pytest.mark.parametrize("size", [1, 16, 29, 30, 31, 59, 60, 61, 1000])
def test_ranges(size: int) -> None:
    found = threads.ranges(size, 30)

    assert [start for start, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == size
    assert all(start % 30 == 0 for start, _ in found)
    assert size < 30 or all(end - start >= 30 for start, end in found)


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_every_piece_is_computed_once(limit: int) -> None:
    with threads.limited(limit):
        for count in (0, 1, 2, 100):
            seen: list[int] = []
            threads.share(range(count), seen.append)

            assert sorted(seen) == list(range(count))
            assert threads.count() <= limit


def test_two_threads_take_pieces() -> None:
    if threads.count() == 1:
        pytest.skip("one core")
    together = threading.Barrier(2)

    threads.share((0, 1), lambda _: together.wait(timeout=30))


@pytest.mark.parametrize("helper", [False, True])
def test_what_a_body_raises_is_raised_when_all_have_ended(helper: bool) -> None:
    if threads.count() == 1:
        pytest.skip("one core")
    together, seen = threading.Barrier(2), []

    def body(piece: int) -> None:
        if piece < 2:
            together.wait(timeout=30)
            if helper == (threading.current_thread() is not threading.main_thread()):
                raise IndexError(piece)
        seen.append(piece)

    with threads.limited(2), pytest.raises(IndexError):
        threads.share(range(1000), body)
    assert len(seen) == 999


def test_a_busy_pool_is_not_waited_for() -> None:
    go = threading.Event()
    blocked = [threads._pool().submit(go.wait, 30) for _ in range(8)]
    try:
        seen: list[int] = []
        threads.share(range(5), seen.append)

        assert seen == [0, 1, 2, 3, 4]
        assert not blocked[0].done()
    finally:
        go.set()
    assert all(future.result(timeout=30) for future in blocked)


FORK = """
import os, threading
from narses.kernels import threads
together = threading.Barrier(2)
meet = lambda _: together.wait(timeout=20)
threads.share((0, 1), meet)
child = os.fork()
threads.share((0, 1), meet)
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_has_threads_of_its_own() -> None:
    if threads.count() == 1:
        pytest.skip("one core")
    subprocess.run([sys.executable, "-c", FORK], timeout=60, check=True)
