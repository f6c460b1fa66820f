"""How good a parameter vector is: accuracy and loss on the server's own test data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from narses import datasets, flat, models
from narses.models.compute import choose_device, one_thread

BATCH = 500  # fits the caches with CNN-S's feature maps; larger ones are slower on a CPU


class Evaluation(NamedTuple):
    """Over the whole test set: the share (0 to 1) of samples classified rightly, and the mean cross-entropy."""

    accuracy: float
    loss: float


class Evaluator:
    """Pure tensor work for an executor thread, deterministic: the model is run on the vector itself, without a copy of it.

    The tables are the server's own configuration, so import strings and `download` count.
    """

    def __init__(
        self, model_table: Any, dataset_table: Any, seed: int, data_dir: Path | None = None, device: str = "auto"
    ) -> None:
        """ConfigError: an unknown name, an absent device, a model that cannot take the data. DataError: no data."""
        data = datasets.load(dataset_table, data_dir, trusted=True)
        self.device = choose_device(device)
        module = models.make(model_table, trusted=True).build(data.shape, data.classes, seed)
        self._module = module.to("meta").eval()
        self._inputs = data.test_inputs.to(self.device)
        self._labels = data.test_labels.to(self.device)

    def __call__(self, parameters_D: Tensor) -> Evaluation:
        """Evaluate a (D,) float32 vector on any device; InputError if the model has another number of parameters."""
        parameters_D = parameters_D.to(self.device)
        names = [name for name, _ in self._module.named_parameters()]
        parameters = dict(zip(names, flat.views(parameters_D, self._module), strict=True))
        correct, loss = 0, 0.0
        with one_thread(), torch.no_grad():
            for inputs, labels_B in zip(
                torch.split(self._inputs, BATCH), torch.split(self._labels, BATCH), strict=True
            ):
                logits = functional_call(self._module, parameters, inputs)
                correct += int((logits.argmax(1) == labels_B).sum())
                loss += float(cross_entropy(logits, labels_B, reduction="sum"))
        return Evaluation(correct / len(self._labels), loss / len(self._labels))
