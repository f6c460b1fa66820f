"""A file that is written durably is whole under its name, or what was there before still is."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from narses import durable


@pytest.mark.parametrize(
    "content",
    [b"", b"some bytes", [], [b"so", b"", b"me ", memoryview(b"bytes")], [np.arange(300_000.0).reshape(3, -1).data]],
)
def test_every_byte_arrives_and_is_for_the_owner_only(
    tmp_path: Path, content: bytes | list[bytes | memoryview]
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"the old content, which may be longer")

    size = durable.write(path, content)

    expected = content if isinstance(content, bytes) else b"".join(bytes(buffer) for buffer in content)
    assert path.read_bytes() == expected
    assert size == len(expected)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_them_all(tmp_path: Path) -> None:
    write = os.write
    with mock.patch("os.write", lambda descriptor, data: write(descriptor, data[:3])):
        durable.write(tmp_path / "file", [b"0123456789", b"abcdef"])
    assert (tmp_path / "file").read_bytes() == b"0123456789abcdef"


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_what_was_there_survives_a_disk_that_refuses(tmp_path: Path, failing: str) -> None:
    path = tmp_path / "file"
    durable.write(path, b"old")
    with (
        mock.patch(f"os.{failing}", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(OSError, match="No space left"),
    ):
        durable.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_power_cut_at_any_instant_finds_the_old_content_or_the_new(tmp_path: Path) -> None:
    """Content is fsynced before it gets its name, and the name before anybody is told."""
    path, events = tmp_path / "file", []
    durable.write(path, b"old")
    fsync, replace = os.fsync, Path.replace

    def syncing(descriptor: int) -> None:
        fsync(descriptor)
        whole = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else f"{os.fstat(descriptor).st_size} bytes"
        events.append((f"fsync {whole}", path.read_bytes()))

    def renaming(self: Path, target: Path) -> Path:
        events.append(("rename", path.read_bytes()))
        return replace(self, target)

    with mock.patch("os.fsync", syncing), mock.patch.object(Path, "replace", renaming):
        durable.write(path, b"newer")

    assert events == [("fsync 5 bytes", b"old"), ("rename", b"old"), ("fsync folder", b"newer")]


def test_writing_over_leaves_size_and_rest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    durable.write(path, b"0123456789")
    durable.overwrite(path, [b"ab", memoryview(b"cde")])
    assert path.read_bytes() == b"abcde56789"
    with pytest.raises(FileNotFoundError):
        durable.overwrite(tmp_path / "absent", [b"ab"])
