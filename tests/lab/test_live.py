"""What is on the screen follows from the daemons' events."""

import io

from rich.console import Console

from narses_lab.demo import Demo
from narses_lab.live import Board, LiveView, PlainView, view_of
from narses_lab.processes import Event

DEMO = Demo(seeds=1, rounds=20, rules=("krum",))


def server(name, **fields):
    return Event("server", name, fields)


def evaluated(accuracy, done=5):
    return server("evaluated", run="krum/alie/seed-1", round=done, rounds=20, accuracy=accuracy, loss=1.0)


def progress(selected=None, refused=None, accuracy=0.5):
    return server(
        "progress",
        run="krum/alie/seed-1",
        round=7,
        rounds=20,
        rounds_per_second=42.0,
        accuracy=accuracy,
        selected=selected,
        refused=refused or {},
    )


def finished(accuracy, outcome="completed"):
    return server(
        "run finished",
        run="krum/alie/seed-1",
        outcome=outcome,
        rounds=20,
        final_accuracy=accuracy,
        best_accuracy=accuracy,
    )


def board_after(*events):
    board = Board(DEMO, begun=0.0)
    for event in events:
        board.apply(event)
    return board


STARTED = server("run started", run="krum/alie/seed-1")


def test_a_run_from_its_start_to_its_end():
    board = board_after(STARTED, evaluated(0.25), progress(selected=[12], refused={"3": "NON_FINITE"}))

    assert (board.round, board.speed, board.accuracy) == (7, 42.0, 0.5)
    assert board.first_accuracy is not None
    assert str(board.chosen()) == "12"
    assert board.turned_away() == "3 (NON_FINITE)"
    assert board.left is None

    board.apply(finished(0.75))

    assert board.finals == {("krum", "alie"): [0.75]}
    assert board.left is not None


def test_a_new_run_forgets_the_last_ones_numbers():
    board = board_after(
        STARTED, progress([4], {"1": "CHECKSUM"}), finished(0.9), server("run started", run="krum/ipm/seed-1")
    )

    assert (board.round, board.accuracy, board.selected, board.refused) == (0, None, None, {})


def test_liars_are_marked_where_they_are_known():
    def marked(run):
        board = board_after(server("run started", run=run), progress([3, 12]))
        return {span.style for span in board.chosen().spans}

    assert "bold red" in marked("krum/alie/seed-1")
    assert "bold red" not in marked("krum/none/seed-1")


def test_other_daemons_events_change_nothing():
    board = board_after(STARTED, Event("honest-a", "run finished", {"run": "krum/alie/seed-1", "round": 20}))

    assert board.finished == 0


def shown(view_class, *events):
    console = Console(file=io.StringIO(), width=100, force_terminal=view_class is LiveView)
    board = Board(DEMO, begun=0.0)
    view = view_class(board, console)
    with view:
        for event in events:
            board.apply(event)
            view.show(event)
        if isinstance(view, LiveView):
            console.print(view._render())
    return console.file.getvalue()


def test_plain_lines_say_what_matters():
    text = shown(
        PlainView,
        server("listening", port=4711),
        server("joined", run="krum/alie/seed-1", workers=[0, 1]),
        STARTED,
        Event("adversary", "attack", {"run": "krum/alie/seed-1", "attack": "alie"}),
        evaluated(0.25),
        finished(0.75, "diverged"),
    )

    for part in (
        "port 4711",
        "workers 0, 1 joined",
        "adversary attacks with alie",
        "accuracy 25.0 %",
        "diverged",
        "75.0 %",
    ):
        assert part in text
    assert "\x1b" not in text


def test_plain_progress_names_the_chosen_and_the_refused():
    text = shown(PlainView, STARTED, progress(selected=[3, 12], refused={"5": "NON_FINITE"}))

    assert "round 7 of 20" in text
    assert "42 rounds/s selected 3 12 refused 5 (NON_FINITE)" in text


def test_plain_progress_comes_at_most_once_a_second():
    assert shown(PlainView, STARTED, *[progress()] * 50).count("rounds/s") == 1


def test_the_live_view_shows_run_round_speed_and_table():
    text = shown(
        LiveView,
        STARTED,
        progress(selected=[3]),
        finished(0.75),
        server("run started", run="krum/ipm/seed-1"),
        progress(),
    )

    for part in ("2 of 3", "IPM", "7 of 20", "42 rounds/s", "50.0 %", "75.0"):
        assert part in text


def test_the_view_fits_the_console():
    board = Board(DEMO, begun=0.0)

    assert isinstance(view_of(board, Console(file=io.StringIO())), PlainView)
    assert isinstance(
        view_of(board, Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"})), LiveView
    )
