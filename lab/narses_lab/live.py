"""Telling the user what happens while it happens: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from narses_lab.demo import ADVERSARY_IDS, ATTACKS, RULES, Cell, Demo
from narses_lab.processes import Event
from narses_lab.results import Spread

LINE_SECONDS = 1.0
REFRESHES_PER_SECOND = 4


class Board:
    """What is known so far, from the daemons' events alone. begun: time.monotonic() when the command was entered."""

    def __init__(self, demo: Demo, begun: float) -> None:
        self.cells = {cell.name: cell for cell in demo.cells()}
        self.rules = demo.rules
        self.begun = begun
        self.first_accuracy: float | None = None  # seconds after `begun`
        self.phase = "starting the daemons (each imports PyTorch)"
        self.cell: Cell | None = None
        self.round = 0
        self.rounds = demo.rounds
        self.speed: float | None = None
        self.accuracy: float | None = None
        self.selected: list[int] | None = None
        self.refused: dict[str, str] = {}
        self.finals: dict[tuple[str, str], list[float]] = {}
        self.finished = 0
        self._playing_since = begun

    def apply(self, event: Event) -> None:
        """Take one event of any daemon into account."""
        if event.daemon != "server":
            return
        match event.name:
            case "listening":
                self.phase = "waiting for all workers to join"
            case "run started":
                self._open(self.cells[event.fields["run"]])
            case "evaluated":
                self.round, self.accuracy = event.fields["round"], event.fields["accuracy"]
                if self.first_accuracy is None:
                    self.first_accuracy = time.monotonic() - self.begun
            case "progress":
                self._progress(event.fields)
            case "run finished":
                self.finished += 1
                if event.fields["final_accuracy"] is not None and self.cell is not None:
                    self.finals.setdefault((self.cell.rule, self.cell.attack), []).append(
                        event.fields["final_accuracy"]
                    )

    def _open(self, cell: Cell) -> None:
        if self.cell is None:
            self._playing_since = time.monotonic()
        self.cell, self.round, self.speed, self.accuracy, self.selected, self.refused = cell, 0, None, None, None, {}

    def _progress(self, fields: dict[str, Any]) -> None:
        self.round, self.speed = fields["round"], fields["rounds_per_second"]
        self.selected, self.refused = fields["selected"], fields["refused"] or {}
        if fields["accuracy"] is not None:
            self.accuracy = fields["accuracy"]

    @property
    def elapsed(self) -> float:
        """Seconds since the command was entered."""
        return time.monotonic() - self.begun

    @property
    def left(self) -> float | None:
        """Seconds that the remaining runs will take at the pace so far; None before the first has ended."""
        if not self.finished:
            return None
        pace = (time.monotonic() - self._playing_since) / (self.finished + self.round / self.rounds % 1)
        return max(0.0, pace * len(self.cells) - (time.monotonic() - self._playing_since))

    def chosen(self) -> Text:
        """Whose updates the rule used in the last round heard of; those from the adversary daemon in red."""
        if self.selected is None:
            return Text("a mix of all")
        liars = ADVERSARY_IDS if self.cell is not None and self.cell.attack == "alie" else ()
        return Text(" ").join(Text(str(w), style="bold red" if w in liars else "") for w in self.selected)

    def turned_away(self) -> str:
        """The updates that the server refused in that round, and why."""
        return ", ".join(f"{worker} ({reason})" for worker, reason in self.refused.items()) or "none"


class View(Protocol):
    """Something that shows a board; a context manager, so that the terminal is itself again afterwards."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, event: Event) -> None:
        """Called after the board has taken `event` into account."""
        ...


def view_of(board: Board, console: Console) -> View:
    """The live view if `console` is a terminal, else the plain one."""
    return (
        LiveView(board, console) if console.is_terminal and not console.is_dumb_terminal else PlainView(board, console)
    )


class LiveView:
    """Redraws itself a few times a second."""

    def __init__(self, board: Board, console: Console) -> None:
        self._board = board
        self._live = Live(
            console=console,
            get_renderable=self._render,
            refresh_per_second=REFRESHES_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, event: Event) -> None:
        """Nothing to do: the next refresh sees the board."""

    def _render(self) -> RenderableType:
        board = self._board
        head = Text.assemble(("Narses demo ", "bold"), f"  {clock(board.elapsed)} elapsed")
        if board.left is not None:
            head.append(f", about {clock(board.left)} left")
        total = len(board.cells) * board.rounds
        done = board.finished * board.rounds + (board.round if board.round < board.rounds else 0)
        return Group(
            head, ProgressBar(total=total, completed=done, width=72), Text(), self._now(), Text(), self._table()
        )

    def _now(self) -> RenderableType:
        board, cell = self._board, self._board.cell
        if cell is None:
            return Text(f"{board.phase} ...")
        grid = Table.grid(padding=(0, 2))
        run = f"{board.finished + 1 if board.finished < len(board.cells) else board.finished} of {len(board.cells)}"
        grid.add_row("run", Text(f"{run}: {RULES[cell.rule]}, {ATTACKS[cell.attack].title}, seed {cell.seed}"))
        speed = "" if board.speed is None else f"   {board.speed:.0f} rounds/s"
        grid.add_row("round", f"{board.round} of {board.rounds}{speed}")
        grid.add_row("accuracy", percent(board.accuracy))
        grid.add_row("selected", board.chosen())
        grid.add_row("refused", board.turned_away())
        return grid

    def _table(self) -> Table:
        table = Table(title="final test accuracy so far, %", title_justify="left")
        table.add_column("rule")
        for attack in ATTACKS:
            table.add_column(attack, justify="right", min_width=12)
        for rule in self._board.rules:
            row = [self._board.finals.get((rule, attack)) for attack in ATTACKS]
            table.add_row(RULES[rule], *("" if not finals else str(Spread.of(finals)) for finals in row))
        return table


class PlainView:
    """One line for every run's end and, at most once a second, for where it is."""

    def __init__(self, board: Board, console: Console) -> None:
        self._board = board
        self._console = console
        self._line_at = -LINE_SECONDS

    def __enter__(self) -> Self:
        self._print(f"{self._board.phase} ...")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, event: Event) -> None:
        """Print what `event` is worth."""
        board = self._board
        if event.daemon != "server":
            if event.name == "attack":
                self._print(f"{event.fields['run']}: {event.daemon} attacks with {event.fields['attack']}")
            return
        match event.name:
            case "listening":
                self._print(f"server listens on port {event.fields['port']}")
            case "joined":
                if not board.finished:
                    self._print(f"workers {', '.join(map(str, event.fields['workers']))} joined")
            case "evaluated":
                if board.elapsed - self._line_at >= LINE_SECONDS:
                    self._progress()
            case "progress":
                if board.elapsed - self._line_at >= LINE_SECONDS:
                    self._progress(
                        f" {board.speed:.0f} rounds/s selected {board.chosen()} refused {board.turned_away()}"
                    )
            case "run finished":
                fields = event.fields
                self._print(
                    f"{fields['run']}: {fields['outcome']} after {fields['rounds']} rounds, final accuracy "
                    f"{percent(fields['final_accuracy'])}, best {percent(fields['best_accuracy'])} "
                    f"[{board.finished} of {len(board.cells)}]"
                )

    def _progress(self, more: str = "") -> None:
        board = self._board
        name = board.cell.name if board.cell is not None else ""
        self._print(f"{name}: round {board.round} of {board.rounds} accuracy {percent(board.accuracy)}{more}")
        self._line_at = board.elapsed

    def _print(self, text: str) -> None:
        self._console.print(f"{self._board.elapsed:6.1f} s  {text}", highlight=False, markup=False, soft_wrap=True)


def percent(fraction: float | None) -> str:
    """A fraction for people; a dash where there is none."""
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
