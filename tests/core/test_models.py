"""Every registered model: its size, its determinism, what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from narses import flat
from narses.errors import ConfigError
from narses.models import MODELS, make
from narses.models.compute import choose_device, one_thread

IMAGES = (3, 32, 32)  # every model takes these


@pytest.mark.parametrize(
    ("table", "shape", "dimension"),
    [
        ("softmax", (64,), 650),
        ("softmax", (8, 8), 650),
        ("mlp", (784,), 79_510),
        ("mlp", (1, 28, 28), 79_510),
        ({"name": "mlp", "hidden": 32}, (8, 8), 32 * 65 + 10 * 33),
        ("cnn-s", (3, 32, 32), 117_706),
        ("cnn-s", (1, 28, 28), 117_706 - 2 * 9 * 16),
    ],
)
def test_parameter_counts(table: Any, shape: tuple[int, ...], dimension: int) -> None:
    module = make(table).build(shape, 10, seed=0)
    assert flat.count(module) == dimension
    assert module(torch.zeros(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("init", ["torch", "xavier"])
@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_a_function_of_the_seed_and_leave_the_global_generator_alone(name: str, init: str) -> None:
    model = make({"name": name, "init": init})
    state = torch.get_rng_state()
    first = flat.flatten(model.build(IMAGES, 10, seed=3))
    torch.manual_seed(99)
    again = flat.flatten(model.build(IMAGES, 10, seed=3))
    assert torch.equal(first, again)
    assert not torch.equal(first, flat.flatten(model.build(IMAGES, 10, seed=4)))
    torch.set_rng_state(state)
    model.build(IMAGES, 10, seed=5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", MODELS)
def test_init_has_the_stated_bounds(name: str) -> None:
    for init in ("torch", "xavier"):
        for layer in make({"name": name, "init": init}).build(IMAGES, 10, seed=1).modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            fan_in = layer.weight[0].numel()
            fan_out = layer.weight.numel() // layer.weight.shape[1]
            bound = 1 / math.sqrt(fan_in) if init == "torch" else math.sqrt(6 / (fan_in + fan_out))
            assert 0.9 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)
            assert layer.weight.mean().abs() < 0.25 * bound
            assert layer.bias is not None
            assert (layer.bias == 0).all() if init == "xavier" else 0 < layer.bias.abs().max() <= bound


def test_cnn_s_is_the_textbook_network() -> None:
    """Pooling before ReLU and channels last change speed, not values: held against the layers in textbook order."""
    module = make("cnn-s").build(IMAGES, 10, seed=0)
    p = {name: parameter.detach() for name, parameter in module.named_parameters()}
    x = torch.randn(4, *IMAGES, generator=torch.Generator().manual_seed(0))
    y = functional.max_pool2d(functional.conv2d(x, p["conv1.weight"], p["conv1.bias"]).relu(), 3)
    y = functional.max_pool2d(functional.conv2d(y, p["conv2.weight"], p["conv2.bias"]).relu(), 4)
    assert y.shape == (4, 64, 1, 1)
    y = functional.linear(y.flatten(1), p["hidden1.weight"], p["hidden1.bias"]).relu()
    y = functional.linear(y, p["hidden2.weight"], p["hidden2.bias"]).relu()
    y = functional.linear(y, p["output.weight"], p["output.bias"])
    torch.testing.assert_close(module(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 8, 8), (3, 22, 32), (3, 32, 22), (2, 3, 32, 32)])
def test_cnn_s_refuses_what_it_cannot_take(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        make("cnn-s").build(shape, 10, seed=0)
    assert "'cnn-s'" in str(caught.value)
    assert str(shape) in str(caught.value)


def test_cnn_s_takes_the_smallest_it_names() -> None:
    assert make("cnn-s").build((1, 23, 23), 2, seed=0)(torch.zeros(1, 1, 23, 23)).shape == (1, 2)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("resnet", "unknown model 'resnet': expected one of cnn-s, mlp, softmax"),
        ({"name": "mlp", "hidden": 0}, "hidden = 0"),
        ({"name": "mlp", "hidden": "100"}, "hidden = '100'"),
        ({"name": "mlp", "width": 3}, "unknown key width"),
        ({"name": "softmax", "init": "zeros"}, "init = 'zeros'"),
        ("torch.nn:Linear", "own configuration only"),
        (5, "has no build"),
    ],
)
def test_wrong_tables(table: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(table)
    assert message in str(caught.value)


def test_import_strings_where_trusted() -> None:
    assert make("narses.models.dense:Softmax", trusted=True) == make("softmax")
    with pytest.raises(ConfigError, match="has no build"):
        make("collections:OrderedDict", trusted=True)


def test_one_thread_is_restored() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

    def fail() -> None:
        with one_thread():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == before


def test_devices() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ConfigError, match="device 'tpu'"):
        choose_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="no CUDA device"):
        choose_device("cuda")
