"""The gradient of the mean cross-entropy of one batch, written straight into a row (D,).

B = samples in the batch, H = inputs of a layer, O = outputs of a layer, D = parameters in the flat vector.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from narses import flat
from narses.models.compute import seeded


class Gradient(Protocol):
    """parameters_D, out_D: (D,) contiguous float32 on the CPU; inputs: float32 (B, *shape); labels_B: int64.

    seed: of what the model draws (dropout masks); None for a model that draws nothing.
    """

    def __call__(
        self, parameters_D: Tensor, inputs: Tensor, labels_B: Tensor, out_D: Tensor, seed: int | None = None
    ) -> float:
        """Write the gradient of the mean loss at parameters_D into out_D and return the mean loss."""
        ...


def gradient_of(module: nn.Module, device: torch.device) -> Gradient:
    """The fastest way to differentiate `module` on `device`."""
    if device.type == "cpu" and is_dense(module):
        return DenseGradient(module)
    return AutogradGradient(module, device)


def is_dense(module: nn.Module) -> bool:
    """Whether `module` is Flatten, Linear, (ReLU, Linear)*, all with biases: what DenseGradient differentiates."""
    if type(module) is not nn.Sequential or len(module) < 2 or len(module) % 2:
        return False
    flatten, linears, relus = module[0], list(module[1::2]), list(module[2::2])
    return (
        isinstance(flatten, nn.Flatten)
        and (flatten.start_dim, flatten.end_dim) == (1, -1)
        and all(type(layer) is nn.Linear and layer.bias is not None for layer in linears)
        and all(type(layer) is nn.ReLU for layer in relus)
    )


class DenseGradient:
    """Backpropagation through Linear layers with ReLU between them, by hand.

    Autograd allocates each weight gradient and leaves a copy to do; here a layer's matrix product writes into the row.
    """

    def __init__(self, module: nn.Module) -> None:
        assert is_dense(module)
        self._module = module

    def __call__(
        self, parameters_D: Tensor, inputs: Tensor, labels_B: Tensor, out_D: Tensor, seed: int | None = None
    ) -> float:
        """As Gradient."""
        values, gradients = flat.views(parameters_D, self._module), flat.views(out_D, self._module)
        layers = [(weight_OH, bias_O) for weight_OH, bias_O in zip(values[::2], values[1::2], strict=True)]
        with torch.no_grad():
            inputs_of = [inputs.flatten(1)]  # of each layer, (B, H)
            for weight_OH, bias_O in layers[:-1]:
                inputs_of.append(torch.addmm(bias_O, inputs_of[-1], weight_OH.T).relu_())
            weight_OH, bias_O = layers[-1]
            log_p_BO = torch.log_softmax(torch.addmm(bias_O, inputs_of[-1], weight_OH.T), 1)
            true_B1 = labels_B.unsqueeze(1)
            loss = -log_p_BO.gather(1, true_B1).mean().item()

            # d loss / d logits = (softmax - one hot) / B
            delta_BO = log_p_BO.exp_()
            delta_BO.scatter_add_(1, true_B1, delta_BO.new_full((1, 1), -1.0).expand_as(true_B1)).div_(len(labels_B))
            for k in reversed(range(len(layers))):
                torch.mm(delta_BO.T, inputs_of[k], out=gradients[2 * k])
                torch.sum(delta_BO, 0, out=gradients[2 * k + 1])
                if k:
                    delta_BO = torch.mm(delta_BO, layers[k][0]).mul_(inputs_of[k] > 0)
        return loss


class AutogradGradient:
    """Reverse-mode differentiation by torch: any module, any device, in training mode.

    Buffers (BatchNorm's running statistics) are set back before each call: what one update leaves there no other sees.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module.to(device).train()
        self._parameters = list(self._module.parameters())
        self._buffers = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        self._device = device

    def __call__(
        self, parameters_D: Tensor, inputs: Tensor, labels_B: Tensor, out_D: Tensor, seed: int | None = None
    ) -> float:
        """As Gradient; on another device than the CPU whole vectors are moved, once each way."""
        flat.write(parameters_D.to(self._device), self._module)
        for buffer, first in self._buffers:
            buffer.copy_(first)
        with torch.enable_grad():
            with nullcontext() if seed is None else seeded(seed, self._device):
                loss = cross_entropy(self._module(inputs.to(self._device)), labels_B.to(self._device))
            # A parameter that the loss does not depend on has gradient 0.
            gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        row_D = out_D if self._device.type == "cpu" else torch.empty_like(out_D, device=self._device)
        for view, gradient in zip(flat.views(row_D, self._module), gradients, strict=True):
            view.copy_(gradient)
        if row_D is not out_D:
            out_D.copy_(row_D)
        return loss.item()
