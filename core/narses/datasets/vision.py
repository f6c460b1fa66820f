"""MNIST and CIFAR-10, from files in torchvision's folder layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from narses.config import STRICT
from narses.datasets.base import Dataset
from narses.errors import DataError


@dataclass(frozen=True, config=STRICT)
class Mnist:
    """60,000 + 10,000 grey images of 28 x 28 pixels, ten classes, normalised by mean 0.1307 and deviation 0.3081.

    download: let torchvision fetch absent files; it is ignored in a table that came from a peer.
    Source: LeCun, Cortes, Burges.
    """

    download: bool = field(default=False, compare=False)

    def load(self, folder: Path) -> Dataset:
        """Shape (1, 28, 28). DataError if the files are not in `folder` or not MNIST's."""
        from torchvision.datasets import MNIST  # here, because it costs a second that other sets need not pay

        train, test = _read("mnist", MNIST, folder, self.download)
        sizes = [tuple(part.data.shape) for part in (train, test)] + [len(part.targets) for part in (train, test)]
        if sizes != [(60_000, 28, 28), (10_000, 28, 28), 60_000, 10_000]:
            raise DataError(
                f"data set 'mnist': the files in {folder} hold {sizes}, not MNIST; delete and fetch them again"
            )
        return Dataset(
            _scaled(train.data.unsqueeze(1), 0.1307, 0.3081),
            train.targets.to(torch.int64),
            _scaled(test.data.unsqueeze(1), 0.1307, 0.3081),
            test.targets.to(torch.int64),
            classes=10,
        )


@dataclass(frozen=True, config=STRICT)
class Cifar10:
    """50,000 + 10,000 RGB images of 32 x 32 pixels, ten classes, normalised by mean 0.5 and deviation 0.5.

    The files are pickles: torchvision compares every file's md5 with its own list before it opens one, and so must any
    other reader.
    download: let torchvision fetch absent files; it is ignored in a table that came from a peer.
    Source: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
    """

    download: bool = field(default=False, compare=False)

    def load(self, folder: Path) -> Dataset:
        """Shape (3, 32, 32). DataError if the files are not in `folder` or a checksum differs."""
        from torchvision.datasets import CIFAR10  # here, because it costs a second that other sets need not pay

        train, test = _read("cifar10", CIFAR10, folder, self.download)
        return Dataset(
            _scaled(torch.from_numpy(train.data).permute(0, 3, 1, 2), 0.5, 0.5),
            torch.tensor(train.targets),
            _scaled(torch.from_numpy(test.data).permute(0, 3, 1, 2), 0.5, 0.5),
            torch.tensor(test.targets),
            classes=10,
        )


def _read(name: str, reader: Callable[..., Any], folder: Path, download: bool) -> tuple[Any, Any]:
    """torchvision's (training, test) objects; its many ways to fail become one DataError."""
    try:
        return reader(folder, train=True, download=download), reader(folder, train=False, download=download)
    except (RuntimeError, OSError, ValueError, AssertionError, EOFError) as error:
        raise DataError(
            f"data set {name!r} is absent from {folder} or damaged there ({str(error) or type(error).__name__}): put "
            "torchvision's files there, name another folder by data_dir or NARSES_DATA_DIR, or set download = true in "
            "your own configuration"
        ) from error


def _scaled(images: Tensor, mean: float, std: float) -> Tensor:
    """uint8 images -> contiguous float32 on the scale 0 to 1, then normalised, with one copy."""
    scaled = torch.empty(images.shape)
    return scaled.copy_(images).div_(255).sub_(mean).div_(std)
