"""Gaussian blobs of any size: for tests, benchmarks and the smallest possible demonstration."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from narses.config import STRICT
from narses.datasets.base import Dataset
from narses.seeding import generator

BLOCK = 1024
"""Samples that get their centres at a time: 50,000 images are 600 MB, and a second copy of them is one too many."""


@dataclass(frozen=True, config=STRICT)
class Synthetic:
    """Classes are unit-variance normal centres, samples lie around them with standard deviation `spread` per feature.

    Two centres are about sqrt(2 * features) apart: nearly separable with the defaults, harder with a larger spread.
    Every class has the same number of samples, to within one.
    features: of one sample, 20 if nothing is said. shape: instead of features, for models that want images, e.g.
    shape = [3, 32, 32]; neighbouring pixels have nothing in common, so use it to measure speed.
    """

    features: PositiveInt | None = None
    shape: tuple[PositiveInt, ...] | None = Field(default=None, min_length=1)
    classes: int = Field(default=10, ge=2)
    train: PositiveInt = 2000
    test: PositiveInt = 500
    spread: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    seed: NonNegativeInt = 0

    @field_validator("shape", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.features is not None and self.shape is not None:
            raise ValueError(f"features = {self.features} and shape = {list(self.shape)} are both there; expected one")
        return self

    def load(self, folder: Path) -> Dataset:
        """Shape (features,) or `shape`; `folder` is not used."""
        shape = self.shape or (self.features or 20,)
        draws = generator(self.seed, "synthetic", "centres")
        centres = torch.randn(self.classes, math.prod(shape), generator=draws)
        (train, train_labels), (test, test_labels) = (
            self._draw(centres, size, part) for size, part in ((self.train, "train"), (self.test, "test"))
        )
        return Dataset(
            train.reshape(-1, *shape), train_labels, test.reshape(-1, *shape), test_labels, classes=self.classes
        )

    def _draw(self, centres: Tensor, size: int, part: str) -> tuple[Tensor, Tensor]:
        draws = generator(self.seed, "synthetic", part)
        labels = (torch.arange(size) % self.classes)[torch.randperm(size, generator=draws)]
        samples = torch.randn(size, centres.shape[1], generator=draws).mul_(self.spread)
        for block, block_labels in zip(torch.split(samples, BLOCK), torch.split(labels, BLOCK), strict=True):
            block.add_(centres[block_labels])
        return samples, labels
