"""Gaussian blobs of any size: for tests, benchmarks and the smallest possible demonstration."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor

from narses.config import STRICT
from narses.datasets.base import Dataset
from narses.seeding import generator


@dataclass(frozen=True, config=STRICT)
class Synthetic:
    """Classes are unit-variance normal centres, samples lie around them with standard deviation `spread` per feature.

    Two centres are about sqrt(2 * features) apart: nearly separable with the defaults, harder with a larger spread.
    Every class has the same number of samples, to within one.
    """

    features: PositiveInt = 20
    classes: int = Field(default=10, ge=2)
    train: PositiveInt = 2000
    test: PositiveInt = 500
    spread: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    seed: NonNegativeInt = 0

    def load(self, folder: Path) -> Dataset:
        """Shape (features,); `folder` is not used."""
        centres = torch.randn(self.classes, self.features, generator=generator(self.seed, "synthetic", "centres"))
        train = self._draw(centres, self.train, "train")
        test = self._draw(centres, self.test, "test")
        return Dataset(*train, *test, classes=self.classes)

    def _draw(self, centres: Tensor, size: int, part: str) -> tuple[Tensor, Tensor]:
        draws = generator(self.seed, "synthetic", part)
        labels = (torch.arange(size) % self.classes)[torch.randperm(size, generator=draws)]
        noise = torch.randn(size, self.features, generator=draws)
        return centres[labels] + self.spread * noise, labels
