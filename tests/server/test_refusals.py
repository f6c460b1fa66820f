"""A flood of refusals is counted, not copied into the log."""

from structlog.testing import capture_logs

from narses_server.refusals import LOGGED_WHOLE, RefusalLog


def test_the_first_ones_are_logged_then_ever_fewer() -> None:
    refusals = RefusalLog("run")

    with capture_logs() as logs:
        for worker in range(10_000):
            refusals.tell("update refused", "NON_FINITE", worker=worker)
        refusals.tell("update refused", "CHECKSUM", worker=1)

    counts = [line["count"] for line in logs if line["reason"] == "NON_FINITE"]
    assert counts == [*range(1, LOGGED_WHOLE + 1), 100, 1000, 10_000]
    assert logs[-1] == {
        "event": "update refused", "log_level": "warning", "run": "run", "reason": "CHECKSUM", "count": 1, "worker": 1,
    }  # fmt: skip
