"""What a data set is, what an entry offers, and where files are looked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

# N = samples; inputs are (N, *shape)


@dataclass(frozen=True)
class Dataset:
    """Training and test samples, shared by all who load the same set in this process: never write to these tensors.

    inputs: float32 (N, *shape); labels: int64 (N,) in 0..classes-1.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input, without the batch."""
        return tuple(self.train_inputs.shape[1:])


@runtime_checkable
class Source(Protocol):
    """A frozen, hashable dataclass whose fields are the data set's configuration."""

    def load(self, folder: Path) -> Dataset:
        """Read or generate the set; `folder` is where sets with files lie. DataError if they are absent or damaged."""
        ...


def data_folder(data_dir: Path | None) -> Path:
    """`data_dir` if given, else NARSES_DATA_DIR, else narses/data in the user's cache folder (~/.cache)."""
    if data_dir is not None:
        return data_dir.expanduser()
    if named := os.environ.get("NARSES_DATA_DIR"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "narses" / "data"
