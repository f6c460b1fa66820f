"""The evaluator: the right numbers over the whole test set, the same ones every time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from narses import datasets, flat, models
from narses.errors import ConfigError, DataError, InputError
from narses_server.evaluate import Evaluation, Evaluator

# 1,234 test samples: several batches and a short last one.
DATA = {"name": "synthetic", "features": 6, "classes": 4, "train": 40, "test": 1234, "spread": 1.5, "seed": 1}


def _vector(dimension: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(dimension, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("model", ["softmax", {"name": "mlp", "hidden": 9}])
def test_accuracy_and_loss_over_the_whole_test_set(model: Any) -> None:
    data = datasets.load(DATA, None)
    module = models.make(model).build(data.shape, data.classes, 0)
    vector = _vector(flat.count(module))
    found = Evaluator(model, DATA, 3, None, "cpu")(vector)
    flat.write(vector, module)
    logits = module.double()(data.test_inputs.double())
    assert found.accuracy == (logits.argmax(1) == data.test_labels).double().mean().item()
    assert found.loss == pytest.approx(cross_entropy(logits, data.test_labels).item(), rel=1e-6)
    assert 0 < found.accuracy < 1


def test_known_values() -> None:
    """All-zero parameters: every class equally likely, the first one wins ties."""
    data = datasets.load(DATA, None)
    found = Evaluator("softmax", DATA, 0, None, "cpu")(torch.zeros(28))
    assert found.loss == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)
    assert found.accuracy == (data.test_labels == 0).double().mean().item()


def test_deterministic_whatever_the_thread_and_history() -> None:
    evaluator = Evaluator("mlp", "digits", 0, None, "cpu")
    vector, before = _vector(7510), torch.get_num_threads()
    first = evaluator(vector)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            evaluator(_vector(7510, seed=1))
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(evaluator, vector).result(timeout=30) == first
    finally:
        torch.set_num_threads(before)
    assert Evaluator("mlp", "digits", 9, None, "cpu")(vector) == first
    assert isinstance(first, Evaluation)
    assert (type(first.accuracy), type(first.loss)) == (float, float)
    assert torch.equal(vector, _vector(7510))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected one vector of 650 values"):
        Evaluator("softmax", "digits", 0, None, "cpu")(torch.zeros(651))
    with pytest.raises(ConfigError, match=r"'cnn-s' cannot take inputs of shape \(8, 8\)"):
        Evaluator("cnn-s", "digits", 0, None, "cpu")
    with pytest.raises(ConfigError, match="device 'gpu'"):
        Evaluator("softmax", "digits", 0, None, "gpu")
    with pytest.raises(DataError, match=str(tmp_path)):
        Evaluator("softmax", "mnist", 0, tmp_path, "cpu")


def test_import_strings_of_ones_own_configuration() -> None:
    table = {"name": "narses.models.dense:Mlp", "hidden": 5}
    assert Evaluator(table, "digits", 0, None, "cpu")(torch.zeros(65 * 5 + 6 * 10)).accuracy > 0
