"""The one table of refusals: what a peer did, the status it gets, what it should do, and how metrics count it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import grpc

# google.rpc.Code, the numbers that verdicts carry
OK = 0
INVALID_ARGUMENT = 3
NOT_FOUND = 5
ALREADY_EXISTS = 6
PERMISSION_DENIED = 7
RESOURCE_EXHAUSTED = 8
FAILED_PRECONDITION = 9
ABORTED = 10
INTERNAL = 13
UNAVAILABLE = 14
DATA_LOSS = 15

Action = Literal["stop", "pull", "push", "join", "wait"]


@dataclass(frozen=True)
class Refusal:
    """One row: reason (UPPER_SNAKE, on the wire), google.rpc.Code, push outcome counted, what the client does next.

    action: "stop" = nothing will help; "pull" = take the newer parameters; "push" = send the same bytes again; "join" = open a
    new session; "wait" = go on with the next round.
    """

    reason: str
    code: int
    outcome: Literal["rejected", "late"]
    action: Action
    meaning: str


REFUSALS: dict[str, Refusal] = {
    row.reason: row
    for row in (
        Refusal("UNKNOWN_RUN", NOT_FOUND, "rejected", "join", "the run id is not the session's run"),
        Refusal(
            "UNKNOWN_WORKER", PERMISSION_DENIED, "rejected", "stop", "the worker id is not in the roster or the session"
        ),
        Refusal("SESSION_ALIVE", ALREADY_EXISTS, "rejected", "stop", "a live session already acts for the worker id"),
        Refusal("NO_SESSION", FAILED_PRECONDITION, "rejected", "join", "the session token is absent, unknown or ended"),
        Refusal("WRONG_ROUND", ABORTED, "late", "pull", "the round is closed"),
        Refusal("ROUND_NOT_OPEN", FAILED_PRECONDITION, "rejected", "pull", "the round has not opened yet"),
        Refusal("WRONG_BASE", ABORTED, "rejected", "pull", "computed from other parameters than the round's"),
        Refusal(
            "CONFLICTING_PUSH",
            ALREADY_EXISTS,
            "rejected",
            "stop",
            "other bytes were accepted for this worker and round",
        ),
        Refusal(
            "WRONG_LENGTH",
            INVALID_ARGUMENT,
            "rejected",
            "stop",
            "the payload's byte length is not that of D parameters",
        ),
        Refusal("WRONG_DTYPE", INVALID_ARGUMENT, "rejected", "stop", "the element type is not the Task's"),
        Refusal("NON_FINITE", INVALID_ARGUMENT, "rejected", "wait", "the update holds NaN or infinity"),
        Refusal("CHECKSUM", DATA_LOSS, "rejected", "push", "the payload does not have the trailer's digest"),
        Refusal("TOO_LARGE", INVALID_ARGUMENT, "rejected", "stop", "more payload came than the header declared"),
        Refusal("PROTOCOL", INVALID_ARGUMENT, "rejected", "stop", "a frame came out of order or cannot be parsed"),
        Refusal("INCOMPLETE", ABORTED, "rejected", "push", "the stream ended before the update's trailer"),
        Refusal("SUPERSEDED", ABORTED, "rejected", "wait", "a newer push for the same worker and round took over"),
        Refusal("DRAINING", UNAVAILABLE, "rejected", "wait", "the server is shutting down"),
        Refusal("OVERLOADED", RESOURCE_EXHAUSTED, "rejected", "wait", "the server has no room for more streams"),
        Refusal("INTERNAL", INTERNAL, "rejected", "stop", "the server failed; its log has the cause"),
    )
}

_GRPC_CODES = {code.value[0]: code for code in grpc.StatusCode}


def grpc_code(code: int) -> grpc.StatusCode:
    """The grpc.StatusCode with google.rpc.Code number `code`."""
    return _GRPC_CODES[code]


REASON_KEY = "narses-reason"


def trailing(reason: str) -> tuple[tuple[str, str], ...]:
    """Trailing metadata that carries `reason` when an RPC itself is refused."""
    assert reason in REFUSALS, reason
    return ((REASON_KEY, reason),)


TOKEN_KEY = "narses-session-bin"  # noqa: S105 - the name of a metadata key
"""Metadata that carries the session token of Pull, Push and Leave."""
