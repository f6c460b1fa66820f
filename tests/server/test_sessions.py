"""One vote, one live session."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from narses.errors import RefusedError
from narses.rpc.status import ALREADY_EXISTS, PERMISSION_DENIED
from narses_server.session import Session, Sessions, refused


def test_a_session_holds_its_workers() -> None:
    sessions = Sessions(4)
    session = sessions.open([2, 0, 2], "ipv4:127.0.0.1:1", "test")
    assert session.workers == {0, 2}
    assert sessions.connected == 2
    assert sessions.find(session.token) is session
    assert sessions.find(b"") is None
    assert len(session.token) == 16


def test_tokens_differ() -> None:
    sessions = Sessions(100)
    assert len({sessions.open([i], "", "").token for i in range(100)}) == 100


@pytest.mark.parametrize(
    ("workers", "sentence"),
    [
        ([4], "worker 4 is not in this run's roster 0..3"),
        ([0, 7, 5], "worker 5 is not in this run's roster 0..3"),
        ([2**32 - 1], "worker 4294967295 is not in this run's roster 0..3"),
        ([], "a session needs at least one worker id"),
    ],
)
def test_ids_outside_the_roster(workers: list[int], sentence: str) -> None:
    sessions = Sessions(4)
    with pytest.raises(RefusedError) as error:
        sessions.open(workers, "", "")
    assert (error.value.code, error.value.reason) == (PERMISSION_DENIED, "UNKNOWN_WORKER")
    assert error.value.message == sentence
    assert sessions.connected == 0


def test_a_live_id_joined_twice() -> None:
    sessions = Sessions(4)
    first = sessions.open([1, 2], "ipv4:127.0.0.1:7", "")
    with pytest.raises(RefusedError) as error:
        sessions.open([0, 2], "", "")
    assert (error.value.code, error.value.reason) == (ALREADY_EXISTS, "SESSION_ALIVE")
    assert error.value.message == "worker 2 already has a live session from ipv4:127.0.0.1:7"
    assert sessions.connected == 2, "worker 0 got no session either"
    sessions.close(first)
    assert sessions.connected == 0
    assert sessions.open([0, 2], "", "").workers == {0, 2}


def test_closing_twice_does_not_end_the_successor() -> None:
    sessions = Sessions(2)
    first = sessions.open([0], "", "")
    sessions.close(first)
    second = sessions.open([0], "", "")
    sessions.close(first)
    assert sessions.find(second.token) is second
    assert sessions.connected == 1


def test_a_refusal_has_the_tables_code() -> None:
    error = refused("NO_SESSION", "join first")
    assert (error.code, error.reason, error.message) == (9, "NO_SESSION", "join first")


class AnySessions(RuleBasedStateMachine):
    """At any time every worker belongs to at most one session that can be found."""

    opened = Bundle("opened")

    def __init__(self) -> None:
        super().__init__()
        self.sessions = Sessions(6)
        self.live: list[Session] = []

    @rule(target=opened, workers=st.sets(st.integers(0, 6), max_size=4))
    def opens(self, workers: set[int]) -> Session | None:
        taken = {worker for session in self.live for worker in session.workers}
        error: RefusedError | None
        try:
            session = self.sessions.open(workers, "", "")
        except RefusedError as refusal:
            error = refusal
        else:
            error = None
        if error is not None:
            assert error.reason == ("SESSION_ALIVE" if workers and 6 not in workers else "UNKNOWN_WORKER")
            assert not workers or 6 in workers or workers & taken
            return None
        assert not workers & taken
        self.live.append(session)
        return session

    @rule(session=consumes(opened), times=st.integers(1, 2))
    def closes(self, session: Session | None, times: int) -> None:
        if session is not None:
            for _ in range(times):
                self.sessions.close(session)
            self.live.remove(session)
            assert self.sessions.find(session.token) is None

    @invariant()
    def counted(self) -> None:
        assert self.sessions.connected == sum(len(session.workers) for session in self.live)
        assert all(self.sessions.find(session.token) is session for session in self.live)


AnySessions.TestCase.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)
TestAnySessions = AnySessions.TestCase
