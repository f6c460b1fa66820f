"""What a kill leaves: the disk as it is at an instant."""

from __future__ import annotations

import shutil
from pathlib import Path


def as_a_kill_leaves_it(folder: Path, to: Path) -> Path:
    """A copy of `folder` at `to`; files that are renamed or removed meanwhile may be missing."""

    def copy(source: str, target: str) -> None:
        try:
            shutil.copyfile(source, target)
        except FileNotFoundError:
            return

    shutil.copytree(folder, to, copy_function=copy)
    return to
