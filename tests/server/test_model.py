"""The optimiser's arithmetic, and the parameters' bytes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from narses import datasets, flat, models
from narses_server.config import OptimizerConfig, TaskConfig
from narses_server.model import BLOCK, Optimizer, initial_model, named, norm_if_finite, payload

DATA = {"name": "synthetic", "features": 6, "classes": 4, "train": 40, "test": 4}


def _vectors(count: int, dimension: int = 9) -> Tensor:
    return torch.randn(count, dimension, generator=torch.Generator().manual_seed(1))


@given(
    rate=st.floats(1e-3, 10),
    fading=st.none() | st.floats(1, 1e4),
    momentum=st.sampled_from([0.0, 0.5, 0.99]),
    l2=st.sampled_from([0.0, 1e-4, 0.1]),
)
def test_steps_are_the_papers_in_float64(rate: float, fading: float | None, momentum: float, l2: float) -> None:
    """v <- momentum v - eta(t) (aggregate + l2 w); w <- w + v; eta(t) = eta0 r / (t + r)."""
    optimizer = Optimizer(OptimizerConfig(learning_rate=rate, fading=fading, momentum=momentum, l2=l2), 9)
    parameters_D = _vectors(1)[0].clone()
    w_D, v_D = parameters_D.double().numpy().copy(), np.zeros(9)
    for t, aggregate_D in enumerate(_vectors(5)):
        eta = rate if fading is None else rate * fading / (t + fading)
        assert optimizer.learning_rate(t) == pytest.approx(eta)
        v_D = momentum * v_D - eta * (aggregate_D.double().numpy() + l2 * w_D)
        w_D = w_D + v_D
        before_D = parameters_D.clone()
        newer_D = optimizer.step(parameters_D, aggregate_D.clone(), t)
        assert torch.equal(parameters_D, before_D), "an evaluation may still read the old ones"
        parameters_D = newer_D
    scale = max(1.0, float(np.abs(w_D).max()))
    np.testing.assert_allclose(parameters_D.double().numpy(), w_D, rtol=1e-4, atol=1e-5 * scale)


def test_the_first_step_of_plain_sgd_is_exact() -> None:
    parameters_D = torch.tensor([1.0, -2.0, 0.5])
    newer_D = Optimizer(OptimizerConfig(learning_rate=0.5), 3).step(parameters_D, torch.tensor([2.0, 2.0, -1.0]), 0)
    assert newer_D.tolist() == [0.0, -3.0, 1.0]


def test_with_a_fading_rate_old_steps_keep_the_rate_they_were_taken_at() -> None:
    """eta multiplies before the momentum sum: a second step of zero gradient moves by momentum times the first one."""
    optimizer = Optimizer(OptimizerConfig(learning_rate=1.0, fading=1.0, momentum=0.5), 1)
    parameters_D = optimizer.step(torch.zeros(1), torch.tensor([-4.0]), 0)
    assert parameters_D.item() == 4.0
    assert optimizer.step(parameters_D, torch.zeros(1), 1).item() == 6.0


def test_first_parameters_come_from_the_tasks_seed() -> None:
    data = datasets.load(DATA, None)
    task = TaskConfig(model={"name": "softmax"}, dataset=DATA, batch=8, seed=3)
    vector_D = flat.flatten(initial_model(task, data))
    assert torch.equal(vector_D, flat.flatten(models.make("softmax").build(data.shape, data.classes, 3)))
    assert not torch.equal(vector_D, flat.flatten(initial_model(task.model_copy(update={"seed": 4}), data)))


def test_parameters_under_the_models_own_names() -> None:
    module = models.make({"name": "mlp", "hidden": 3}).build((6,), 4, 0)
    vector_D = _vectors(1, flat.count(module))[0]
    tensors = named(vector_D, copy.deepcopy(module).to("meta"))
    module.load_state_dict(tensors)
    assert torch.equal(flat.flatten(module), vector_D)


def test_the_payload_is_little_endian_float32() -> None:
    parameters_D = torch.tensor([1.0, -0.0, 3.4e38, 1e-45])
    assert bytes(payload(parameters_D)) == np.array([1.0, -0.0, 3.4e38, 1e-45], "<f4").tobytes()


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_that_is_not_finite_has_no_norm(worst: float) -> None:
    vector_D = torch.zeros(BLOCK + 7)
    assert norm_if_finite(vector_D) == 0.0
    vector_D[-1] = worst
    assert norm_if_finite(vector_D) is None


def test_the_norm_is_that_of_float64_over_all_blocks() -> None:
    vector_D = _vectors(1, 2 * BLOCK + 3)[0]
    assert norm_if_finite(vector_D) == pytest.approx(float(np.linalg.norm(vector_D.double().numpy())), rel=1e-12)
    assert norm_if_finite(torch.full((3,), 3e38)) == pytest.approx(3e38 * 3**0.5)
