"""Fully connected models: inputs of any shape are flattened first."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass
from torch import nn

from narses.config import STRICT
from narses.models.base import Init, initialise


@dataclass(frozen=True, config=STRICT)
class Softmax:
    """Multinomial logistic regression: one affine layer, (prod(shape) + 1) * classes parameters, a convex loss."""

    init: Init = "torch"

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Inputs (B, *shape), any shape -> logits (B, classes)."""
        with torch.device("meta"):
            module = nn.Sequential(OrderedDict(flatten=nn.Flatten(), output=nn.Linear(math.prod(shape), classes)))
        return initialise(module, self.init, seed)


@dataclass(frozen=True, config=STRICT)
class Mlp:
    """One hidden layer with ReLU: 784-100-10 has 79,510 parameters, the MNIST model of the ALIE and Bulyan papers."""

    hidden: PositiveInt = 100
    init: Init = "torch"

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Inputs (B, *shape), any shape -> logits (B, classes)."""
        with torch.device("meta"):
            module = nn.Sequential(
                OrderedDict(
                    flatten=nn.Flatten(),
                    hidden=nn.Linear(math.prod(shape), self.hidden),
                    relu=nn.ReLU(),
                    output=nn.Linear(self.hidden, classes),
                )
            )
        return initialise(module, self.init, seed)
