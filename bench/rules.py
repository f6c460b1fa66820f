"""Milliseconds per aggregation rule at n = 51, f = 12: python -m bench rules [--dimensions 79510,1200000] [--seconds 1]

Each rule through its public call, beside one read of the same matrix, the same rule as one writes it with torch, and ByzFL's
where that can be imported; in turn, in one process.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.result import Figure, Result
from narses import rules
from narses.kernels import jit, threads
from narses.rpc.allocator import keep_large_blocks
from narses.updates import Updates

N, F = 51, 12
NAMES = (
    "mean",
    "median",
    "trimmed-mean",
    "mean-around-median",
    "krum",
    "multi-krum",
    "bulyan",
    "geometric-median",
)
READS = {"median": 2.0, "trimmed-mean": 2.5, "mean-around-median": 2.5}  # aims where the matrix does not fit the cache
BEYOND_CACHE = 1 << 27  # bytes
MOST_COMPILING_MS = 500.0


def plain(name: str) -> Callable[[Tensor], Tensor] | None:
    """The rule in a line or two of torch."""
    kept = N - F

    def around_median(x_ND: Tensor) -> Tensor:
        nearest = (x_ND - x_ND.median(dim=0).values).abs().topk(kept, dim=0, largest=False).indices
        return x_ND.gather(0, nearest).mean(dim=0)

    def scores(x_ND: Tensor) -> Tensor:
        # The smallest is the distance to itself.
        return torch.cdist(x_ND, x_ND).square().topk(N - F - 1, largest=False).values.sum(dim=1)

    return {
        "mean": lambda x_ND: x_ND.mean(dim=0),
        "median": lambda x_ND: x_ND.median(dim=0).values,
        "trimmed-mean": lambda x_ND: x_ND.sort(dim=0).values[F : N - F].mean(dim=0),
        "mean-around-median": around_median,
        "krum": lambda x_ND: x_ND[scores(x_ND).argmin()],
        "multi-krum": lambda x_ND: x_ND[scores(x_ND).topk(kept, largest=False).indices].mean(dim=0),
    }.get(name)


def byzfl(name: str) -> Callable[[Tensor], Tensor] | None:
    """ByzFL's rule, if the package is there."""
    try:
        with warnings.catch_warnings(action="ignore"):
            package: Any = importlib.import_module("byzfl")
    except ImportError:
        return None
    made: dict[str, Callable[[], Any]] = {
        "mean": package.Average,
        "median": package.Median,
        "trimmed-mean": lambda: package.TrMean(f=F),
        "mean-around-median": lambda: package.Meamed(f=F),
        "krum": lambda: package.Krum(f=F),
        "multi-krum": lambda: package.MultiKrum(f=F),
        "geometric-median": package.GeometricMedian,
    }
    return made[name]() if name in made else None


def seconds_of(action: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_turn(actions: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds per call, one after the other again and again, at least three times, for about `seconds` each.

    A first call is not counted: it fills the cache, and outlasts the threads of the one before, which spin for a while.
    """
    found: dict[str, list[float]] = {name: [] for name in actions}
    start = time.perf_counter()
    while len(next(iter(found.values()))) < 3 or time.perf_counter() - start < seconds * len(actions):
        for name, action in actions.items():
            first = seconds_of(action)
            again = 1 if first > 0.2 else math.ceil(0.01 / first)
            found[name].append(statistics.median(seconds_of(action) for _ in range(again)) * 1e3)
    return found


def measured(name: str, x_ND: Tensor, seconds: float) -> list[Figure]:
    """The figures of one rule at one dimension."""
    rule, d = rules.make(name), x_ND.shape[1]
    actions: dict[str, Callable[[], object]] = {
        "ours": lambda: rule(Updates.of(x_ND, finite=True), F),
        "read": x_ND.sum,
    }
    for other, way in (("torch", plain(name)), ("ByzFL", byzfl(name))):
        if way is not None:
            actions[other] = lambda way=way: way(x_ND)  # type: ignore[misc]
    found = in_turn(actions, seconds)
    ours = found.pop("ours")
    ratios = {
        other: [theirs / mine for theirs, mine in zip(times, ours, strict=True)] for other, times in found.items()
    }
    label = f"{name}, d = {d:,}"
    beyond = x_ND.numel() * x_ND.element_size() > BEYOND_CACHE
    aim = {"at_most": READS[name]} if beyond and name in READS else {}
    figures = [
        Figure.median(label, ours, "ms"),
        Figure.median(f"{label}: of one read", [1 / ratio for ratio in ratios.pop("read")], "x", **aim),
    ]
    return figures + [Figure.median(f"{label}: {other} takes", values, "x") for other, values in ratios.items()]


def first_use(name: str) -> Figure:
    """What the first call in a process costs: the kernels' compilation."""
    rule, x_ND = rules.make(name), torch.randn(N, 64, generator=torch.Generator().manual_seed(0))
    spent = seconds_of(lambda: rule(Updates.of(x_ND, finite=True), F)) * 1e3
    return Figure(f"{name}: first use in a process", spent, "ms", at_most=MOST_COMPILING_MS)


def main(arguments: list[str]) -> Result:
    """Parse, measure."""
    parser = argparse.ArgumentParser(prog="python -m bench rules", description="aggregation rules alone")
    parser.add_argument("--dimensions", default="79510,1200000", help="numbers of parameters, separated by commas")
    parser.add_argument("--rules", default=",".join(NAMES), help="names, separated by commas")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each rule and contender, at least")
    options = parser.parse_args(arguments)
    keep_large_blocks()  # as the daemons do
    names = [name for name in options.rules.split(",") if name in rules.RULES]
    compiled = jit.available()
    figures = [first_use(name) for name in names]
    for d in map(int, options.dimensions.split(",")):
        x_ND = torch.randn(N, d, generator=torch.Generator().manual_seed(1))
        for name in names:
            figures += measured(name, x_ND, options.seconds)
    return Result(
        "rules",
        f"Aggregation rules, n = {N}, f = {F}",
        tuple(figures),
        (
            f"Normal updates. Kernels {'compiled' if compiled else 'absent: everything by torch'}, {threads.count()} "
            f"threads; torch with {torch.get_num_threads()} threads.",
            "'of one read': our time over that of torch.sum of the whole matrix. 'torch takes': the time of the same rule in "
            "a line or two of torch (torch.median, torch.sort, torch.topk, torch.cdist) over ours.",
            "ByzFL: " + ("measured in the same way." if byzfl("mean") is not None else "not installed, left out."),
        ),
    )
