"""The wide residual network of the ALIE paper's CIFAR-100 experiments."""

from __future__ import annotations

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import dropout

from narses.config import STRICT
from narses.models.base import Init, images, initialise


@dataclass(frozen=True, config=STRICT)
class Wrn40x4:
    """WRN-40-4: 3 groups of 6 pre-activation blocks at 64, 128 and 256 channels; 8,972,340 parameters for 3x32x32, 100 classes.

    Convolutions have no biases. dropout: between the two convolutions of each block; 0 in the ALIE experiments.
    Zagoruyko and Komodakis 2016, "Wide Residual Networks", as in xternalz' WideResNet-pytorch, which draws convolutions
    from N(0, 2 / (kernel area * output channels)) where we have `init`.
    """

    init: Init = "torch"
    dropout: float = Field(default=0.0, ge=0, lt=1)

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Inputs (B, channels, height, width), at least 8 pixels a side -> logits (B, classes)."""
        shape = images("wrn-40-4", shape, 8)
        with torch.device("meta"):
            module = WideResNet(shape[0], classes, depth=40, widen=4, drop=self.dropout)
        return initialise(module, self.init, seed).to(memory_format=torch.channels_last)


class WideResNet(nn.Module):
    """depth: 6 k + 4 for k blocks per group; widen: channels are 16, 32 and 64 times that."""

    def __init__(self, channels: int, classes: int, *, depth: int, widen: int, drop: float = 0.0) -> None:
        assert depth % 6 == 4
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks, width = [], 16
        for group, stride in enumerate((1, 2, 2)):
            wider = 16 * widen * 2**group
            for _ in range((depth - 4) // 6):
                blocks.append(_Block(width, wider, stride, drop))
                width, stride = wider, 1
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(width)
        self.output = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, classes)."""
        x = self.blocks(self.conv1(x.contiguous(memory_format=torch.channels_last)))
        logits: Tensor = self.output(self.norm(x).relu().mean((2, 3)))
        return logits


class _Block(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))); where shapes differ the skip is a 1x1 convolution of relu(norm(x))."""

    def __init__(self, width: int, wider: int, stride: int, drop: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, wider, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(width, wider, 1, stride=stride, bias=False) if width != wider else None
        self._drop = drop

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x).relu()
        skipped = x if self.skip is None else self.skip(y)
        y = self.norm2(self.conv1(y)).relu()
        if self._drop:
            y = dropout(y, self._drop, self.training)
        total: Tensor = skipped + self.conv2(y)
        return total
