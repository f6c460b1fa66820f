"""Milliseconds per update for each model, on one thread: python bench/gradients.py [repetitions]"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from narses import flat, models
from narses_worker.gradients import AutogradGradient, Gradient, gradient_of

CASES = [("softmax", (8, 8), 32), ("mlp", (8, 8), 32), ("mlp", (1, 28, 28), 83), ("cnn-s", (3, 32, 32), 128)]


def measure(gradient: Gradient, shape: tuple[int, ...], batch: int, dimension: int, repetitions: int) -> float:
    """The median time of one update, in milliseconds, after a warm-up."""
    inputs, labels = torch.randn(batch, *shape), torch.randint(10, (batch,))
    parameters, out = torch.randn(dimension) * 0.05, torch.empty(dimension)
    times = []
    for repetition in range(repetitions + 3):
        start = time.perf_counter()
        gradient(parameters, inputs, labels, out)
        if repetition >= 3:
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    """Print one line per model: the trainer's way beside plain autograd."""
    torch.set_num_threads(1)
    cpu = torch.device("cpu")
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    print(f"{'model':8} {'shape':12} {'batch':>5} {'D':>8} {'ms/update':>10} {'autograd':>9}")
    for name, shape, batch in CASES:
        module = models.make(name).build(shape, 10, 0)
        dimension = flat.count(module)
        ours = measure(gradient_of(module, cpu), shape, batch, dimension, repetitions)
        plain = measure(AutogradGradient(module, cpu), shape, batch, dimension, repetitions)
        print(f"{name:8} {shape!s:12} {batch:5} {dimension:8} {ours:10.3f} {plain:9.3f}")


if __name__ == "__main__":
    main()
