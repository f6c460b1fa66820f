"""Models with buffers at the server: running statistics from its own training data, computed anew for each vector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic.dataclasses import dataclass
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from narses import datasets, flat, models
from narses.config import STRICT
from narses.models import initialise
from narses.models.compute import seeded
from narses.seeding import generator
from narses_server.evaluate import STATISTICS, Evaluator
from narses_server.results import Results

DATA = {"name": "synthetic", "features": 6, "classes": 4, "train": 2600, "test": 700, "spread": 1.5, "seed": 1}


@dataclass(frozen=True, config=STRICT)
class Normed:
    """Two BatchNorm layers with dropout before the second, and a constant buffer that is no statistic."""

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Inputs (B, features)."""
        with torch.device("meta"):
            body = nn.Sequential(
                nn.Linear(shape[0], 8),
                nn.BatchNorm1d(8),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.BatchNorm1d(8),
                nn.Linear(8, classes),
            )
        return _Shifted(initialise(body, "torch", seed))


class _Shifted(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("shift", torch.full((1,), 0.3))
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x + self.shift) * self.scratch


OWN = f"{__name__}:Normed"


def _evaluator(seed: int = 3) -> Evaluator:
    return Evaluator(OWN, DATA, seed, None, "cpu")


def _vector(key: int = 0) -> Tensor:
    module = Normed().build((6,), 4, 0)
    return torch.randn(flat.count(module), generator=torch.Generator().manual_seed(key))


def _measured(vector: Tensor, seed: int = 3) -> nn.Module:
    """By hand: layer after layer, each BatchNorm's statistics are the mean over the pass' five batches."""
    data = datasets.load(DATA, None)
    module = Normed().build(data.shape, data.classes, 0)
    flat.write(vector, module)
    chosen = torch.randperm(2600, generator=generator(seed, "statistics"))[:2048]
    parts = [part + 0.3 for part in data.train_inputs[chosen].tensor_split(5)]
    assert isinstance(module, _Shifted)
    assert isinstance(module.body, nn.Sequential)
    with torch.no_grad():
        for layer in module.body:
            if isinstance(layer, nn.BatchNorm1d):
                layer.running_mean = torch.stack([part.mean(0) for part in parts]).mean(0)
                layer.running_var = torch.stack([part.var(0) for part in parts]).mean(0)
                parts = [
                    (part - part.mean(0)) / (part.var(0, unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias
                    for part in parts
                ]
            elif not isinstance(layer, nn.Dropout):
                parts = [layer(part) for part in parts]
    return module.eval()


def test_statistics_are_those_of_one_cumulative_pass_over_2048_training_samples() -> None:
    assert STATISTICS == 2048
    vector = _vector()
    module, data = _measured(vector), datasets.load(DATA, None)
    found = _evaluator().buffers(vector)
    expected = {name: buffer for name, buffer in module.state_dict().items() if name in dict(module.named_buffers())}
    assert found.keys() == expected.keys()
    for name, buffer in expected.items():
        if name.endswith("tracked"):
            assert found[name] == 5
        else:
            torch.testing.assert_close(found[name], buffer, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        logits = module(data.test_inputs)
    score = _evaluator()(vector)
    assert score.accuracy == pytest.approx((logits.argmax(1) == data.test_labels).double().mean().item(), abs=2 / 700)
    assert score.loss == pytest.approx(cross_entropy(logits, data.test_labels).item(), rel=1e-4)


def test_an_evaluation_leaves_nothing_to_the_next_and_draws_nothing() -> None:
    evaluator, state = _evaluator(), torch.get_rng_state()
    vector = _vector()
    first = evaluator(vector)
    evaluator(_vector(1))
    assert evaluator(vector) == first == _evaluator()(_vector())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(vector, _vector())
    assert _evaluator(seed=4)(_vector()).loss != first.loss  # another choice of samples


def test_a_small_set_is_used_whole() -> None:
    table = {**DATA, "train": 90}
    assert Evaluator(OWN, table, 0, None, "cpu").buffers(_vector())["body.1.num_batches_tracked"] == 1


def test_models_without_batch_norm_make_no_pass() -> None:
    evaluator = Evaluator("mlp", DATA, 0, None, "cpu")
    assert len(evaluator._sample) == 0
    assert evaluator.buffers(torch.zeros(6 * 100 + 100 + 404)) == {}


def test_the_vector_is_not_copied() -> None:
    evaluator, vector = _evaluator(), _vector()
    parameters = evaluator._named(vector)
    assert all(p.untyped_storage().data_ptr() == vector.untyped_storage().data_ptr() for p in parameters.values())
    assert all(p.is_meta for module in (evaluator._module, evaluator._measuring) for p in module.parameters())


def test_a_saved_model_classifies_as_it_was_evaluated(tmp_path: Path) -> None:
    evaluator, vector, data = _evaluator(), _vector(), datasets.load(DATA, None)
    results = Results(tmp_path)
    module = Normed().build(data.shape, data.classes, 9)
    results.model("final", vector, module, evaluator.buffers(vector))
    results.finish({})
    module.load_state_dict(load_file(tmp_path / "final.safetensors"))
    with torch.no_grad():
        logits = module.eval()(data.test_inputs)
    assert (logits.argmax(1) == data.test_labels).double().mean().item() == evaluator(vector).accuracy


@pytest.mark.parametrize("name", ["ipm-cnn", "wrn-40-4"])
def test_registered_models_with_batch_norm(name: str) -> None:
    table: dict[str, Any] = {"name": "synthetic", "shape": [3, 8, 8], "classes": 3, "train": 32, "test": 20}
    evaluator = Evaluator(name, table, 0, None, "cpu")
    data = datasets.load(table, None)
    module = models.make(name).build(data.shape, data.classes, 1)
    vector = flat.flatten(module)
    chosen = torch.randperm(32, generator=generator(0, "statistics"))
    for layer in module.modules():
        layer.train(isinstance(layer, nn.BatchNorm2d))
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad(), seeded(0, torch.device("cpu")):
        module(data.train_inputs[chosen])
        logits = module.eval()(data.test_inputs)
    found = evaluator(vector)
    assert found == evaluator(vector)
    assert found.loss == pytest.approx(cross_entropy(logits, data.test_labels).item(), rel=1e-4)
