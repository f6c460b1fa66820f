"""Every registered model: its size, its determinism, what it refuses."""

from __future__ import annotations

import math
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from narses import flat
from narses.errors import ConfigError
from narses.models import MODELS, initialise, make
from narses.models.compute import choose_device, one_thread, seeded, trial
from narses.models.wide_resnet import WideResNet

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
        ("cnn-l", (3, 32, 32), 977_866),
        ("cnn-l", (1, 28, 28), 977_866 - 2 * 9 * 16 - (36 - 25) * 64 * 384),
        ("ipm-cnn", (3, 32, 32), 1_310_922),
        ("ipm-cnn", (1, 28, 28), 1_310_922 - 2 * 9 * 64 - (64 - 49) * 128 * 128),
        ("wrn-40-4", (3, 32, 32), 8_972_340 - 90 * 257),  # 10 classes
    ],
)
def test_parameter_counts(table: Any, shape: tuple[int, ...], dimension: int) -> None:
    module = make(table).build(shape, 10, seed=0)
    assert flat.count(module) == dimension
    assert module(torch.zeros(2, *shape)).shape == (2, 10)


def test_cifar_100_s_wide_residual_network_has_the_papers_size() -> None:
    module = make("wrn-40-4").build(IMAGES, 100, seed=0)
    assert flat.count(module) == 8_972_340
    assert len([layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]) == 1 + 3 * 6 * 2 + 3
    assert not any(layer.bias is not None for layer in module.modules() if isinstance(layer, nn.Conv2d))


def test_running_statistics_are_buffers_and_at_their_beginning() -> None:
    module = make("ipm-cnn").build(IMAGES, 10, seed=0)
    statistics = {name: buffer for name, buffer in module.named_buffers() if buffer.is_floating_point()}
    assert sum(buffer.numel() for buffer in statistics.values()) == 768
    assert all((buffer == name.endswith("var")).all() for name, buffer in statistics.items())
    assert all(buffer == 0 for name, buffer in module.named_buffers() if name.endswith("tracked"))


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
            if isinstance(layer, nn.BatchNorm2d):
                assert (layer.weight == 1).all()
                assert (layer.bias == 0).all()
            if not isinstance(layer, nn.Linear | nn.Conv2d):
                continue
            fan_in = layer.weight[0].numel()
            fan_out = layer.weight.numel() // layer.weight.shape[1]
            bound = 1 / math.sqrt(fan_in) if init == "torch" else math.sqrt(6 / (fan_in + fan_out))
            assert 0.9 * bound < layer.weight.abs().max() <= bound * (1 + 1e-6)
            assert layer.weight.mean().abs() < 0.25 * bound
            if layer.bias is None:
                assert name == "wrn-40-4"
                continue
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


def test_cnn_l_is_the_textbook_network() -> None:
    module = make("cnn-l").build(IMAGES, 10, seed=0)
    p = _parameters(module)
    x = torch.randn(4, *IMAGES, generator=torch.Generator().manual_seed(0))
    y = functional.max_pool2d(functional.conv2d(x, p["conv1.weight"], p["conv1.bias"], padding=1).relu(), 3, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it makes a padded copy, as we do
        y = functional.conv2d(y, p["conv2.weight"], p["conv2.bias"], padding="same").relu()
    y = functional.max_pool2d(y, 4, 2)
    assert y.shape == (4, 64, 6, 6)
    y = functional.linear(y.flatten(1), p["hidden1.weight"], p["hidden1.bias"]).relu()
    y = functional.linear(y, p["hidden2.weight"], p["hidden2.bias"]).relu()
    y = functional.linear(y, p["output.weight"], p["output.bias"])
    torch.testing.assert_close(module(x), y, rtol=1e-5, atol=1e-6)


def test_ipm_cnn_is_the_textbook_network() -> None:
    module = make("ipm-cnn").build(IMAGES, 10, seed=0).train()
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            assert layer.p == 0.25
            layer.eval()
    p = _parameters(module)
    x = torch.randn(4, *IMAGES, generator=torch.Generator().manual_seed(0))
    y = x
    for k in (1, 2, 3, 4):
        y = functional.conv2d(y, p[f"conv{k}.weight"], p[f"conv{k}.bias"], padding=1).relu()
        y = functional.batch_norm(y, None, None, p[f"norm{k}.weight"], p[f"norm{k}.bias"], training=True)
        y = functional.max_pool2d(y, 2) if k in (2, 4) else y
    assert y.shape == (4, 128, 8, 8)
    y = functional.linear(y.flatten(1), p["hidden.weight"], p["hidden.bias"]).relu()
    y = functional.linear(y, p["output.weight"], p["output.bias"])
    torch.testing.assert_close(module(x), y, rtol=1e-4, atol=1e-5)


def test_ipm_cnn_drops_at_three_places() -> None:
    module = make("ipm-cnn").build(IMAGES, 10, seed=0).train()
    dropped: list[float] = []
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.register_forward_hook(lambda _, inputs, y: dropped.append(((y == 0) & (inputs[0] != 0)).sum().item()))
    module(torch.randn(8, *IMAGES, generator=torch.Generator().manual_seed(0)))
    sizes = [8 * 64 * 16 * 16, 8 * 128 * 8 * 8, 8 * 128 * 0.5]
    assert [round(count / size, 1) for count, size in zip(dropped, sizes, strict=True)] == pytest.approx(
        [0.25] * 3, abs=0.06
    )


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_wide_residual_network_is_the_textbook_network(drop: float) -> None:
    """xternalz' WideResNet-pytorch, transcribed: here with depth 10 and widening 2."""
    module = initialise(WideResNet(3, 7, depth=10, widen=2, drop=drop), "torch", 0).train()
    p = _parameters(module)
    x = torch.randn(4, *IMAGES, generator=torch.Generator().manual_seed(0))

    def norm_relu(x: Tensor, name: str) -> Tensor:
        return functional.batch_norm(x, None, None, p[f"{name}.weight"], p[f"{name}.bias"], training=True).relu()

    torch.manual_seed(1)
    found = module(x)
    torch.manual_seed(1)
    y = functional.conv2d(x, p["conv1.weight"], padding=1)
    for k, (planes, wider, stride) in enumerate([(16, 32, 1), (32, 64, 2), (64, 128, 2)]):
        assert y.shape[1] == planes
        before = norm_relu(y, f"blocks.{k}.norm1")
        out = norm_relu(
            functional.conv2d(before, p[f"blocks.{k}.conv1.weight"], stride=stride, padding=1), f"blocks.{k}.norm2"
        )
        if drop:  # the mask follows the order in memory
            out = functional.dropout(out.contiguous(memory_format=torch.channels_last), drop)
        out = functional.conv2d(out, p[f"blocks.{k}.conv2.weight"], padding=1)
        y = functional.conv2d(before, p[f"blocks.{k}.skip.weight"], stride=stride) + out
        assert y.shape[1] == wider
    y = functional.avg_pool2d(norm_relu(y, "norm"), 8).flatten(1)
    y = functional.linear(y, p["output.weight"], p["output.bias"])
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-5)


def test_blocks_of_equal_shape_skip_without_a_convolution() -> None:
    module = make("wrn-40-4").build(IMAGES, 100, seed=0)
    skips = [name for name, _ in module.named_parameters() if "skip" in name]
    assert skips == [f"blocks.{k}.skip.weight" for k in (0, 6, 12)]
    block = module.get_submodule("blocks.1")
    with torch.no_grad():
        block.conv2.weight.zero_()  # type: ignore[union-attr, operator]
    x = torch.randn(2, 64, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x)


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize(("name", "smallest"), [("cnn-s", 23), ("cnn-l", 9), ("ipm-cnn", 4), ("wrn-40-4", 8)])
def test_convolutional_models_refuse_what_they_cannot_take(name: str, smallest: int) -> None:
    assert make(name).build((1, smallest, smallest), 2, seed=0)(torch.zeros(2, 1, smallest, smallest)).shape == (2, 2)
    for shape in [(64,), (32, 32), (3, smallest - 1, 32), (3, 32, smallest - 1), (2, 3, 32, 32)]:
        with pytest.raises(ConfigError) as caught:
            make(name).build(shape, 10, seed=0)
        assert repr(name) in str(caught.value)
        assert str(shape) in str(caught.value)
        assert f"at least {smallest}" in str(caught.value)


def test_initialise_keeps_tied_parameters_tied() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        module[1].weight = module[0].weight
    initialise(module, "torch", 0)
    assert module[1].weight is module[0].weight
    assert flat.count(module) == 9 + 3 + 3


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("shift", torch.zeros(3))


def test_initialise_refuses_a_layer_it_knows_no_values_for() -> None:
    with pytest.raises(ConfigError, match=r"no values for scale, shift of layer 1 \(_Scale\)"):
        initialise(nn.Sequential(nn.Linear(3, 3), _Scale()), "torch", 0)
    with pytest.raises(ConfigError, match=r"no values for scale, shift of layer \(the module\)"):
        initialise(_Scale(), "torch", 0)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("resnet", "unknown model 'resnet': expected one of cnn-l, cnn-s, ipm-cnn, mlp, softmax, wrn-40-4"),
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


def test_import_strings_where_trusted_or_allowed() -> None:
    name = "narses.models.dense:Softmax"
    assert make(name, trusted=True) == make("softmax")
    assert make(name, allow=["other:Model", name]) == make("softmax")
    with pytest.raises(ConfigError) as caught:
        make(name, allow=["b:B", "a:A"])
    assert str(caught.value) == (
        f"model {name!r}: import strings are accepted from one's own configuration only; if that code is yours, let this "
        f'program import it with the line allow = ["a:A", "b:B", "{name}"] in its configuration file'
    )
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


CPU = torch.device("cpu")


def test_seeded_draws_are_the_seeds_and_leave_no_trace() -> None:
    state = torch.get_rng_state()
    with seeded(5, CPU):
        first = torch.rand(3)

    def fail() -> None:
        with seeded(6, CPU):
            assert not torch.equal(torch.rand(3), first)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with seeded(5, CPU):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_seeded_draws_are_not_disturbed_by_another_thread_that_wants_its_own() -> None:
    def draw(seed: int) -> Tensor:
        with seeded(seed, CPU):
            return torch.stack([torch.rand(1000) for _ in range(20)])

    alone, found = [draw(seed) for seed in range(4)], dict[int, Tensor]()
    threads = [threading.Thread(target=lambda s=seed: found.update({s: draw(s)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert all(torch.equal(found[seed], alone[seed]) for seed in range(4))


@pytest.mark.parametrize("name", MODELS)
def test_a_trial_tells_whether_a_model_draws(name: str) -> None:
    state = torch.get_rng_state()
    assert trial(make(name).build(IMAGES, 10, 0), torch.zeros(2, *IMAGES), 10) == (name == "ipm-cnn")
    assert torch.equal(torch.get_rng_state(), state)
    if name == "wrn-40-4":
        assert trial(make({"name": name, "dropout": 0.3}).build(IMAGES, 10, 0), torch.zeros(2, *IMAGES), 10)


def test_a_trial_refuses_what_are_no_logits() -> None:
    for module, got in [(nn.Flatten(), r"\(2, 12\)"), (nn.Sequential(nn.Flatten(), nn.LSTM(12, 3)), "tuple")]:
        with pytest.raises(ConfigError, match=rf"2 inputs of shape \(3, 4\) with {got}, expected .*\(2, 3\)"):
            trial(module, torch.zeros(2, 3, 4), 3)
