"""Checkpoints survive what a kill or a disk does to them, and refuse what is not theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from structlog.testing import capture_logs

from narses.errors import CheckpointError, ConfigError
from narses_server.checkpoint import DTYPES, Checkpoints, config_hash


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
            path.rename(path.with_name(path.name + ".partial"))

    with capture_logs() as logs:
        newest = checkpoints.newest()

    assert newest is not None
    assert newest.rounds == 1
    if damage != "half-written":
        assert logs[0]["file"] == str(path)
    _save(Checkpoints(tmp_path, "hash", keep=3), 2)
    assert _names(tmp_path) == [f"checkpoint-000000000{r}.safetensors" for r in (1, 2)]


def test_damaged_ones_that_are_newer_never_push_out_a_fresh_one(tmp_path: Path) -> None:
    for rounds in range(1, 6):
        _save(Checkpoints(tmp_path, "hash", keep=4), rounds)
    for rounds in (3, 4, 5):
        (tmp_path / f"checkpoint-000000000{rounds}.safetensors").write_bytes(b"")
    restarted = Checkpoints(tmp_path, "hash", keep=2)

    with capture_logs() as logs:
        newest = restarted.newest()
    assert newest is not None
    assert newest.rounds == 2
    assert len(logs) == 3, "every damaged one is named"
    _save(restarted, 3)

    assert _names(tmp_path) == [f"checkpoint-000000000{r}.safetensors" for r in (2, 3, 4, 5)]
    newest = Checkpoints(tmp_path, "hash", keep=2).newest()
    assert newest is not None
    assert newest.rounds == 3


def test_every_type_of_tensor_comes_back_bit_for_bit_and_safetensors_reads_the_file(tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -0.0, float("nan")], [0.25, 3.0, float("-inf")]])
    tensors = {str(dtype): (values.nan_to_num(0, 0, 0).to(dtype)) for dtype in DTYPES}
    tensors |= {
        "scalar": torch.tensor(7, dtype=torch.int8),
        "empty": torch.zeros(0, 3),
        "columns": values.T,
        "nan": values,
    }
    size = Checkpoints(tmp_path, "hash", keep=2).save(1, tensors, {})

    path = tmp_path / "checkpoint-0000000001.safetensors"
    read = load_file(path)
    checkpoint = Checkpoints(tmp_path, "hash", keep=2).newest()
    assert checkpoint is not None
    assert size == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    for found in (read, checkpoint.tensors):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name].nan_to_num(8.0), tensor.nan_to_num(8.0)), name


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
    (tmp_path / "checkpoints" / "checkpoint-0000000003.safetensors.partial").mkdir()

    with pytest.raises(CheckpointError, match="round 2 cannot be made durable"):
        _save(checkpoints, 3)


def test_files_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "hash", keep=2)
    mine = ("checkpoint-notes.safetensors", "checkpoint-mine.partial")
    for name in mine:
        (tmp_path / name).write_text("mine")

    for rounds in range(1, 5):
        _save(checkpoints, rounds)

    assert [(tmp_path / name).read_text() for name in mine] == ["mine", "mine"]
