"""scikit-learn's bundled handwritten digits: the default set, because it needs no file and no network."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic.dataclasses import dataclass

from narses.config import STRICT
from narses.datasets.base import Dataset
from narses.seeding import generator

TEST = 297  # of 1,797: leaves 1,500 to train on


@dataclass(frozen=True, config=STRICT)
class Digits:
    """1,797 images of 8 x 8 pixels, scaled to 0-1, ten classes: 1,500 to train, 297 to test, the same split everywhere.

    Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI; as shipped with scikit-learn.
    """

    def load(self, folder: Path) -> Dataset:
        """Shape (8, 8); `folder` is not used."""
        from sklearn.datasets import load_digits  # here, because it costs a second that other sets need not pay

        bunch = load_digits()
        inputs = torch.from_numpy(bunch.images).to(torch.float32).div_(16)
        labels = torch.from_numpy(bunch.target).to(torch.int64)
        size = len(labels)
        shuffled = torch.randperm(size, generator=generator(0, "digits", "split"))
        by_class = shuffled[labels[shuffled].argsort(stable=True)]
        # Evenly spaced in an order sorted by class: each class gives its share to the test set, to within one.
        is_test = torch.zeros(size, dtype=torch.bool)
        is_test[by_class[torch.arange(TEST) * size // TEST]] = True
        return Dataset(inputs[~is_test], labels[~is_test], inputs[is_test], labels[is_test], classes=10)
