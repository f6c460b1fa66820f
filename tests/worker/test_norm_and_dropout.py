"""BatchNorm and dropout at a worker: masks are a function of (seed, worker, round), and no update leaves a trace."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout

from narses import datasets, flat, models, partition
from narses.config import STRICT
from narses.errors import ConfigError
from narses.models.compute import seeded
from narses.seeding import derive
from narses.task import LearningRate, Task
from narses_worker.gradients import AutogradGradient
from narses_worker.trainer import Trainer

DATA = {"name": "synthetic", "shape": [2, 8, 8], "classes": 4, "train": 120, "test": 40}


class _Net(nn.Module):
    """Everything that could leak: running statistics, a buffer that grows and is read, two ways to drop, a dead layer."""

    def __init__(self, channels: int, classes: int, drop: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(drop)
        self.output = nn.Linear(6 * 36, classes)
        self.dead = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))
        self._rate = drop

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.drop(self.norm(self.conv(x)).relu()) * self.calls
        return self.output(dropout(y.flatten(1), self._rate, self.training))


@dataclass(frozen=True, config=STRICT)
class Net:
    """_Net, drawn by torch's own initialisation from the task's seed."""

    drop: float = 0.4

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Inputs (B, channels, 8, 8)."""
        with seeded(seed, torch.device("cpu")):
            return _Net(shape[0], classes, self.drop)


@dataclass(frozen=True, config=STRICT)
class NoLogits:
    """A model that forgot its last layer."""

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        """Not (B, classes)."""
        return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * 64, classes + 1))


OWN = f"{__name__}:Net"


def _task(model: Any = OWN, dataset: Any = None, **changes: Any) -> Task:
    table = {"name": model} if isinstance(model, str) else model
    data = datasets.load(dataset or DATA, None)
    module = models.make(table, trusted=True).build(data.shape, data.classes, 5)
    fields: dict[str, Any] = {
        "run_id": bytes(16),
        "run_name": "test",
        "n": 6,
        "rounds": 10,
        "model": table,
        "dataset": dataset or DATA,
        "batch": 7,
        "seed": 5,
        "learning_rate": LearningRate(initial=0.1),
        "dimension": flat.count(module),
        "layout": flat.layout_hash(module),
    }
    return Task(**(fields | changes))


def _trainer(task: Task, workers: Any = range(6)) -> Trainer:
    return Trainer(task, workers, device="cpu", allow=[OWN, f"{__name__}:NoLogits"])


def _parameters(task: Task, key: int = 0) -> Tensor:
    return torch.randn(task.dimension, generator=torch.Generator().manual_seed(key)) * 0.1


def _update(trainer: Trainer, worker: int, round_: int, key: int = 0) -> bytes:
    out = torch.full((trainer.task.dimension,), float("nan"))
    trainer.update(worker, round_, _parameters(trainer.task, key), out)
    return out.numpy().tobytes()


def _reference(task: Task, worker: int, round_: int) -> Tensor:
    """The gradient by a module built for this one update."""
    data = datasets.load(task.dataset, None)
    division = partition.make(task.partition).divide(task.seed, task.n, data.train_labels)
    index = division.batch(worker, round_, task.batch)
    module = models.make(task.model, trusted=True).build(data.shape, data.classes, task.seed).train()
    flat.write(_parameters(task), module)
    with seeded(derive(task.seed, "model", worker, round_), torch.device("cpu")):
        loss = cross_entropy(module(data.train_inputs[index]), data.train_labels[index])
    gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
    whole = [torch.zeros_like(p) if g is None else g for p, g in zip(module.parameters(), gradients, strict=True)]
    return torch.cat([gradient.reshape(-1) for gradient in whole])


def test_an_update_is_that_of_a_module_built_for_it_alone() -> None:
    task = _task()
    trainer = _trainer(task)
    for worker, round_ in [(0, 0), (3, 1), (0, 0)]:
        expected = _reference(task, worker, round_)
        assert torch.equal(torch.frombuffer(bytearray(_update(trainer, worker, round_)), dtype=torch.float32), expected)


def test_the_bits_depend_on_parameters_seed_worker_and_round_alone() -> None:
    task = _task()
    alone = {worker: _update(_trainer(task, [worker]), worker, 2) for worker in range(6)}
    cohort = _trainer(task, [4, 2, 0, 5, 1, 3])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)
            _update(cohort, 3, 9, key=1)
            for worker in (3, 0, 5, 1, 4, 2):
                assert _update(cohort, worker, 2) == alone[worker]
    finally:
        torch.set_num_threads(before)
    assert _update(cohort, 0, 3) != alone[0]


def test_masks_differ_by_seed_worker_and_round() -> None:
    """The same batch for everybody: what differs is the mask."""
    data = {**DATA, "train": 1}
    base = _update(_trainer(_task(dataset=data, partition="iid")), 0, 0)
    trainer = _trainer(_task(dataset=data, partition="iid"))
    assert _update(trainer, 0, 0) == base
    assert len({base, _update(trainer, 1, 0), _update(trainer, 0, 1)}) == 3
    other = _task(dataset=data, partition="iid", seed=6)
    assert _update(_trainer(other), 0, 0) != base
    still = _trainer(_task({"name": OWN, "drop": 0.0}, dataset=data, partition="iid"))
    assert _update(still, 0, 0) == _update(still, 1, 0) == _update(still, 0, 1)


def test_the_global_generator_is_left_alone() -> None:
    trainer = _trainer(_task())
    state = torch.get_rng_state()
    _update(trainer, 0, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_trainers_on_several_threads_do_not_mix_their_masks() -> None:
    task = _task()
    expected = {worker: [_update(_trainer(task, [worker]), worker, r) for r in range(10)] for worker in range(4)}
    trainers = {worker: _trainer(task, [worker]) for worker in range(4)}
    found: dict[int, list[bytes]] = {}

    def play(worker: int) -> None:
        found[worker] = [_update(trainers[worker], worker, r) for r in range(10)]

    threads = [threading.Thread(target=play, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == expected


def test_a_model_that_draws_nothing_does_not_wait_for_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int | None] = []
    plain = AutogradGradient.__call__

    def spy(self: AutogradGradient, *arguments: Any) -> float:
        seeds.append(arguments[-1])
        return plain(self, *arguments)

    monkeypatch.setattr(AutogradGradient, "__call__", spy)
    _update(_trainer(_task({"name": OWN, "drop": 0.0})), 1, 2)
    task = _task()
    _update(_trainer(task), 1, 2)
    assert seeds == [None, derive(task.seed, "model", 1, 2)]


def test_a_parameter_without_influence_has_gradient_0() -> None:
    task = _task()
    out = torch.frombuffer(bytearray(_update(_trainer(task), 0, 0)), dtype=torch.float32)
    assert (out[-12:] == 0).all()
    assert (out[:-12] != 0).any()


def test_ipm_cnn_and_a_wide_residual_network_train() -> None:
    data = {"name": "synthetic", "shape": [3, 16, 16], "classes": 4, "train": 60, "test": 8}
    for model in ({"name": "ipm-cnn", "init": "xavier"}, {"name": "wrn-40-4"}):
        task = _task(model, dataset=data, batch=3)
        trainer = _trainer(task, [0, 1])
        first = _update(trainer, 1, 2)
        _update(trainer, 0, 0)
        assert _update(trainer, 1, 2) == first == _update(_trainer(task, [1]), 1, 2)
        reference = _reference(task, 1, 2)
        torch.testing.assert_close(
            torch.frombuffer(bytearray(first), dtype=torch.float32), reference, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    "kind", [{"name": "label", "labels_per_worker": 2}, {"name": "dirichlet", "alpha": 0.3}], ids=str
)
def test_uneven_partitions(kind: dict[str, Any]) -> None:
    task = _task(partition=kind)
    trainer = _trainer(task)
    for worker in range(6):
        assert torch.frombuffer(bytearray(_update(trainer, worker, 4)), dtype=torch.float32).isfinite().all()


@pytest.mark.parametrize("what", ["model", "dataset", "partition"])
def test_what_is_not_allowed_is_not_imported(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "imported"
    (tmp_path / f"hostile_{what}.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    task = _task(model="softmax").model_copy(update={what: {"name": f"hostile_{what}:Thing"}})
    with pytest.raises(ConfigError, match=rf'{what} .* with the line allow = \["{OWN}", "hostile_{what}:Thing"\]'):
        Trainer(task, [0], device="cpu", allow=[OWN])
    assert not marker.exists()
    with pytest.raises(ConfigError, match="Thing has no"):
        Trainer(task, [0], device="cpu", allow=[f"hostile_{what}:Thing"])
    assert marker.exists()  # the bait was real


def test_a_model_without_logits_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"answers 2 inputs of shape \(2, 8, 8\) with \(2, 5\), expected .* \(2, 4\)"):
        _trainer(_task(f"{__name__}:NoLogits"))


def test_frozen_parameters_are_refused() -> None:
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match="parameter bias is frozen"):
        flat.count(module)
