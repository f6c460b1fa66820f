"""Checkpoints survive what a kill or a disk does to them, and refuse what is not theirs."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from structlog.testing import capture_logs

from narses import durable
from narses.durable import write
from narses.errors import CheckpointError, ConfigError
from narses_server.checkpoint import DTYPES, Checkpoints, config_hash


def _save(checkpoints: Checkpoints, rounds: int) -> torch.Tensor:
    parameters_D = torch.full((5,), float(rounds))
    checkpoints.save(rounds, {"parameters": parameters_D, "velocity": -parameters_D}, {"rounds_twice": 2 * rounds})
    return parameters_D


def _files(*rounds: int) -> list[str]:
    return [f"checkpoint-{r:010d}.safetensors" for r in rounds]


def _bytes(value: float) -> bytes:
    return torch.full((5,), value).numpy().tobytes()


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_comes_back_whole_and_the_last_ones_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", "hash", keep=2)
    assert checkpoints.newest() is None

    for rounds in range(1, 6):
        parameters_D = _save(checkpoints, rounds)

    newest = checkpoints.newest()
    assert newest is not None
    assert newest.rounds == 5
    assert torch.equal(newest.tensors["parameters"], parameters_D)
    assert torch.equal(newest.tensors["velocity"], -parameters_D)
    assert newest.tensors.keys() == {"parameters", "velocity"}
    assert newest.facts == {"rounds_twice": 10}
    # Two that stay complete, whatever happens to the one that is written next: over the third.
    assert _names(tmp_path / "run" / "checkpoints") == _files(3, 4, 5)


def test_one_can_be_asked_for(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "hash", keep=1 << 62)
    for rounds in (3, 10, 200):
        _save(checkpoints, rounds)

    found = checkpoints.at(10)
    assert found is not None
    assert found.facts == {"rounds_twice": 20}
    assert checkpoints.at(11) is None
    with pytest.raises(ConfigError, match=r"checkpoint-0000000010\.safetensors belongs to another configuration"):
        Checkpoints(tmp_path, "other", keep=2).at(10)
    (tmp_path / _files(10)[0]).write_bytes(b"damaged")
    assert checkpoints.at(10) is None


def test_a_kill_while_one_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    """At every instant of several: after the rename, and after so many bytes of the file in place."""
    tensors = {"parameters": torch.arange(50_000.0)}
    for rounds in range(1, 5):
        Checkpoints(tmp_path / "disk", "hash", keep=2).save(rounds, tensors, {})
    for bytes_ in (0, 1, 8, 100, 1000, 100_000, 200_000):
        folder = tmp_path / str(bytes_)
        shutil.copytree(tmp_path / "disk", folder)
        left, write = bytes_, os.write

        def dying(descriptor: int, data: memoryview, write: Any = write) -> int:
            nonlocal left
            if not left:
                raise KeyboardInterrupt  # nobody catches it
            written = write(descriptor, data[:left])
            left -= written
            return int(written)

        with mock.patch("os.write", dying), pytest.raises(KeyboardInterrupt):
            Checkpoints(folder, "hash", keep=2).save(5, {"parameters": -tensors["parameters"]}, {})

        restarted = Checkpoints(folder, "hash", keep=2)
        newest = restarted.newest()
        assert newest is not None
        assert newest.rounds == 4
        assert torch.equal(newest.tensors["parameters"], tensors["parameters"])
        restarted.save(5, {"parameters": -tensors["parameters"]}, {})
        assert _names(folder) == _files(3, 4, 5)
        newest = Checkpoints(folder, "hash", keep=2).newest()
        assert newest is not None
        assert newest.rounds == 5


def test_files_are_written_over_in_place_and_grow_when_there_is_more(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "hash", keep=2)
    wholes = []
    with mock.patch.object(durable, "write", lambda *args: wholes.append(args) or write(*args)):
        for rounds in range(1, 20):
            size = checkpoints.save(rounds, {"parameters": torch.full((1000 if rounds < 10 else 2000,), rounds)}, {})
            newest = checkpoints.newest()
            assert newest is not None
            assert newest.rounds == rounds
            assert (newest.tensors["parameters"] == rounds).all()
            assert size <= (tmp_path / _files(rounds)[0]).stat().st_size <= 1.2 * size
    assert len(wholes) == 6, "three files, and three larger ones"


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
            path.write_bytes(content.replace(_bytes(2.0), _bytes(2.5)))
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
    assert _names(tmp_path) == _files(1, 2)


def test_damaged_ones_that_are_newer_never_push_out_a_fresh_one(tmp_path: Path) -> None:
    for rounds in range(1, 6):
        _save(Checkpoints(tmp_path, "hash", keep=4), rounds)
    for name in _files(3, 4, 5):
        content, rounds = (tmp_path / name).read_bytes(), float(name[15:21])
        (tmp_path / name).write_bytes(content.replace(_bytes(rounds), _bytes(0.5)))
    restarted = Checkpoints(tmp_path, "hash", keep=2)

    with capture_logs() as logs:
        newest = restarted.newest()
    assert newest is not None
    assert newest.rounds == 2
    assert len(logs) == 3, "every damaged one is named"
    _save(restarted, 3)

    assert _names(tmp_path) == _files(1, 2, 3)
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
    Checkpoints(tmp_path, "hash", keep=2).save(1, tensors, {})

    path = tmp_path / "checkpoint-0000000001.safetensors"
    read = load_file(path)
    checkpoint = Checkpoints(tmp_path, "hash", keep=2).newest()
    assert checkpoint is not None
    assert path.stat().st_mode & 0o777 == 0o600
    for found in (read, checkpoint.tensors):
        assert found.keys() - {"free"} == tensors.keys()
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
    checkpoints = Checkpoints(tmp_path, "hash", keep=2)
    full = OSError(errno.ENOSPC, "No space left on device")
    sentence = r"round 3 cannot be made durable in .* \(No space left on device\)"
    with mock.patch("os.fsync", side_effect=full), pytest.raises(CheckpointError, match=sentence):
        _save(checkpoints, 4)
    for rounds in range(1, 4):
        _save(checkpoints, rounds)
    with mock.patch("os.fdatasync", side_effect=full), pytest.raises(CheckpointError, match=sentence):
        _save(checkpoints, 4)


def test_files_that_are_no_checkpoints_are_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, "hash", keep=2)
    mine = ("checkpoint-1.safetensors", "checkpoint-notes.safetensors", "checkpoint-mine.partial")
    for name in mine:
        (tmp_path / name).write_text("mine")

    for rounds in range(1, 5):
        _save(checkpoints, rounds)

    assert [(tmp_path / name).read_text() for name in mine] == ["mine", "mine", "mine"]
