"""scikit-learn's bundled handwritten digits: the default set, because it needs no file and no network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from narses.config import STRICT
from narses.datasets.base import Dataset
from narses.errors import DataError
from narses.seeding import generator

TEST = 297  # of 1,797: leaves 1,500 to train on


@dataclass(frozen=True, config=STRICT)
class Digits:
    """1,797 images of 8 x 8 pixels, scaled to 0-1, ten classes: 1,500 to train, 297 to test, the same split everywhere.

    Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI; as shipped with scikit-learn.
    """

    def load(self, folder: Path) -> Dataset:
        """Shape (8, 8); `folder` is not used."""
        rows = torch.from_numpy(_rows())
        inputs = rows[:, :-1].reshape(-1, 8, 8).to(torch.float32).div_(16)
        labels = rows[:, -1].to(torch.int64)
        size = len(labels)
        shuffled = torch.randperm(size, generator=generator(0, "digits", "split"))
        by_class = shuffled[labels[shuffled].argsort(stable=True)]
        # Evenly spaced in an order sorted by class: each class gives its share to the test set, to within one.
        is_test = torch.zeros(size, dtype=torch.bool)
        is_test[by_class[torch.arange(TEST) * size // TEST]] = True
        return Dataset(inputs[~is_test], labels[~is_test], inputs[is_test], labels[is_test], classes=10)


def _rows() -> NDArray[np.float64]:
    """(1797, 65): 64 pixels of 0-16 and the label, from scikit-learn's own file.

    Found without importing scikit-learn, which would cost every process two seconds for one small table.
    """
    spec = importlib.util.find_spec("sklearn")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    for folder in folders:
        file = folder / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",", dtype=np.float64)
    raise DataError("scikit-learn's digits.csv.gz is not installed here: reinstall scikit-learn")
