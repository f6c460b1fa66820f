"""The small convolutional network of the ALIE experiments."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from narses.config import STRICT
from narses.errors import ConfigError
from narses.models.base import Init, initialise

SMALLEST = 23  # pixels a side: 23 -> conv3 21 -> pool3 7 -> conv4 4 -> pool4 1


@dataclass(frozen=True, config=STRICT)
class CnnS:
    """conv 3x3x16, ReLU, max-pool 3; conv 4x4x64, ReLU, max-pool 4; affine 384, 192, classes.

    Convolutions are valid, pools do not overlap: 117,706 parameters for 3x32x32 images and 10 classes, the CIFAR-10
    model of Baruch et al. 2019 ("A Little Is Enough"), section 5, as their code has it.
    """

    init: Init = "torch"

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Inputs (B, channels, height, width), at least 23 pixels a side -> logits (B, classes)."""
        if len(shape) != 3 or min(shape[1:]) < SMALLEST:
            raise ConfigError(
                f"model 'cnn-s' cannot take inputs of shape {shape}: it needs (channels, height, width) "
                f"with height and width of at least {SMALLEST}; choose model 'mlp' or 'softmax' for such data"
            )
        with torch.device("meta"):
            module = _Network(shape, classes)
        return initialise(module, self.init, seed).to(memory_format=torch.channels_last)


class _Network(nn.Module):
    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.conv1 = nn.Conv2d(channels, 16, 3)
        self.conv2 = nn.Conv2d(16, 64, 4)
        self.hidden1 = nn.Linear(64 * _side(height) * _side(width), 384)
        self.hidden2 = nn.Linear(384, 192)
        self.output = nn.Linear(192, classes)

    def forward(self, x: Tensor) -> Tensor:
        # Pooling before ReLU gives the same values, because ReLU is monotone, for a ninth (a sixteenth) of its work;
        # with channels last an update takes 0.7 of the textbook order's time on one thread.
        x = x.contiguous(memory_format=torch.channels_last)
        x = max_pool2d(self.conv1(x), 3).relu()
        x = max_pool2d(self.conv2(x), 4).relu()
        x = self.hidden1(x.flatten(1)).relu()
        x = self.hidden2(x).relu()
        logits: Tensor = self.output(x)
        return logits


def _side(pixels: int) -> int:
    """The side of the last feature map for an image side of `pixels`."""
    return ((pixels - 2) // 3 - 3) // 4
