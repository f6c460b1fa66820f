"""The gradient of the mean cross-entropy of one batch, written straight into a row (D,).

B = samples in the batch, H = inputs of a layer, O = outputs of a layer, D = parameters in the flat vector.
Whatever precision the model is in (float64 in tests of exactness), vectors and inputs must be in it too.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss

from narses import flat
from narses.models.compute import seeded

Precision = Literal["float32", "bfloat16"]
"""Of forward pass and loss; parameters, gradients and what the loss sums are float32 in either case.

On CUDA torch lets cuDNN round the operands of float32 convolutions to TF32, unless torch.backends.cudnn.conv says "ieee".
"""

ONEDNN_FROM = 1 << 21
"""Multiplications of a matrix product from which oneDNN pays: its call costs 15 us, MKL's 2."""


class Gradient(Protocol):
    """parameters_D, out_D: (D,) contiguous float32 on the CPU; inputs: float32 (B, *shape); labels_B: int64.

    seed: of what the model draws (dropout masks); None for a model that draws nothing.
    """

    def __call__(
        self, parameters_D: Tensor, inputs: Tensor, labels_B: Tensor, out_D: Tensor, seed: int | None = None
    ) -> float:
        """Write the gradient of the mean loss at parameters_D into out_D and return the mean loss."""
        ...


def gradient_of(module: nn.Module, device: torch.device, precision: Precision = "float32") -> Gradient:
    """The fastest way to differentiate `module` on `device`, one batch at a time."""
    if device.type == "cpu" and precision == "float32" and is_dense(module):
        return DenseGradient(module)
    return AutogradGradient(module, device, precision)


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
    Every call into torch gives the interpreter away and asks for it back, which two computing threads pay for: hence the
    fused and in-place operations.
    """

    def __init__(self, module: nn.Module) -> None:
        assert is_dense(module)
        self._layout = flat.Layout(module)
        self._onednn = _onednn() if next(module.parameters()).dtype == torch.float32 else None

    def __call__(
        self, parameters_D: Tensor, inputs: Tensor, labels_B: Tensor, out_D: Tensor, seed: int | None = None
    ) -> float:
        """As Gradient."""
        values, gradients = self._layout.views(parameters_D), self._layout.views(out_D)
        weights, biases = values[::2], values[1::2]
        last = len(weights) - 1
        with torch.no_grad():
            inputs_of = [inputs.flatten(1)]  # of each layer, (B, H)
            for k in range(last):
                inputs_of.append(self._affine(inputs_of[k], weights[k], biases[k], relu=True))
            log_p_BO = torch.log_softmax(self._affine(inputs_of[last], weights[last], biases[last]), 1)
            loss = nll_loss(log_p_BO, labels_B).item()

            # d loss / d logits = (softmax - one hot) / B
            delta_BO = log_p_BO.exp_().scatter_(1, labels_B.unsqueeze(1), -1.0, reduce="add").div_(len(labels_B))
            for k in reversed(range(last + 1)):
                self._weight_gradient(delta_BO, inputs_of[k], gradients[2 * k])
                torch.sum(delta_BO, 0, out=gradients[2 * k + 1])
                if k:
                    delta_BO = self._through(delta_BO, weights[k])
                    torch.ops.aten.threshold_backward.grad_input(delta_BO, inputs_of[k], 0, grad_input=delta_BO)
        return loss

    def _affine(self, x_BH: Tensor, weight_OH: Tensor, bias_O: Tensor, *, relu: bool = False) -> Tensor:
        if self._onednn is not None and len(x_BH) * weight_OH.numel() >= ONEDNN_FROM:
            return self._onednn(x_BH, weight_OH, bias_O, "relu" if relu else "none", [], "")
        y_BO = torch.addmm(bias_O, x_BH, weight_OH.T)
        return y_BO.relu_() if relu else y_BO

    def _weight_gradient(self, delta_BO: Tensor, x_BH: Tensor, out_OH: Tensor) -> None:
        if self._onednn is not None and len(x_BH) * out_OH.numel() >= ONEDNN_FROM:
            out_OH.copy_(self._onednn(delta_BO.T, x_BH.T, None, "none", [], ""))
        else:
            torch.mm(delta_BO.T, x_BH, out=out_OH)

    def _through(self, delta_BO: Tensor, weight_OH: Tensor) -> Tensor:
        if self._onednn is not None and len(delta_BO) * weight_OH.numel() >= ONEDNN_FROM:
            return self._onednn(delta_BO, weight_OH.T, None, "none", [], "")
        return torch.mm(delta_BO, weight_OH)


class AutogradGradient:
    """Reverse-mode differentiation by torch: any module, any device, in training mode.

    Buffers (BatchNorm's running statistics) are set back before each call: what one update leaves there no other sees.
    """

    def __init__(self, module: nn.Module, device: torch.device, precision: Precision = "float32") -> None:
        self._module = module.to(device).train()
        self._layout = flat.Layout(module)
        self._parameters: list[Tensor] = list(self._module.parameters())
        self._buffers = [(buffer, buffer.clone()) for buffer in self._module.buffers()]
        self._device = device
        self._precision = precision

    def __call__(
        self, parameters_D: Tensor, inputs: Tensor, labels_B: Tensor, out_D: Tensor, seed: int | None = None
    ) -> float:
        """As Gradient; vectors on another device than the module's are moved whole, once each way."""
        self.load(parameters_D)
        row_D = out_D if out_D.device.type == self._device.type else torch.empty_like(out_D, device=self._device)
        loss = self.differentiate(inputs, labels_B, row_D, seed)
        if row_D is not out_D:
            out_D.copy_(row_D)
        return loss.item()

    def load(self, parameters_D: Tensor) -> None:
        """Differentiate at `parameters_D` from now on."""
        with torch.no_grad():
            torch._foreach_copy_(self._parameters, self._layout.views(parameters_D.to(self._device)))

    def differentiate(self, inputs: Tensor, labels_B: Tensor, out_D: Tensor, seed: int | None = None) -> Tensor:
        """Write the gradient into `out_D`, which is on the device; the mean loss (), there too, and not waited for."""
        for buffer, first in self._buffers:
            buffer.copy_(first)
        with torch.enable_grad():
            with nullcontext() if seed is None else seeded(seed, self._device), autocast(self._device, self._precision):
                loss = cross_entropy(self._module(inputs.to(self._device)), labels_B.to(self._device))
            # A parameter that the loss does not depend on has gradient 0.
            gradients = torch.autograd.grad(loss, self._parameters, materialize_grads=True)
        torch._foreach_copy_(self._layout.views(out_D), gradients)
        return loss.detach()


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Inside, matrix products and convolutions compute in `precision`, and what is sensitive to it in float32.

    Casts are not kept: the parameters change between calls, and under vmap they are not the module's.
    """
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def _onednn() -> Callable[..., Tensor] | None:
    """act(x_BH @ weight_OH.T + bias_O) by oneDNN, with which torch's own products on x86 are MKL's; None without it.

    On a processor of AMD, MKL leaves half of AVX-512 unused: 83 x 784 x 100 takes 79 us here and 139 us there on one thread.
    torch has no public name for it.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return None
    operation = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if operation is None else operation.default
