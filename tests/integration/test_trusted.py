"""The server's own samples: what a rule gets of them, and what Zeno, FLTrust and centered clipping make of liars and kills."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from narses import combine, datasets, flat, models
from narses.config import STRICT
from narses.errors import ConfigError, InputError
from narses.models import initialise
from narses.rules import Aggregation, Context
from narses.seeding import generator
from narses.updates import Updates
from narses_server.trusted import TrustedData
from tests.adversary.rig import corrupt
from tests.cluster import cluster, experiment, undisturbed
from tests.disk import as_a_kill_leaves_it

DATA = datasets.load("digits", None)


@dataclass(frozen=True, config=STRICT)
class Normed:
    """BatchNorm and dropout."""

    def build(self, shape: tuple[int, ...], classes: int, seed: int) -> nn.Module:
        with torch.device("meta"):
            size = shape[-1] * shape[-2]
            body = nn.Sequential(
                nn.Flatten(), nn.Linear(size, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, classes)
            )
        return initialise(body, "torch", seed)


def reference(module: nn.Module, round_: int, samples: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Loss and gradient by plain autograd; `module` is in the mode it should be measured in."""
    chosen_B = torch.randperm(len(DATA.train_labels), generator=generator(seed, "trusted", round_))[:samples]
    loss = cross_entropy(module(DATA.train_inputs[chosen_B]), DATA.train_labels[chosen_B])
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return loss.detach(), torch.cat([gradient.reshape(-1) for gradient in gradients])


@pytest.mark.parametrize("table", ["softmax", "mlp", f"{__name__}:Normed"])
def test_loss_and_gradient_are_those_of_the_model_on_that_rounds_samples(table: str) -> None:
    module = models.make(table, trusted=True).build(DATA.shape, DATA.classes, 3)
    parameters_D = flat.flatten(module)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    data = TrustedData(module, DATA, 1, 16)
    for round_ in (0, 1, 7):
        batch = data.batch(round_)
        loss, gradient_D = batch.loss(parameters_D), batch.gradient(parameters_D)
        again = (batch.loss(parameters_D), batch.gradient(parameters_D))
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        assert loss == again[0]
        assert torch.equal(gradient_D, again[1])
        for layer in module.modules():
            layer.train(isinstance(layer, nn.BatchNorm1d))
        expected, expected_D = reference(module, round_, 16)
        module.load_state_dict(before)
        torch.testing.assert_close(torch.tensor(loss), expected)
        torch.testing.assert_close(gradient_D, expected_D)
    assert data.batch(0).loss(parameters_D) != data.batch(1).loss(parameters_D)


def test_a_batch_is_the_same_on_any_number_of_threads_and_after_a_restart() -> None:
    module = models.make("mlp").build(DATA.shape, DATA.classes, 3)
    parameters_D = flat.flatten(module)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append(TrustedData(module, DATA, 1, 100).batch(5).gradient(parameters_D))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


class _Counting(nn.Module):
    """Whose logits depend on how often it has been called."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(classes))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (self.bias + self.calls * torch.arange(float(len(self.bias)))).expand(len(x), -1)


def test_what_a_model_writes_to_its_buffers_is_gone_at_the_next_call() -> None:
    batch = TrustedData(_Counting(DATA.classes), DATA, 1, 8).batch(0)
    assert batch.loss(torch.zeros(10)) == batch.loss(torch.zeros(10))


def test_more_samples_than_there_are_are_all() -> None:
    module = models.make("softmax").build(DATA.shape, DATA.classes, 3)
    parameters_D = flat.flatten(module)
    everything = TrustedData(module, DATA, 1, 10**9)
    expected = cross_entropy(module(DATA.train_inputs), DATA.train_labels).item()
    assert everything.batch(0).loss(parameters_D) == pytest.approx(expected)
    assert everything.batch(4).loss(parameters_D) == pytest.approx(expected)


@dataclass(frozen=True, config=STRICT)
class Asking:
    """The mean; says whether it was given a trusted batch."""

    trusted_samples: int = 0

    losses: ClassVar[list[float]] = []

    def min_updates(self, f: int) -> int:
        return 1

    def __call__(self, updates: Updates, f: int, context: Context | None = None) -> Aggregation:
        assert context is not None
        if (context.trusted is not None) != (self.trusted_samples > 0):
            raise InputError(f"asked for {self.trusted_samples} samples, got {context.trusted}")
        if context.trusted is not None:
            assert context.parameters_D is not None
            self.losses.append(context.trusted.loss(torch.linspace(-1, 1, len(context.parameters_D))))
        return Aggregation(updates.per_coordinate(combine.Mean()))


@pytest.mark.parametrize("samples", [0, 3])
async def test_only_rules_that_ask_are_given_samples(samples: int) -> None:
    Asking.losses.clear()
    async with cluster(n=2, rounds=2, rule={"name": f"{__name__}:Asking", "trusted_samples": samples}) as c:
        assert (await c.summary())["outcome"] == "completed"
    assert len(set(Asking.losses)) == (2 if samples else 0), "at the same parameters: other samples every round"


@pytest.mark.parametrize("rule", ["zeno", {"name": "nnm", "rule": "fl-trust"}], ids=str)
def test_parameters_are_refused_before_anything_starts(rule: Any) -> None:
    task = {"model": "softmax", "dataset": "digits", "batch": 16, "update": "parameters"}
    with pytest.raises(ConfigError, match=r"judges gradients by the server's own data, but workers push parameters"):
        experiment(n=4, f=1, rule=rule, task=task)


ATTACKED: dict[str, Any] = {"n": 6, "f": 4, "rounds": 40, "evaluate": 40}
LIARS = [2, 3, 4, 5]


@pytest.mark.parametrize(
    ("rule", "least", "most"),
    [
        ("mean", 0.0, 0.3),
        ("zeno", 0.5, 1.0),
        ({"name": "zeno", "samples": 32}, 0.8, 1.0),
        ("fl-trust", 0.8, 1.0),
    ],
    ids=str,
)
async def test_a_majority_that_flips_signs_breaks_the_mean_alone(rule: Any, least: float, most: float) -> None:
    async with cluster(daemons=[[0, 1]], **ATTACKED, rule=rule) as c:
        await c.until(lambda: c.server._service._run is not None, "the run to open")
        await corrupt(c, LIARS, attack={"name": "sign-flip", "scale": 2.0})
        accuracy = (await c.summary())["final_accuracy"]
    assert least <= accuracy <= most


RESUMED: dict[str, Any] = {"n": 5, "f": 1, "rounds": 30}


@pytest.mark.parametrize(
    "rule",
    [
        {"name": "centered-clipping", "radius": 0.2},
        {"name": "nnm", "rule": {"name": "centered-clipping", "radius": 0.2}},
        {"name": "dnc", "subsample": 50},
        {"name": "bucketing", "rule": "median"},
        "zeno",
        "fl-trust",
    ],
    ids=str,
)
async def test_a_killed_server_ends_with_the_digest_of_the_undisturbed_run(tmp_path: Path, rule: Any) -> None:
    settings = {**RESUMED, "rule": rule, "checkpoint": {"every": 4}}
    expected = await undisturbed(**RESUMED, rule=rule)
    copies = []
    async with cluster(output=str(tmp_path / "first"), **settings) as c:
        for round_ in (9, 22):
            await c.until_round(round_)
            copies.append(await asyncio.to_thread(as_a_kill_leaves_it, tmp_path / "first", tmp_path / f"copy-{round_}"))
        assert (await c.summary())["digest"] == expected

    for folder in copies:
        async with cluster(output=str(folder), **settings) as c:
            assert (await c.summary())["digest"] == expected, folder.name
