"""The small convolutional networks of the ALIE, Bulyan and inner-product-manipulation experiments."""

from __future__ import annotations

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, pad

from narses.config import STRICT
from narses.models.base import Init, images, initialise


@dataclass(frozen=True, config=STRICT)
class CnnS:
    """conv 3x3x16, ReLU, max-pool 3; conv 4x4x64, ReLU, max-pool 4; affine 384, 192, classes.

    Convolutions are valid, pools do not overlap: 117,706 parameters for 3x32x32 images and 10 classes, the CIFAR-10
    model of Baruch et al. 2019 ("A Little Is Enough"), section 5, as their code has it.
    """

    init: Init = "torch"

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Inputs (B, channels, height, width), at least 23 pixels a side -> logits (B, classes)."""
        shape = images("cnn-s", shape, 23)  # 23 -> conv3 21 -> pool3 7 -> conv4 4 -> pool4 1
        with torch.device("meta"):
            module = _Network(shape, classes, same=False)
        return initialise(module, self.init, seed).to(memory_format=torch.channels_last)


@dataclass(frozen=True, config=STRICT)
class CnnL:
    """The layers of `cnn-s` with convolutions that keep the size and overlapping pools of stride 2.

    32 pixels end in a 6x6 map of 64 channels: 977,866 parameters for 3x32x32 images and 10 classes. El Mhamdi et al. 2018
    ("The Hidden Vulnerability") give the layers and "10^6" parameters, and neither padding nor strides: these are the
    likeliest of the choices that come to about that many. Their initialisation is "xavier".
    """

    init: Init = "torch"

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Inputs (B, channels, height, width), at least 9 pixels a side -> logits (B, classes)."""
        shape = images("cnn-l", shape, 9)  # 9 -> pool3/2 4 -> pool4/2 1
        with torch.device("meta"):
            module = _Network(shape, classes, same=True)
        return initialise(module, self.init, seed).to(memory_format=torch.channels_last)


@dataclass(frozen=True, config=STRICT)
class IpmCnn:
    """Twice (conv 3x3, ReLU, BatchNorm) at 64 channels, max-pool 2, dropout; again at 128; affine 128, ReLU, dropout, classes.

    Convolutions keep the size: 1,310,922 parameters for 3x32x32 images and 10 classes, the CIFAR-10 model of Xie et al.
    2019 ("Fall of Empires") as their code has it; the text leaves the hidden affine layer out. They use "xavier".
    Its 768 running statistics are buffers: no parameters, and they never travel.
    """

    init: Init = "torch"

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Inputs (B, channels, height, width), at least 4 pixels a side -> logits (B, classes)."""
        shape = images("ipm-cnn", shape, 4)
        with torch.device("meta"):
            module = _Normalised(shape, classes)
        return initialise(module, self.init, seed).to(memory_format=torch.channels_last)


class _Network(nn.Module):
    """same: cnn-l, else cnn-s."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, same: bool) -> None:
        super().__init__()
        self._same = same
        channels, height, width = shape
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1 if same else 0)
        self.conv2 = nn.Conv2d(16, 64, 4)
        self.hidden1 = nn.Linear(64 * self._side(height) * self._side(width), 384)
        self.hidden2 = nn.Linear(384, 192)
        self.output = nn.Linear(192, classes)

    def _side(self, pixels: int) -> int:
        """The side of the last feature map for an image side of `pixels`."""
        if self._same:
            return ((pixels - 3) // 2 + 1 - 4) // 2 + 1
        return ((pixels - 2) // 3 - 3) // 4

    def forward(self, x: Tensor) -> Tensor:
        # Pooling before ReLU gives the same values, because ReLU is monotone, for a ninth (a sixteenth) of its work;
        # with channels last an update takes 0.7 of the textbook order's time on one thread.
        x = x.contiguous(memory_format=torch.channels_last)
        if self._same:
            x = max_pool2d(self.conv1(x), 3, 2).relu()
            # A 4x4 kernel lacks three pixels: one before, two after, as TensorFlow's "SAME" and torch's "same" have it.
            x = max_pool2d(self.conv2(pad(x, (1, 2, 1, 2))), 4, 2).relu()
        else:
            x = max_pool2d(self.conv1(x), 3).relu()
            x = max_pool2d(self.conv2(x), 4).relu()
        x = self.hidden1(x.flatten(1)).relu()
        x = self.hidden2(x).relu()
        logits: Tensor = self.output(x)
        return logits


class _Normalised(nn.Module):
    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        self.conv1, self.norm1 = nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.conv2, self.norm2 = nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.conv3, self.norm3 = nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128)
        self.conv4, self.norm4 = nn.Conv2d(128, 128, 3, padding=1), nn.BatchNorm2d(128)
        self.hidden = nn.Linear(128 * (height // 4) * (width // 4), 128)
        self.output = nn.Linear(128, classes)
        self.drop = nn.Dropout(0.25)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.norm1(self.conv1(x).relu())
        x = self.norm2(self.conv2(x).relu())
        x = self.drop(max_pool2d(x, 2))
        x = self.norm3(self.conv3(x).relu())
        x = self.norm4(self.conv4(x).relu())
        x = self.drop(max_pool2d(x, 2))
        x = self.drop(self.hidden(x.flatten(1)).relu())
        logits: Tensor = self.output(x)
        return logits
