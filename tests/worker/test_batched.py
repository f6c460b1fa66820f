"""All workers at once: what each would compute alone, whatever the chunks, and no worker sees another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from narses import flat, models
from narses_worker import batched
from narses_worker.batched import BatchedGradient, Method
from narses_worker.gradients import AutogradGradient, Precision

CPU = torch.device("cpu")
SHAPE = (3, 32, 32)
METHODS: list[Method] = ["vmap", "loop"]
BY = pytest.mark.parametrize("method", METHODS)
NAMES = ["softmax", "mlp", "cnn-s", "ipm-cnn"]


def build(name: str) -> nn.Module:
    """A registered model with dropout off."""
    module = models.make(name).build(SHAPE, 10, 3)
    for layer in module.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    return module


def batches(*sizes: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    """Batches of the workers 0, 1, ..."""
    draws = torch.Generator().manual_seed(4)
    inputs = [torch.randn(size, *SHAPE, generator=draws).to(dtype) for size in sizes]
    return inputs, [torch.randint(10, (size,), generator=draws) for size in sizes]


def alone(
    module: nn.Module, parameters_D: Tensor, inputs: Sequence[Tensor], labels: Sequence[Tensor], **options: Any
) -> tuple[list[float], Tensor]:
    """One worker after the other."""
    gradient = AutogradGradient(copy.deepcopy(module), CPU, **options)
    out_KD = torch.empty(len(inputs), len(parameters_D), dtype=parameters_D.dtype)
    return [gradient(parameters_D, x, y, row) for x, y, row in zip(inputs, labels, out_KD, strict=True)], out_KD


def together(
    gradient: BatchedGradient, parameters_D: Tensor, inputs: Any, labels: Any, seeds: Sequence[int] | None = None
) -> tuple[list[float], Tensor]:
    out_KD = torch.full((len(inputs), len(parameters_D)), float("nan"), dtype=parameters_D.dtype)
    return gradient(parameters_D, inputs, labels, out_KD, seeds), out_KD


def distance(a: Tensor, b: Tensor) -> float:
    """The largest distance of a worker's gradient, over its norm."""
    return float(((a - b).norm(dim=1) / b.norm(dim=1)).max())


@BY
@pytest.mark.parametrize("name", NAMES)
def test_exactly_what_each_worker_computes_alone(name: str, method: Method) -> None:
    """In float64, in chunks of 2, with batches of three lengths in turn."""
    module = build(name).double()
    parameters_D = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    inputs, labels = batches(4, 2, 4, 3, 4, dtype=torch.float64)
    expected_losses, expected_KD = alone(module, parameters_D, inputs, labels)
    gradient = BatchedGradient(module, CPU, method=method, chunk=2)
    for _ in range(2):
        losses, out_KD = together(gradient, parameters_D, inputs, labels)
        assert distance(out_KD, expected_KD) < 1e-9
        assert losses == pytest.approx(expected_losses, rel=1e-12)
    assert gradient.method == method


@BY
@pytest.mark.parametrize("name", ["softmax", "mlp", "cnn-s"])
def test_close_in_float32(name: str, method: Method) -> None:
    module = build(name)
    parameters_D, (inputs, labels) = flat.flatten(module), batches(8, 8, 5)
    expected_losses, expected_KD = alone(module, parameters_D, inputs, labels)
    losses, out_KD = together(BatchedGradient(module, CPU, method=method), parameters_D, inputs, labels)
    assert distance(out_KD, expected_KD) < 1e-5
    assert losses == pytest.approx(expected_losses, rel=1e-5)


@BY
@pytest.mark.parametrize("name", NAMES)
def test_near_in_bfloat16(name: str, method: Method) -> None:
    module = build(name)
    parameters_D, (inputs, labels) = flat.flatten(module), batches(8, 8)
    expected_losses, expected_KD = alone(module, parameters_D, inputs, labels)
    gradient = BatchedGradient(module, CPU, "bfloat16", method=method)
    losses, out_KD = together(gradient, parameters_D, inputs, labels)
    assert gradient.method == method
    assert out_KD.dtype == torch.float32
    assert 1e-4 < distance(out_KD, expected_KD) < (0.3 if name == "ipm-cnn" else 0.1)
    assert losses == pytest.approx(expected_losses, rel=2e-2)


def test_stacked_batches_and_rows_elsewhere() -> None:
    """Rows may be padded, and in an order that the batches' lengths do not follow."""
    module = build("mlp")
    parameters_D, (inputs, labels) = flat.flatten(module), batches(4, 4, 4)
    gradient = BatchedGradient(module, CPU)
    losses, expected_KD = together(gradient, parameters_D, inputs, labels)
    matrix = torch.full((3, len(parameters_D) + 9), float("nan"))
    rows_KD = matrix[:, : len(parameters_D)]
    assert gradient(parameters_D, torch.stack(inputs), torch.stack(labels), rows_KD) == losses
    assert torch.equal(rows_KD, expected_KD)
    assert matrix[:, len(parameters_D) :].isnan().all()
    assert gradient(parameters_D, [], [], rows_KD[:0]) == []


class Odd(nn.Module):
    """BatchNorm with statistics, a buffer that is read and written, parameters of every number of axes, a dead layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.norm = nn.BatchNorm2d(3)
        self.output = nn.Linear(3 * 32 * 32, 10)
        self.dead = nn.Linear(2, 2)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        self.seen += x.mean((0, 2, 3))  # a batch's own, so a worker's own
        logits: Tensor = self.output((self.norm(x * self.scale) + self.seen[:, None, None]).flatten(1))
        return logits


@BY
def test_buffers_are_each_worker_s_own_and_left_as_they_were(method: Method) -> None:
    module = Odd().double()
    state = copy.deepcopy(module.state_dict())
    parameters_D = torch.cat([parameter.detach().reshape(-1) for parameter in module.parameters()])
    inputs, labels = batches(4, 4, 4, dtype=torch.float64)
    _, expected_KD = alone(module, parameters_D, inputs, labels)
    gradient = BatchedGradient(module, CPU, method=method)
    for _ in range(2):
        _, out_KD = together(gradient, parameters_D + 0.0, inputs, labels)
        assert distance(out_KD, expected_KD) < 1e-9
    assert gradient.method == method
    assert (out_KD[:, -6:] == 0).all()
    after = module.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


class Dropping(nn.Module):
    """Half of the inputs dropped, then one affine layer: its weight gradient is 0 where all samples dropped an input."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.output = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.output(functional.dropout(x.flatten(1), self.rate, self.training))
        return logits


@BY
def test_masks_differ_from_worker_to_worker_and_follow_the_seeds(method: Method) -> None:
    module = Dropping(0.4)
    parameters_D = flat.flatten(module)
    inputs, labels = (part * 6 for part in batches(1))  # the same sample for everybody
    gradient = BatchedGradient(module, CPU, method=method, chunk=4)
    before = torch.get_rng_state()
    _, out_KD = together(gradient, parameters_D, inputs, labels, range(6))
    assert gradient.method == method
    assert torch.equal(torch.get_rng_state(), before)
    dropped_KD = out_KD[:, : 3 * 32 * 32] == 0  # of the first row of the weight
    assert dropped_KD.double().mean(1).tolist() == pytest.approx([0.4] * 6, abs=0.05)  # 3072 draws: sigma = 0.009
    for a in range(6):
        for b in range(a):
            both = (dropped_KD[a] & dropped_KD[b]).double().mean().item()
            assert both == pytest.approx(0.16, abs=0.05)  # independent
    assert torch.equal(together(gradient, parameters_D, inputs, labels, range(6))[1], out_KD)
    other_KD = together(gradient, parameters_D, inputs, labels, range(1, 7))[1]
    assert not any(torch.equal(other_D, out_D) for other_D, out_D in zip(other_KD, out_KD, strict=True))


def test_in_the_loop_a_seed_gives_the_masks_that_it_gives_alone() -> None:
    module = Dropping(0.4)
    parameters_D, (inputs, labels) = flat.flatten(module), batches(3, 3)
    expected_D = torch.empty_like(parameters_D)
    AutogradGradient(copy.deepcopy(module), CPU)(parameters_D, inputs[1], labels[1], expected_D, 17)
    _, out_KD = together(BatchedGradient(module, CPU, method="loop"), parameters_D, inputs, labels, [5, 17])
    assert torch.equal(out_KD[1], expected_D)


class Branching(nn.Module):
    """Looks at its values: vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Linear(3 * 32 * 32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        y: Tensor = self.output(x.flatten(1))
        return y if y.sum() > 0 else -y


def test_what_vmap_cannot_take_is_done_in_the_loop() -> None:
    module = Branching()
    parameters_D, (inputs, labels) = flat.flatten(module), batches(3, 3, 3)
    _, expected_KD = alone(module, parameters_D, inputs, labels)
    gradient = BatchedGradient(module, CPU)
    _, out_KD = together(gradient, parameters_D, inputs, labels)
    assert gradient.method == "loop"
    assert torch.equal(out_KD, expected_KD)


def test_a_broken_model_is_not_hidden_by_the_loop() -> None:
    module = build("mlp")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        together(BatchedGradient(module, CPU), flat.flatten(module), [torch.zeros(2, 5)], [torch.zeros(2).long()])


def test_chunks_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    module = build("cnn-s")
    parameters_D, (inputs, labels) = flat.flatten(module), batches(4, 4, 4, 4, 4)
    _, expected_KD = together(BatchedGradient(module, CPU), parameters_D, inputs, labels)
    # What one worker keeps at the least: the inputs of the layers with weights, and of the pools.
    least = 4 * 4 * (3 * 32 * 32 + 16 * 30 * 30 + 16 * 10 * 10 + 64 * 7 * 7 + 64 + 384 + 192)
    sizes: list[int] = []
    for room, most in ((0, 1), (9 * least, 3), (1 << 30, 5)):
        monkeypatch.setattr(batched, "CPU_BYTES", room)
        gradient = BatchedGradient(module, CPU)
        plain = gradient._together

        def spy(*arguments: Any, plain: Any = plain) -> Any:
            sizes.append(len(arguments[-1]))
            return plain(*arguments)

        monkeypatch.setattr(gradient, "_together", spy)
        sizes.clear()
        _, out_KD = together(gradient, parameters_D, inputs, labels)
        assert sum(sizes) == 5
        assert max(sizes) <= most
        assert distance(out_KD, expected_KD) < 1e-5
    assert sizes == [5]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_module_is_left_alone(precision: Precision) -> None:
    module = models.make("ipm-cnn").build((3, 8, 8), 10, 0)
    module.eval()
    state = copy.deepcopy(module.state_dict())
    parameters_D = torch.zeros(flat.count(module))
    inputs, labels = [torch.randn(3, 3, 8, 8)] * 2, [torch.arange(3)] * 2
    for method in METHODS:
        together(BatchedGradient(module, CPU, precision, method=method), parameters_D, inputs, labels, [1, 2])
    assert not module.training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
