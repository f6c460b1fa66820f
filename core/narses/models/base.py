"""What a model entry offers, and how its parameters are drawn."""

from __future__ import annotations

import math
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from narses.errors import ConfigError
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


def images(model: str, shape: tuple[int, ...], smallest: int) -> tuple[int, int, int]:
    """`shape` as (channels, height, width); ConfigError if `model` cannot take it: no image, or a side under `smallest`."""
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ConfigError(
            f"model {model!r} cannot take inputs of shape {shape}: it needs (channels, height, width) "
            f"with height and width of at least {smallest}; choose model 'mlp' or 'softmax' for such data"
        )
    return shape


def initialise(module: nn.Module, init: Init, seed: int) -> nn.Module:
    """Allocate `module`, built on the meta device, on the CPU and draw its parameters from the stream (seed, "init").

    "torch": weights and biases uniform in +-1/sqrt(fan in), the distribution of torch's own layers.
    "xavier": weights uniform in +-sqrt(6 / (fan in + fan out)), biases 0 (Glorot and Bengio 2010, equation 16).
    BatchNorm, LayerNorm and GroupNorm: weight 1, bias 0, running mean 0 and variance 1, whatever `init`.
    ConfigError for a layer with other parameters or buffers: whoever wrote it must draw them.
    """
    _allocate(module)
    draws = generator(seed, "init")
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            _draw(layer, init, draws)
        elif isinstance(layer, _BatchNorm | nn.LayerNorm | nn.GroupNorm):
            layer.reset_parameters()  # constants; of BatchNorm the buffers too
        elif own := [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            raise ConfigError(
                f"initialise knows no values for {', '.join(key for key, _ in own)} of layer {name or '(the module)'} "
                f"({type(layer).__name__}): build the model without it and draw them from seeding.generator(seed, ...)"
            )
    return module


def _allocate(module: nn.Module) -> None:
    """Give every parameter and buffer memory on the CPU, shared where it was shared.

    Module.to_empty would do that, but imports sympy: a second of every process's start.
    """
    fresh: dict[int, nn.Parameter] = {}
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in fresh:
                fresh[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
            setattr(layer, name, fresh[id(parameter)])
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(layer, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _draw(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d, init: Init, draws: torch.Generator) -> None:
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
