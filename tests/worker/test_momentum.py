"""Momentum per round: it goes back with the server, survives the daemon, and damage on disk costs only itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from narses.errors import ConfigError
from narses_worker.momentum import Momentum, Rows

RUN = bytes(range(16))


def rows(value: float, workers: int = 2) -> Rows:
    return np.full((workers, 3), value, np.float32)


def played(folder: Path | None, rounds: int, durable: int | None = None, workers: tuple[int, ...] = (4, 7)) -> Momentum:
    """A daemon that has played `rounds` rounds; after round r its workers hold r + 1."""
    momentum = Momentum(RUN, workers, 3, folder)
    for round_ in range(rounds):
        momentum.before(round_, durable)
        momentum.after(round_, rows(round_ + 1.0, len(workers)))
    return momentum


@pytest.mark.parametrize("on_disk", [False, True])
def test_it_goes_on_and_goes_back_with_the_server(tmp_path: Path, on_disk: bool) -> None:
    momentum = played(tmp_path if on_disk else None, 6, durable=2)
    np.testing.assert_array_equal(momentum.before(6, 2), rows(6))
    np.testing.assert_array_equal(momentum.before(3, 2), rows(3))  # the server was killed
    momentum.after(3, rows(99))
    np.testing.assert_array_equal(momentum.before(4, 2), rows(99))


def test_it_begins_at_zero() -> None:
    np.testing.assert_array_equal(Momentum(RUN, (1,), 3, None).before(0, None), rows(0, 1))


def test_what_it_hands_out_is_nobody_elses() -> None:
    momentum = played(None, 1)
    momentum.before(1, None)[:] = 7
    np.testing.assert_array_equal(momentum.before(1, None), rows(1))


def test_a_restarted_daemon_finds_every_round_that_the_server_may_name(tmp_path: Path) -> None:
    played(tmp_path, 6, durable=2)
    for round_ in (3, 4, 5, 6):
        np.testing.assert_array_equal(Momentum(RUN, (4, 7), 3, tmp_path).before(round_, 2), rows(round_))


def test_what_is_durable_at_the_server_is_removed(tmp_path: Path) -> None:
    momentum = played(tmp_path, 9, durable=2)
    assert len(list((tmp_path / RUN.hex()).iterdir())) == 7  # before rounds 3 to 9
    momentum.before(9, 8)
    assert [path.name for path in (tmp_path / RUN.hex()).iterdir()] == ["before-0000000009-4.safetensors"]
    np.testing.assert_array_equal(Momentum(RUN, (4, 7), 3, tmp_path).before(9, 8), rows(9))


def test_workers_may_be_dealt_to_other_daemons(tmp_path: Path) -> None:
    played(tmp_path, 3, workers=(0, 1))
    played(tmp_path, 3, workers=(2, 3))
    np.testing.assert_array_equal(Momentum(RUN, (0, 1, 2, 3), 3, tmp_path).before(3, None), rows(3, 4))
    np.testing.assert_array_equal(Momentum(RUN, (1, 3), 3, tmp_path).before(3, None), rows(3))


def test_an_older_one_stands_in_and_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    played(tmp_path, 3)
    np.testing.assert_array_equal(Momentum(RUN, (4, 7, 8), 3, tmp_path).before(5, None), [*rows(3), *rows(0, 1)])
    said = capsys.readouterr().out
    assert "momentum of this round is not there, older is taken" in said
    assert "workers={4: 3, 7: 3, 8: 'zero'}" in said


@pytest.mark.parametrize("damage", [b"", b"\x00" * 40, b"junk"])
def test_a_damaged_file_costs_its_round_only(tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    played(tmp_path, 4, durable=0)
    newest = tmp_path / RUN.hex() / "before-0000000004-4.safetensors"
    assert newest.exists()
    newest.write_bytes(damage)
    np.testing.assert_array_equal(Momentum(RUN, (4, 7), 3, tmp_path).before(4, 0), rows(3))
    assert "before-0000000004-4.safetensors" in capsys.readouterr().out


def test_another_run_has_its_own_and_the_old_ones_go(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    played(tmp_path, 3)
    np.testing.assert_array_equal(Momentum(bytes(16), (4, 7), 3, tmp_path).before(3, None), rows(0))
    assert sorted(path.name for path in tmp_path.iterdir()) == [bytes(16).hex(), "notes"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"state_dir .*file: cannot be written"):
        Momentum(RUN, (1,), 3, tmp_path / "file")
