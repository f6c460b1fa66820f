"""Milliseconds per update for each model, and gradients alone in rounds per second: python -m bench gradients

The floor: n = 51 updates of the MNIST MLP (batch 83) and of CNN-S (batch 128) by two threads, nothing sent. With CUDA also
n = 51 updates of CNN-L, one by one and all workers at once, in float32 and bfloat16.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.result import Figure, Result
from narses import flat, models
from narses.models.compute import one_thread
from narses.rpc.allocator import keep_large_blocks
from narses_worker.batched import BatchedGradient, Method
from narses_worker.gradients import AutogradGradient, Gradient, Precision, gradient_of

N, THREADS = 51, 2
DIGITS, MNIST, CIFAR = (8, 8), (1, 28, 28), (3, 32, 32)
CASES = (
    ("softmax", DIGITS, 32),
    ("mlp", DIGITS, 32),
    ("softmax", MNIST, 83),
    ("mlp", MNIST, 83),
    ("cnn-s", CIFAR, 128),
    ("cnn-l", CIFAR, 128),
    ("ipm-cnn", CIFAR, 32),
    ("wrn-40-4", CIFAR, 8),
)
FLOORS = (("mlp", MNIST, 83), ("cnn-s", CIFAR, 128))
CPU = torch.device("cpu")


class Case:
    """A model with parameters, and `count` batches of noise in the shape of its data."""

    def __init__(self, name: str, shape: tuple[int, ...], batch: int, count: int = 1) -> None:
        draws = torch.Generator().manual_seed(0)
        self.label = f"{name}, {'x'.join(map(str, shape))}, batch {batch}"
        self.inputs = torch.randn(count, batch, *shape, generator=draws)
        self.labels = torch.randint(10, (count, batch), generator=draws)
        self._name, self._shape = name, shape
        self.parameters_D = flat.flatten(self._build())

    def _build(self) -> nn.Module:
        return models.make(self._name).build(self._shape, 10, 0)

    def gradient(self) -> Gradient:
        """The trainer's way."""
        return gradient_of(self._build(), CPU)

    def autograd(self) -> Gradient:
        """Torch's way."""
        return AutogradGradient(self._build(), CPU)

    def batched(self, device: torch.device, precision: Precision, method: Method) -> BatchedGradient:
        """All workers in one call."""
        return BatchedGradient(self._build(), device, precision, method=method)

    def rows(self, count: int) -> Tensor:
        """As a cohort has them."""
        return torch.from_numpy(flat.aligned_rows(count, len(self.parameters_D)))


def times(action: Callable[[], object], seconds: float) -> list[float]:
    """How long `action` takes, again and again for about `seconds`, at least three times after a first one."""
    action()
    found: list[float] = []
    while len(found) < 3 or sum(found) < seconds:
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return found


def per_update(case: Case, gradient: Gradient, seconds: float) -> list[float]:
    """Milliseconds of one update on one thread."""
    row_D = case.rows(1)[0]
    with one_thread():
        found = times(lambda: gradient(case.parameters_D, case.inputs[0], case.labels[0], row_D), seconds)
    return [value * 1e3 for value in found]


def floor(case: Case, seconds: float, threads: int = THREADS) -> list[float]:
    """Rounds per second of N updates, shared out between threads that compute on one core each."""
    rows_KD, gradients = case.rows(N), [case.gradient() for _ in range(threads)]

    def play(thread: int) -> None:
        with one_thread():
            for k in range(thread, N, threads):
                gradients[thread](case.parameters_D, case.inputs[k], case.labels[k], rows_KD[k])

    def round_() -> None:
        playing = [threading.Thread(target=play, args=(thread,)) for thread in range(threads)]
        for thread in playing:
            thread.start()
        for thread in playing:
            thread.join()

    return [1 / value for value in times(round_, seconds)]


def on_cuda(seconds: float) -> list[Figure]:
    """CNN-L by the GPU, to rows in the host's memory and to rows that stay on the device; no figures without one."""
    if not torch.cuda.is_available():
        return []
    device, case, figures = torch.device("cuda"), Case("cnn-l", CIFAR, 128, N), []
    inputs, labels, parameters_D = case.inputs.to(device), case.labels.to(device), case.parameters_D.to(device)
    targets = {
        "rows on the device": torch.empty(N, len(parameters_D), device=device),
        "rows in pinned memory": torch.empty(N, len(parameters_D), pin_memory=True),
        "rows of a cohort": case.rows(N),
    }
    precisions: tuple[Precision, ...] = ("float32", "bfloat16")
    methods: tuple[Method, ...] = ("loop", "vmap")
    for precision in precisions:
        for method in methods:
            gradient = case.batched(device, precision, method)
            for where, out_KD in targets.items():

                def play(gradient: BatchedGradient = gradient, out_KD: Tensor = out_KD) -> None:
                    gradient(parameters_D, inputs, labels, out_KD)  # returns losses: the device has finished

                rates = [1 / value for value in times(play, seconds)]
                how = method if gradient.method == method else f"{method} (refused: {gradient.method})"
                figures.append(
                    Figure.median(f"n = {N}, {case.label}, CUDA, {precision}, {how}, {where}", rates, "rounds/s")
                )
    return figures


def main(arguments: list[str]) -> Result:
    """Parse, measure."""
    parser = argparse.ArgumentParser(prog="python -m bench gradients", description="gradients without anything else")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    seconds = parser.parse_args(arguments).seconds
    keep_large_blocks()  # as the daemons do
    figures = []
    for name, shape, batch in CASES:
        case = Case(name, shape, batch)
        figures.append(Figure.median(case.label, per_update(case, case.gradient(), seconds), "ms/update"))
        if name in ("softmax", "mlp"):
            plain = per_update(case, case.autograd(), seconds)
            figures.append(Figure.median(f"{case.label}, by autograd", plain, "ms/update"))
    for name, shape, batch in FLOORS:
        case = Case(name, shape, batch, N)
        rates = floor(case, 2 * seconds)
        figures.append(Figure.median(f"n = {N}, {case.label}, {THREADS} threads", rates, "rounds/s"))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "absent: no figures for it"
    return Result(
        "gradients",
        "Gradients alone, nothing sent: one thread per update",
        (*figures, *on_cuda(seconds)),
        (
            "Inputs are noise in the shape of the data; parameters are as drawn at the start.",
            f"CUDA: {device}.",
        ),
    )
