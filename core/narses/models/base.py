"""What a model entry offers, and how its parameters are drawn."""

from __future__ import annotations

import math
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn

from narses.seeding import generator

Init = Literal["torch", "xavier"]


@runtime_checkable
class Model(Protocol):
    """A frozen dataclass whose fields are the model's configuration."""

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """The module that maps inputs (B, *shape) to logits (B, classes), its parameters a function of `seed`.

        ConfigError, naming model and shape, if it cannot take such inputs. The global generators are left alone.
        """
        ...


def initialise(module: nn.Module, init: Init, seed: int) -> nn.Module:
    """Allocate `module`, built on the meta device, on the CPU and draw its parameters from the stream (seed, "init").

    "torch": weights and biases uniform in +-1/sqrt(fan in), the distribution of torch's own layers.
    "xavier": weights uniform in +-sqrt(6 / (fan in + fan out)), biases 0 (Glorot and Bengio 2010, equation 16).
    """
    for layer in module.modules():  # Module.to_empty would import sympy for this: a second of every process's start
        for name, parameter in layer.named_parameters(recurse=False):
            setattr(layer, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype)))
    draws = generator(seed, "init")
    for layer in module.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            assert layer is module or not list(layer.parameters(recurse=False)), f"no initialisation for {layer}"
            continue
        bound = 1 / math.sqrt(layer.weight[0].numel())
        if init == "torch":
            nn.init.uniform_(layer.weight, -bound, bound, generator=draws)
        else:
            nn.init.xavier_uniform_(layer.weight, generator=draws)
        if layer.bias is not None:
            with torch.no_grad():
                if init == "torch":
                    layer.bias.uniform_(-bound, bound, generator=draws)
                else:
                    layer.bias.zero_()
    return module
