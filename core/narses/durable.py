"""Files that a kill or a power cut at any instant leaves whole: a name stands for its new content, or still for the old."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

PARTIAL = ".partial"
"""What the name of a file that is being written ends with; one that nobody is writing was left by a kill."""


def write(path: Path, content: bytes | Sequence[bytes | memoryview]) -> int:
    """Put `content`, or the buffers that make it up, at `path`, durably; returns the bytes. For the owner's eyes (mode 0600).

    Written under a temporary name in the same folder, fsynced, renamed, and the folder fsynced. One writer per path.
    OSError if the disk refuses; what was at `path` is still there then.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        size = _write(partial, [content] if isinstance(content, bytes) else content)
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()  # a full disk gets its space back
        raise
    sync_folder(path.parent)
    return size


def overwrite(path: Path, content: Sequence[bytes | memoryview]) -> None:
    """Put the buffers durably over the beginning of the file at `path`, in place: its size and what is beyond them stay.

    A fraction of what `write` costs, because the file system has nothing to note down, but a kill or a power cut on the way
    leaves anything there: for a file that can tell by itself whether it is whole, beside another that is. OSError as `write`.
    """
    descriptor = os.open(path, os.O_WRONLY)
    try:
        _write_all(descriptor, content)
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is not before this."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, buffers: Sequence[bytes | memoryview]) -> int:
    """Write and fsync a file of mode 0600; returns its bytes."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    try:
        size = _write_all(descriptor, buffers)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size


def _write_all(descriptor: int, buffers: Sequence[bytes | memoryview]) -> int:
    size = 0
    for buffer in filter(len, buffers):
        with memoryview(buffer).cast("B") as view:
            written = 0
            while written < len(view):
                written += os.write(descriptor, view[written:])
            size += written
    return size
