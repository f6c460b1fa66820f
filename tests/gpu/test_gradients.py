"""On CUDA the gradients are those of the CPU: to 1e-9 in float64, and close in what training uses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from narses import flat, models
from narses_worker.batched import BatchedGradient, Method
from narses_worker.gradients import AutogradGradient

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WORKERS, SAMPLES, SHORT = 5, 12, 7  # the last worker's batch is short
EACH = pytest.mark.parametrize("name", ["mlp", "cnn-s", "cnn-l", "ipm-cnn"])
BY = pytest.mark.parametrize("method", ["vmap", "loop"])

# A rounding can make another pixel the maximum of a pool; among so many, a few do. BatchNorm spreads it over the batch.
FLOAT32 = {"mlp": 1e-5, "cnn-s": 2e-3, "cnn-l": 2e-3, "ipm-cnn": 2e-2}
BFLOAT16 = {"mlp": 0.1, "cnn-s": 0.15, "cnn-l": 0.15, "ipm-cnn": 0.4}


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """cuDNN's convolutions round float32 to 10 bits by default; here they must not."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    yield
    convolutions.fp32_precision = before


def _build(name: str) -> nn.Module:
    module = models.make(name).build((3, 32, 32), 10, 3)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return module


def _batches() -> tuple[list[Tensor], list[Tensor]]:
    draws = torch.Generator().manual_seed(4)
    sizes = [SAMPLES] * (WORKERS - 1) + [SHORT]
    inputs = [torch.randn(size, 3, 32, 32, generator=draws) for size in sizes]
    return inputs, [torch.randint(10, (size,), generator=draws) for size in sizes]


def _exact(name: str) -> tuple[Tensor, list[float], Tensor]:
    """Parameters (D,), losses and gradients (K, D) by the CPU in float64."""
    parameters_D = flat.flatten(_build(name)).double()
    gradient = AutogradGradient(_build(name).double(), CPU)
    out_KD = torch.empty(WORKERS, len(parameters_D), dtype=torch.float64)
    losses = [gradient(parameters_D, x.double(), y, row) for x, y, row in zip(*_batches(), out_KD, strict=True)]
    return parameters_D, losses, out_KD


def _distance(a: Tensor, b: Tensor) -> float:
    return float(((a.cpu().double() - b).norm(dim=1) / b.norm(dim=1)).max())


@BY
@EACH
def test_all_workers_at_once_are_exact_in_float64(name: str, method: Method) -> None:
    parameters_D, expected_losses, expected_KD = _exact(name)
    inputs, labels = _batches()
    gradient = BatchedGradient(_build(name).double(), CUDA, method=method, chunk=3)
    out_KD = torch.empty_like(expected_KD)
    losses = gradient(parameters_D, [x.double() for x in inputs], labels, out_KD)
    assert gradient.method == method
    assert _distance(out_KD, expected_KD) < 1e-9
    assert losses == pytest.approx(expected_losses, rel=1e-9)


@BY
@EACH
@pytest.mark.parametrize("where", ["cpu", "pinned", "cuda"])
def test_all_workers_at_once_in_float32(name: str, method: Method, where: str) -> None:
    parameters_D, expected_losses, expected_KD = _exact(name)
    gradient = BatchedGradient(_build(name), CUDA, method=method)
    out_KD = torch.empty(expected_KD.shape, device="cuda" if where == "cuda" else "cpu", pin_memory=where == "pinned")
    losses = gradient(parameters_D.float(), *_batches(), out_KD)
    assert gradient.method == method
    assert _distance(out_KD, expected_KD) < FLOAT32[name]
    assert losses == pytest.approx(expected_losses, rel=1e-4)


@EACH
def test_one_by_one(name: str) -> None:
    parameters_D, expected_losses, expected_KD = _exact(name)
    gradient = AutogradGradient(_build(name), CUDA)
    out_KD = torch.empty(expected_KD.shape)
    losses = [gradient(parameters_D.float(), x, y, row) for x, y, row in zip(*_batches(), out_KD, strict=True)]
    assert _distance(out_KD, expected_KD) < FLOAT32[name]
    assert losses == pytest.approx(expected_losses, rel=1e-4)


@BY
@EACH
def test_bfloat16(name: str, method: Method) -> None:
    parameters_D, expected_losses, expected_KD = _exact(name)
    gradient = BatchedGradient(_build(name), CUDA, "bfloat16", method=method)
    out_KD = torch.empty(expected_KD.shape)
    losses = gradient(parameters_D.float(), *_batches(), out_KD)
    assert gradient.method == method
    assert 1e-4 < _distance(out_KD, expected_KD) < BFLOAT16[name]
    assert losses == pytest.approx(expected_losses, rel=3e-2)


@BY
def test_dropout_on_cuda_follows_the_seeds(method: Method) -> None:
    module = models.make("ipm-cnn").build((3, 8, 8), 10, 0)
    parameters_D = flat.flatten(module)
    inputs, labels = [torch.ones(4, 3, 8, 8)] * 3, [torch.arange(4)] * 3
    gradient = BatchedGradient(module, CUDA, method=method)
    before = torch.cuda.get_rng_state()
    found = []
    for seeds in ([1, 2, 3], [1, 2, 3], [4, 5, 6]):
        out_KD = torch.empty(3, len(parameters_D))
        gradient(parameters_D, inputs, labels, out_KD, seeds)
        found.append(out_KD)
    assert gradient.method == method
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert _distance(found[1], found[0].double()) < 1e-2  # cuDNN may sum in another order
    assert min(_distance(found[2], found[0].double()), _distance(found[0][:2], found[0][1:].double())) > 0.1
