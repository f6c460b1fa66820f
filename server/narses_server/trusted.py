"""The server's own samples of a round, for rules that judge updates by them (Zeno, FLTrust)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from narses import flat
from narses.datasets import Dataset
from narses.models.compute import one_thread
from narses.seeding import generator
from narses_server.model import named


class TrustedData:
    """The server's training set and the run's model, for batches that are a function of (seed, round).

    The server's set is the one the workers' shares are cut from: workers' own samples are among it.
    """

    def __init__(self, module: nn.Module, data: Dataset, seed: int, samples: int) -> None:
        """samples: how many a batch has; all of them where the set has fewer."""
        self._data = data
        self._seed = seed
        self._samples = samples
        self._buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        self._module = copy.deepcopy(module).to("meta").eval()  # dropout off, and without the memory
        for layer in self._module.modules():
            if isinstance(layer, _BatchNorm):
                layer.train()  # the batch's own statistics: nobody else's can be trusted

    def batch(self, round_: int) -> Batch:
        """The samples of round `round_`, drawn without replacement."""
        draws = generator(self._seed, "trusted", round_)
        chosen_B = torch.randperm(len(self._data.train_labels), generator=draws)[: self._samples]
        inputs, labels_B = self._data.train_inputs[chosen_B], self._data.train_labels[chosen_B]
        return Batch(self._module, self._buffers, inputs, labels_B)


class Batch:
    """A `narses.rules.TrustedBatch`: the mean cross-entropy over a few samples, on the CPU and on the calling thread alone."""

    def __init__(self, module: nn.Module, buffers: dict[str, Tensor], inputs: Tensor, labels_B: Tensor) -> None:
        self._module = module
        self._buffers = buffers
        self._inputs = inputs
        self._labels_B = labels_B

    def loss(self, parameters_D: Tensor) -> float:
        """At `parameters_D` (D,) float32; it may be infinite or NaN."""
        with one_thread(), torch.no_grad():
            return float(self._loss(named(parameters_D, self._module)))

    def gradient(self, parameters_D: Tensor) -> Tensor:
        """At `parameters_D` (D,) float32, as fresh (D,) float32."""
        # Each parameter is a leaf of its own: the gradient of a view into the whole vector would be as long as the vector.
        parameters = {name: view.detach().requires_grad_() for name, view in named(parameters_D, self._module).items()}
        gradient_D = torch.zeros_like(parameters_D)
        with one_thread(), torch.enable_grad():
            gradients = torch.autograd.grad(
                self._loss(parameters), list(parameters.values()), allow_unused=True, materialize_grads=True
            )
        for view, gradient in zip(flat.views(gradient_D, self._module), gradients, strict=True):
            view.copy_(gradient)
        return gradient_D

    def _loss(self, parameters: dict[str, Tensor]) -> Tensor:
        # Copies: BatchNorm writes its running statistics, which nobody reads here.
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        logits = functional_call(self._module, parameters | buffers, self._inputs)
        return cross_entropy(logits, self._labels_B)
