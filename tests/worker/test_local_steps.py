"""Updates that are more than one gradient of one batch: local steps, momentum, L2, whole shards, micro-batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from narses import datasets, flat, models, partition
from narses.errors import ConfigError, InputError
from narses.task import LearningRate, Task
from narses_worker.batched import BatchedGradient
from narses_worker.trainer import Trainer
from tests.oracles import local as oracle

CLASSES = 10


def task(**changes: Any) -> Task:
    """Softmax regression on the digits, 7 workers with 214 samples each."""
    module = models.make("softmax").build((8, 8), CLASSES, 0)
    fields: dict[str, Any] = {
        "run_id": bytes(16),
        "run_name": "test",
        "n": 7,
        "rounds": 10,
        "model": {"name": "softmax"},
        "dataset": {"name": "digits"},
        "batch": 32,
        "seed": 5,
        "learning_rate": LearningRate(initial=0.3, fading=5.0),
        "dimension": flat.count(module),
        "layout": flat.layout_hash(module),
    }
    return Task(**(fields | changes))


def start(seed: int = 0) -> torch.Tensor:
    return torch.randn(650, generator=torch.Generator().manual_seed(seed)) * 0.1


def share(t: Task, worker: int) -> tuple[Any, Any]:
    """The worker's samples in its order, in float64."""
    data = datasets.load("digits", None)
    division = partition.make(t.partition).divide(t.seed, t.n, data.train_labels)
    index = division.batch(worker, 0, division.share(worker))
    return data.train_inputs[index].flatten(1).double().numpy(), data.train_labels[index].numpy()


def batches(t: Task, worker: int, first: int, count: int) -> list[tuple[Any, Any]]:
    """Steps first .. first + count - 1 through the share, 32 at a time, the last of a pass short."""
    x, y = share(t, worker)
    size = len(y) if t.batch == "shard" else t.batch
    cuts = [slice(at, at + size) for at in range(0, len(y), size)]
    return [(x[cut], y[cut]) for cut in (cuts[k % len(cuts)] for k in range(first, first + count))]


def updates(t: Task, worker: int, rounds: range, trainer: Trainer | None = None) -> list[np.ndarray]:
    """The worker's updates of the rounds at parameters of their own, momentum going on from zero."""
    trainer = trainer or Trainer(t, [worker], device="cpu")
    velocity = torch.zeros(650) if t.local_momentum else None
    rows = []
    for round_ in rounds:
        out = torch.full((650,), float("nan"))
        trainer.update(worker, round_, start(round_), out, velocity)
        rows.append(out.numpy())
    return rows


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("l2", [0.0, 0.01])
def test_parameters_are_those_of_algorithm_1(steps: int, momentum: float, l2: float) -> None:
    t = task(update="parameters", local_steps=steps, local_momentum=momentum, local_l2=l2)
    rows = updates(t, 2, range(3))
    velocity = np.zeros(650)
    for round_, row in enumerate(rows):
        eta = 0.3 * 5 / (round_ + 5)
        expected, velocity = oracle.descend(
            start(round_).double().numpy(), batches(t, 2, round_ * steps, steps), CLASSES, eta, momentum, l2, velocity
        )
        np.testing.assert_allclose(row, expected, rtol=0, atol=2e-6)


def test_a_pass_goes_once_through_the_share_the_short_batch_last() -> None:
    t = task(update="parameters", local_steps="pass")
    (row,) = updates(t, 1, range(1))
    assert len(share(t, 1)[1]) == 214
    expected, _ = oracle.descend(start().double().numpy(), batches(t, 1, 0, 7), CLASSES, 0.3)
    np.testing.assert_allclose(row, expected, rtol=0, atol=2e-6)

    trainer = Trainer(t, [1], device="cpu")
    assert trainer.update(1, 0, start(), torch.empty(650)).samples == 214


@pytest.mark.parametrize("micro", [None, 50, 1000])
def test_a_whole_shard_in_pieces_has_the_gradient_of_the_whole(micro: int | None) -> None:
    t = task(batch="shard", micro_batch=micro)
    (row,) = updates(t, 3, range(1))
    ((x, y),) = batches(t, 3, 0, 1)
    assert len(y) == 214
    np.testing.assert_allclose(row, oracle.gradient(start().double().numpy(), x, y, CLASSES), rtol=0, atol=2e-6)


def test_a_whole_shard_is_one_step_of_a_pass() -> None:
    t = task(update="parameters", batch="shard", local_steps="pass", micro_batch=64)
    np.testing.assert_array_equal(
        updates(t, 3, range(1))[0], updates(task(update="parameters", batch="shard", micro_batch=64), 3, range(1))[0]
    )


@pytest.mark.parametrize("l2", [0.0, 0.01])
def test_momentum_of_gradients_sums_them(l2: float) -> None:
    t = task(local_momentum=0.8, local_l2=l2)
    expected = np.zeros(650)
    for round_, row in enumerate(updates(t, 4, range(4))):
        at = start(round_).double().numpy()
        ((x, y),) = batches(t, 4, round_, 1)
        expected = 0.8 * expected + oracle.gradient(at, x, y, CLASSES) + l2 * at
        np.testing.assert_allclose(row, expected, rtol=0, atol=5e-6)


KINDS: list[dict[str, Any]] = [
    {"update": "parameters", "local_steps": 3, "local_momentum": 0.9},
    {"update": "parameters", "local_steps": "pass"},
    {"batch": "shard", "micro_batch": 50},
    {"local_momentum": 0.9},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_bits_depend_on_worker_and_round_alone(kind: dict[str, Any]) -> None:
    t = task(**kind)
    alone = updates(t, 2, range(3))
    trainer = Trainer(t, range(7), device="cpu")
    for other in (0, 5):
        updates(t, other, range(2), trainer)
    for one, two in zip(alone, updates(t, 2, range(3), trainer), strict=True):
        np.testing.assert_array_equal(one, two)


def test_other_steps_of_a_round_draw_other_poison() -> None:
    t = task(update="parameters", local_steps=2)
    drawn = []

    def poison(inputs: torch.Tensor, labels: torch.Tensor, draws: torch.Generator) -> Any:
        drawn.append(torch.randint(1 << 30, (1,), generator=draws).item())
        return inputs, labels

    trainer = Trainer(t, [0], device="cpu", poison=poison)
    for _ in range(2):
        trainer.update(0, 1, start(), torch.empty(650))
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


def test_momentum_belongs_to_every_update_or_to_none() -> None:
    with pytest.raises(InputError, match=r"velocity_D is absent with local_momentum = 0\.9"):
        Trainer(task(local_momentum=0.9), [0], device="cpu").update(0, 0, start(), torch.empty(650))
    with pytest.raises(InputError, match=r"velocity_D is there with local_momentum = 0\.0"):
        Trainer(task(), [0], device="cpu").update(0, 0, start(), torch.empty(650), torch.zeros(650))


@pytest.mark.parametrize("kind", [{"batch": "shard"}, {"update": "parameters", "local_steps": "pass"}], ids=str)
def test_without_a_share_there_is_no_whole_one(kind: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match='partition "iid" gives a worker no samples of its own'):
        Trainer(task(partition="iid", **kind), [0], device="cpu")


def test_gradients_have_no_local_steps() -> None:
    with pytest.raises(ValueError, match='local_steps = 2 goes with update = "parameters"'):
        task(local_steps=2)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"local_l2": 0.01, "local_momentum": 0.9},
        {"update": "parameters", "local_l2": 0.01},
        {"update": "parameters", "local_momentum": 0.9},
        {"batch": 100},  # short last batches, of unequal length between steps
    ],
    ids=str,
)
def test_all_workers_at_once_are_the_same_updates(kind: dict[str, Any]) -> None:
    """The way that CUDA takes, on the CPU."""
    t = task(**kind)
    module = models.make("softmax").build((8, 8), CLASSES, 0)
    trainer, data = Trainer(t, range(7), device="cpu"), datasets.load("digits", None)
    trainer._together = BatchedGradient(module, torch.device("cpu"))
    trainer._near = (data.train_inputs, data.train_labels)
    velocities = [torch.zeros(650) for _ in range(7)] if t.local_momentum else None
    for round_ in range(3):
        rows = [np.full(650, np.nan, np.float32) for _ in range(7)]
        steps = trainer.updates(range(7), round_, start(round_), rows, velocities)
        for worker, row in enumerate(rows):
            one_by_one = updates(t, worker, range(round_ + 1))[round_]
            np.testing.assert_allclose(row, one_by_one, rtol=0, atol=2e-6)
            if not t.local_momentum:
                alone = trainer.update(worker, round_, start(round_), torch.empty(650))
                np.testing.assert_allclose(steps[worker], alone, rtol=1e-4)


def test_bfloat16_is_for_cuda() -> None:
    with pytest.raises(ConfigError, match="precision = 'bfloat16' is for CUDA, and device = 'cpu' computes on the CPU"):
        Trainer(task(), [0], device="cpu", precision="bfloat16")
