"""Label flip: train honestly on dishonest labels."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field
from pydantic.dataclasses import dataclass

from narses.config import STRICT
from narses.errors import ConfigError, InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, config=STRICT)
class LabelFlip:
    """Every label y of a batch becomes C - 1 - y (9 - y for ten classes); inputs stay as they are.

    An attack on data: the update is then computed honestly. Cost O(batch).

    classes: C, usually left to `bind`, which the trainer calls with its data set's number.

    The poisoning attack that Xie, Koyejo, Gupta, "Fall of Empires" (2019), compares itself with.
    """

    classes: Annotated[int, Field(ge=2)] | None = None

    def bind(self, classes: int) -> Self:
        """The same attack for a data set of `classes` classes; ConfigError if it was configured for another number."""
        if self.classes not in (None, classes):
            raise ConfigError(
                f"label-flip: classes = {self.classes}, but the data set has {classes}: leave classes out"
            )
        return dataclasses.replace(self, classes=classes)

    def __call__(self, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(inputs, flipped labels), both fresh memory. InputError where a label is not in 0..C-1."""
        if self.classes is None:
            raise ConfigError(
                "label-flip: the number of classes is unknown: set classes, or bind the attack to a data set"
            )
        if labels.numel() and not bool(((labels >= 0) & (labels < self.classes)).all()):
            low, high = labels.min().item(), labels.max().item()
            raise InputError(f"label-flip: labels are 0..{self.classes - 1}, the batch has {low}..{high}")
        return inputs.clone(), self.classes - 1 - labels
