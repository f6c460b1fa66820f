"""A model and a data set of one's own. Every process of a run imports this file: the server, workers, adversaries."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from narses.config import STRICT
from narses.datasets import Dataset
from narses.models import Init, initialise
from narses.seeding import generator


@dataclass(frozen=True, config=STRICT)
class Spirals:
    """Points of the plane on `arms` spirals that wind around each other; the class of a point is its arm."""

    arms: int = Field(default=3, ge=2)
    train: PositiveInt = 3000
    test: PositiveInt = 600
    noise: float = Field(default=0.05, ge=0, allow_inf_nan=False)

    def load(self, folder: Path) -> Dataset:
        """Shape (2,). A set with files would read them from `folder` (data_dir, NARSES_DATA_DIR or ~/.cache/narses/data)."""
        return Dataset(*self._draw(self.train, "train"), *self._draw(self.test, "test"), classes=self.arms)

    def _draw(self, size: int, part: str) -> tuple[Tensor, Tensor]:
        # The server and every worker must get the same set, so nothing here may depend on anything but the fields.
        draws = generator(0, "spirals", part)
        labels = torch.arange(size) % self.arms
        radius = torch.rand(size, generator=draws)
        angle = 2 * math.pi * (labels / self.arms + radius)
        points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        return points + self.noise * torch.randn(size, 2, generator=draws), labels


@dataclass(frozen=True, config=STRICT)
class SpiralNet:
    """Two hidden layers with BatchNorm, ReLU and dropout."""

    hidden: PositiveInt = 64
    dropout: float = Field(default=0.1, ge=0, lt=1)
    init: Init = "torch"

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Inputs (B, *shape) -> logits (B, classes); the first parameters are a function of `seed`."""
        with torch.device("meta"):  # no memory yet: `initialise` allocates and draws
            module = nn.Sequential(
                nn.Flatten(),
                nn.Linear(math.prod(shape), self.hidden),
                nn.BatchNorm1d(self.hidden),
                nn.ReLU(),
                nn.Dropout(self.dropout),
                nn.Linear(self.hidden, self.hidden),
                nn.BatchNorm1d(self.hidden),
                nn.ReLU(),
                nn.Linear(self.hidden, classes),
            )
        return initialise(module, self.init, seed)
