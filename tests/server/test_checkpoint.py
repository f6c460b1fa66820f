"""Checkpoints survive what a kill or a disk does to them, and refuse what is not theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from structlog.testing import capture_logs

from narses.errors import CheckpointError, ConfigError
from narses_server.checkpoint import Checkpoints, config_hash


def _save(checkpoints: Checkpoints, rounds: int) -> torch.Tensor:
    parameters_D = torch.full((5,), float(rounds))
    checkpoints.save(rounds, {"parameters": parameters_D, "velocity": -parameters_D}, {"rounds_twice": 2 * rounds})
    return parameters_D


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_comes_back_whole_and_the_last_ones_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", "hash", keep=2)
    assert checkpoints.newest() is None

    for rounds in range(1, 5):
        parameters_D = _save(checkpoints, rounds)

    newest = checkpoints.newest()
    assert newest is not None
    assert newest.rounds == 4
    assert torch.equal(newest.tensors["parameters"], parameters_D)
    assert torch.equal(newest.tensors["velocity"], -parameters_D)
    assert newest.facts == {"rounds_twice": 8}
    assert _names(tmp_path / "run" / "checkpoints") == [f"checkpoint-000000000{r}.safetensors" for r in (3, 4)]


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "half-written"])
def test_a_damaged_one_is_named_and_the_one_before_it_is_used(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path, "hash", keep=3)
    _save(checkpoints, 1)
    _save(checkpoints, 2)
    path = tmp_path / "checkpoint-0000000002.safetensors"
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[:-3])
        case "flipped":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "emptied":
            path.write_bytes(b"")
        case _:
            path.rename(path.with_suffix(".partial"))

    with capture_logs() as logs:
        newest = checkpoints.newest()

    assert newest is not None
    assert newest.rounds == 1
    if damage != "half-written":
        assert logs[0]["file"] == str(path)
    _save(checkpoints, 2)
    assert not list(tmp_path.glob("*.partial"))


def test_one_of_another_configuration_is_refused_by_name(tmp_path: Path) -> None:
    _save(Checkpoints(tmp_path, "one", keep=2), 7)

    with pytest.raises(ConfigError, match=r"checkpoint-0000000007\.safetensors belongs to another configuration"):
        Checkpoints(tmp_path, "two", keep=2).newest()


def test_every_value_of_a_configuration_counts() -> None:
    config = {"round": {"n": 3, "f": 0}, "name": "run"}

    assert config_hash(config) == config_hash({"name": "run", "round": {"f": 0, "n": 3}})
    assert config_hash(config) != config_hash({"name": "run", "round": {"f": 1, "n": 3}})


def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", "hash", keep=2)
    (tmp_path / "checkpoints" / "checkpoint-0000000003.partial").mkdir()

    with pytest.raises(CheckpointError, match="round 2 cannot be made durable"):
        _save(checkpoints, 3)


def test_files_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "hash", keep=2)
    (tmp_path / "checkpoint-notes.safetensors").write_text("mine")

    for rounds in range(1, 5):
        _save(checkpoints, rounds)

    assert (tmp_path / "checkpoint-notes.safetensors").read_text() == "mine"
