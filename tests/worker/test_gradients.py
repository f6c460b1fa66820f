"""Gradients against independent transcriptions: exact in float64, close in float32 and bfloat16, and the same bits anywhere."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from narses import flat, models
from narses.models.compute import one_thread
from narses_worker import gradients
from narses_worker.gradients import AutogradGradient, DenseGradient, Gradient, gradient_of

CPU = torch.device("cpu")


class _Slices:
    """Takes a flat vector apart, in order, by shapes written out here."""

    def __init__(self, vector_D: Tensor) -> None:
        self._rest = vector_D

    def __call__(self, *shape: int) -> Tensor:
        size = int(np.prod(shape))
        part, self._rest = self._rest[:size], self._rest[size:]
        return part.reshape(shape)


def _softmax(p: _Slices, x: Tensor) -> Tensor:
    weight, bias = p(10, x[0].numel()), p(10)
    return x.flatten(1) @ weight.T + bias


def _mlp(p: _Slices, x: Tensor) -> Tensor:
    weight, bias, weight2, bias2 = p(100, x[0].numel()), p(100), p(10, 100), p(10)
    return (x.flatten(1) @ weight.T + bias).clamp(min=0) @ weight2.T + bias2


def _affine_tail(p: _Slices, x: Tensor) -> Tensor:
    x = functional.linear(x.flatten(1), p(384, x[0].numel()), p(384)).clamp(min=0)
    x = functional.linear(x, p(192, 384), p(192)).clamp(min=0)
    return functional.linear(x, p(10, 192), p(10))


def _cnn_s(p: _Slices, x: Tensor) -> Tensor:
    x = functional.max_pool2d(functional.conv2d(x, p(16, 3, 3, 3), p(16)).clamp(min=0), 3)
    x = functional.max_pool2d(functional.conv2d(x, p(64, 16, 4, 4), p(64)).clamp(min=0), 4)
    return _affine_tail(p, x)


def _cnn_l(p: _Slices, x: Tensor) -> Tensor:
    x = functional.max_pool2d(functional.conv2d(x, p(16, 3, 3, 3), p(16), padding="same").clamp(min=0), 3, 2)
    weight, bias = p(64, 16, 4, 4), p(64)
    x = functional.max_pool2d(functional.conv2d(functional.pad(x, (1, 2, 1, 2)), weight, bias).clamp(min=0), 4, 2)
    return _affine_tail(p, x)


def _norm(p: _Slices, x: Tensor) -> Tensor:
    weight, bias = p(x.shape[1]), p(x.shape[1])
    centred = x - x.mean((0, 2, 3), keepdim=True)
    scaled = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    return scaled * weight[:, None, None] + bias[:, None, None]


def _ipm_cnn(p: _Slices, x: Tensor) -> Tensor:
    for k, (inputs, outputs) in enumerate([(3, 64), (64, 64), (64, 128), (128, 128)]):
        x = functional.conv2d(x, p(outputs, inputs, 3, 3), p(outputs), padding=1).clamp(min=0)
        x = _norm(p, x)
        if k % 2:
            x = functional.max_pool2d(x, 2)
    x = functional.linear(x.flatten(1), p(128, 128 * 64), p(128)).clamp(min=0)
    return functional.linear(x, p(10, 128), p(10))


FORMULAS: dict[str, Callable[[_Slices, Tensor], Tensor]] = {
    "softmax": _softmax,
    "mlp": _mlp,
    "cnn-s": _cnn_s,
    "cnn-l": _cnn_l,
    "ipm-cnn": _ipm_cnn,
}
EACH = pytest.mark.parametrize("name", FORMULAS)


def build(name: str, shape: tuple[int, ...] = (3, 32, 32)) -> nn.Module:
    """The model, float32, with dropout off."""
    module = models.make(name).build(shape, 10, 3)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return module


def batch(size: int, shape: tuple[int, ...] = (3, 32, 32), seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(size, *shape, generator=draws), torch.randint(10, (size,), generator=draws)


def exact(name: str, parameters_D: Tensor, inputs: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient by plain autograd on the transcription, float64."""
    vector_D = parameters_D.double().requires_grad_()
    loss = functional.cross_entropy(FORMULAS[name](_Slices(vector_D), inputs.double()), labels)
    (gradient_D,) = torch.autograd.grad(loss, vector_D)
    return loss.item(), gradient_D


def relative(a: Tensor, b: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((a.double() - b).abs().max() / b.abs().max())


def distance(a: Tensor, b: Tensor) -> float:
    """The Euclidean distance over the norm: where a rounding flips a maximum, single values differ by more."""
    return float((a.double() - b).norm() / b.norm())


def _compute(
    gradient: Gradient, parameters_D: Tensor, inputs: Tensor, labels: Tensor, **options: Any
) -> tuple[float, Tensor]:
    out_D = torch.full_like(parameters_D, float("nan"))
    return gradient(parameters_D, inputs, labels, out_D, **options), out_D


@EACH
def test_autograd_is_exact_in_float64(name: str) -> None:
    module, (inputs, labels) = build(name), batch(5)
    parameters_D = flat.flatten(module)
    gradient = AutogradGradient(module.double(), CPU)
    expected_loss, expected_D = exact(name, parameters_D, inputs, labels)
    for _ in range(2):
        loss, out_D = _compute(gradient, parameters_D.double(), inputs.double(), labels)
        assert relative(out_D, expected_D) < 1e-9
        assert loss == pytest.approx(expected_loss, rel=1e-12)


def _numpy(sizes: list[int], p: NDArray[Any], x: NDArray[Any], labels: NDArray[Any]) -> tuple[float, NDArray[Any]]:
    """Backpropagation as in a textbook, sample by sample."""
    layers, at = [], 0
    for inputs, outputs in itertools.pairwise(sizes):
        weight = p[at : at + inputs * outputs].reshape(outputs, inputs)
        at += inputs * outputs
        layers.append((weight, p[at : at + outputs]))
        at += outputs
    loss, gradient = 0.0, np.zeros_like(p)
    for sample, label in zip(x, labels, strict=True):
        values = [sample]
        for weight, bias in layers:
            z = weight @ values[-1] + bias
            values.append(np.maximum(z, 0))
        p_O = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        loss -= np.log(p_O[label]) / len(x)
        delta = (p_O - np.eye(len(p_O))[label]) / len(x)
        parts: list[NDArray[Any]] = []
        for (weight, _), value in zip(reversed(layers), reversed(values[:-1]), strict=True):
            parts = [np.outer(delta, value).ravel(), delta, *parts]
            delta = (weight.T @ delta) * (value > 0)
        gradient += np.concatenate(parts)
    return loss, gradient


@pytest.mark.parametrize("sizes", [[12, 10], [12, 9, 10], [12, 7, 8, 10]], ids=str)
def test_by_hand_is_exact_in_float64(sizes: list[int]) -> None:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs_, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs_, outputs), nn.ReLU()]
    module = nn.Sequential(*layers[:-1]).double()
    draws = torch.Generator().manual_seed(1)
    parameters_D = torch.randn(flat.Layout(module).dimension, generator=draws, dtype=torch.float64)
    inputs, labels = batch(11, (3, 2, 2))
    loss, out_D = _compute(DenseGradient(module), parameters_D, inputs.double(), labels)
    expected_loss, expected_D = _numpy(sizes, parameters_D.numpy(), inputs.double().flatten(1).numpy(), labels.numpy())
    assert relative(out_D, torch.from_numpy(expected_D)) < 1e-9
    assert loss == pytest.approx(expected_loss, rel=1e-12)


@pytest.mark.parametrize("name", ["softmax", "mlp"])
def test_by_hand_is_what_autograd_says_in_float64(name: str) -> None:
    module, (inputs, labels) = build(name), batch(83)
    parameters_D = flat.flatten(module)
    loss, out_D = _compute(DenseGradient(module.double()), parameters_D.double(), inputs.double(), labels)
    expected_loss, expected_D = exact(name, parameters_D, inputs, labels)
    assert relative(out_D, expected_D) < 1e-9
    assert loss == pytest.approx(expected_loss, rel=1e-12)


# ipm-cnn: torch's batch normalisation on the CPU is good to 1e-4, after which some maxima of its pools are other pixels.
@pytest.mark.parametrize(
    ("name", "size", "tolerance"),
    [("softmax", 83, 1e-6), ("mlp", 83, 1e-6), ("cnn-s", 20, 1e-5), ("cnn-l", 20, 1e-5), ("ipm-cnn", 6, 2e-2)],
)
def test_float32_is_close_to_exact(name: str, size: int, tolerance: float) -> None:
    module, (inputs, labels) = build(name), batch(size)
    parameters_D = flat.flatten(module)
    expected_loss, expected_D = exact(name, parameters_D, inputs, labels)
    for gradient in (gradient_of(module, CPU), AutogradGradient(module, CPU)):
        loss, out_D = _compute(gradient, parameters_D, inputs, labels)
        assert distance(out_D, expected_D) < tolerance
        assert loss == pytest.approx(expected_loss, rel=1e-4)


# bfloat16 has 8 bits, and where it moves a sum over a ReLU's kink a value differs altogether.
@pytest.mark.parametrize(("name", "tolerance"), [("softmax", 1e-2), ("mlp", 6e-2), ("cnn-s", 1e-1)])
def test_bfloat16_is_near_and_leaves_float32_behind(name: str, tolerance: float) -> None:
    module, (inputs, labels) = build(name), batch(32)
    parameters_D = flat.flatten(module)
    gradient = gradient_of(module, CPU, "bfloat16")
    expected_loss, expected_D = exact(name, parameters_D, inputs, labels)
    loss, out_D = _compute(gradient, parameters_D, inputs, labels)
    assert 1e-4 < distance(out_D, expected_D) < tolerance  # not float32 under another name
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert out_D.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    assert torch.equal(flat.flatten(module), parameters_D)


def test_each_is_used_where_it_is_fastest() -> None:
    dense, other = build("mlp"), build("cnn-s")
    assert isinstance(gradient_of(dense, CPU), DenseGradient)
    assert isinstance(gradient_of(dense, CPU, "bfloat16"), AutogradGradient)
    assert isinstance(gradient_of(other, CPU), AutogradGradient)
    assert isinstance(gradient_of(dense, torch.device("meta")), AutogradGradient)


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the products that oneDNN made."""
    operation = gradients._onednn()
    made: list[tuple[int, ...]] = []
    if operation is None:
        pytest.skip("no oneDNN in this build of torch")

    def spy(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        made.append((*x.shape, len(weight)))
        return operation(x, weight, *rest)

    monkeypatch.setattr(gradients, "_onednn", lambda: spy)
    return made


def test_large_products_are_onednn_s_and_right(onednn: list[tuple[int, ...]]) -> None:
    shape = (1, 28, 28)
    module, (inputs, labels) = build("mlp", shape), batch(83, shape)
    parameters_D = flat.flatten(module)
    gradient = DenseGradient(module)
    loss, out_D = _compute(gradient, parameters_D, inputs, labels)
    assert onednn == [(83, 784, 100), (100, 83, 784)]
    gradient._onednn = None
    plain_loss, plain_D = _compute(gradient, parameters_D, inputs, labels)
    assert not torch.equal(out_D, plain_D)
    expected_loss, expected_D = exact("mlp", parameters_D, inputs, labels)
    assert max(distance(out_D, expected_D), distance(plain_D, expected_D)) < 1e-6
    assert loss == pytest.approx(expected_loss, rel=1e-6) == plain_loss


def test_every_product_of_wide_layers_is_onednn_s(onednn: list[tuple[int, ...]]) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 130))
    inputs, labels = batch(64, (3, 8, 8))
    parameters_D = flat.flatten(module)
    _, out_D = _compute(DenseGradient(module), parameters_D, inputs, labels)
    assert onednn == [(64, 192, 256), (64, 256, 130), (130, 64, 256), (64, 130, 256), (256, 64, 192)]
    _, expected_D = _compute(AutogradGradient(module.double(), CPU), parameters_D.double(), inputs.double(), labels)
    assert distance(out_D, expected_D) < 1e-6


def _at_offset(vector_D: Tensor, floats: int) -> Tensor:
    room = torch.empty(vector_D.numel() + 16)
    return room[floats : floats + vector_D.numel()].copy_(vector_D.reshape(-1)).view(vector_D.shape)


@pytest.mark.parametrize(("name", "shape", "size"), [("mlp", (1, 28, 28), 83), ("cnn-s", (3, 32, 32), 32)])
def test_bits_depend_on_parameters_and_inputs_alone(name: str, shape: tuple[int, ...], size: int) -> None:
    """Not on threads, on what ran before, on where the batch lies, on the object, or on another thread computing meanwhile."""
    module, (inputs, labels) = build(name, shape), batch(size, shape)
    parameters_D = flat.flatten(module)
    with one_thread():
        _, expected_D = _compute(gradient_of(module, CPU), parameters_D, inputs, labels)
    gradient = gradient_of(build(name, shape), CPU)
    before = torch.get_num_threads()
    try:
        for threads, offset in ((1, 1), (2, 3), (4, 8)):
            torch.set_num_threads(threads)
            with one_thread():
                _compute(gradient, parameters_D * 2, *batch(17, shape, seed=threads))
                _, out_D = _compute(gradient, parameters_D, _at_offset(inputs, offset), labels)
            assert torch.equal(out_D, expected_D)
    finally:
        torch.set_num_threads(before)

    found: list[Tensor] = []

    def play() -> None:
        own = gradient_of(build(name, shape), CPU)
        with one_thread():
            found.extend(_compute(own, parameters_D, inputs, labels)[1] for _ in range(20))

    threads_ = [threading.Thread(target=play) for _ in range(2)]
    for thread in threads_:
        thread.start()
    for thread in threads_:
        thread.join(timeout=60)
    assert len(found) == 40
    assert all(torch.equal(out_D, expected_D) for out_D in found)


def test_a_dead_relu_passes_nothing_on() -> None:
    hidden = nn.Linear(4, 3)
    module = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(3, 10))
    with torch.no_grad():
        hidden.weight.fill_(-1.0)
        hidden.bias.zero_()
    inputs = torch.ones(2, 4)
    inputs[1] = 0.0  # and exactly at the kink
    _, out_D = _compute(DenseGradient(module), flat.flatten(module), inputs, torch.tensor([1, 2]))
    assert (out_D[:15] == 0).all()
    assert (out_D[-10:] != 0).any()
