"""Ten rules on one attacked matrix: how far each one's answer is from what the honest workers mean, and in which direction.

    python examples/compare-rules/compare_rules.py [--output rules.png] [--dimension 20000] [--seed 1]

51 updates, 12 of them false. The honest ones are normal around a gradient; the attackers are the package's own. Distances are
in units of the honest updates' standard deviation, per coordinate: 0 is the honest mean itself, and no rule can be better than
the noise of its own average. The cosine is that between the answer and the true gradient: at 0 or below, training stops.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import narses
from narses_adversary import attacks
from narses_adversary.view import View

N, F = 51, 12
SIGNAL = 0.3  # length of the gradient over that of one update's noise: late in training it is small
RULES: tuple[Any, ...] = (
    "mean",
    "median",
    "trimmed-mean",
    {"name": "mean-around-median", "keep": "n-2f"},
    "phocas",
    "krum",
    "multi-krum",
    "medoid",
    "geometric-median",
    "bulyan",
)
ATTACKS: tuple[Any, ...] = (
    None,
    {"name": "alie", "z": 1.5},
    {"name": "ipm", "epsilon": 0.5},
    {"name": "ipm", "epsilon": 10.0},
    "gaussian",
)


def matrix(dimension: int, seed: int, attack: Any) -> tuple[Tensor, Tensor]:
    """(N, D) updates, the first F of which are false, and the gradient (D,) that the honest ones scatter around."""
    draws = torch.Generator().manual_seed(seed)
    gradient_D = SIGNAL * torch.randn(dimension, generator=draws)
    updates_ND = gradient_D + torch.randn(N, dimension, generator=draws)
    if attack is not None:
        view = View(
            updates_HD=updates_ND.clone(),
            worker_ids=tuple(range(N)),
            parameters_D=torch.zeros(dimension),
            n=N,
            f=F,
            round=0,
            rule=None,
            learning_rate=0.1,
            generator=draws,
            members=tuple(range(F)),
        )
        updates_ND[:F] = attacks.make(attack)(view, F)
    return updates_ND, gradient_D


def title(table: Any) -> str:
    """What stands beside a bar."""
    if table is None:
        return "no attack"
    if isinstance(table, str):
        return table
    return " ".join([table["name"], *(f"{key} {value}" for key, value in table.items() if key != "name")])


def measure(dimension: int, seed: int) -> dict[tuple[str, str], tuple[float, float]]:
    """(rule, attack) -> distance to the honest mean in sigma, cosine with the gradient."""
    found = {}
    for attack in ATTACKS:
        updates_ND, gradient_D = matrix(dimension, seed, attack)
        honest_D = updates_ND[F:].mean(0)
        for rule in RULES:
            answer_D = narses.aggregate(rule, updates_ND, f=F).vector_D
            distance = torch.linalg.vector_norm(answer_D - honest_D).item() / dimension**0.5
            cosine = torch.nn.functional.cosine_similarity(answer_D, gradient_D, dim=0).item()
            found[title(rule), title(attack)] = (distance, cosine)
    return found


def plot(found: dict[tuple[str, str], tuple[float, float]], path: Path) -> None:
    """One row of panels for the distance, one for the cosine; a panel per attack."""
    figure = Figure(figsize=(3.2 * len(ATTACKS), 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(ATTACKS), sharey=True, squeeze=False)
    rules = [title(rule) for rule in RULES]
    for column, attack in enumerate(map(title, ATTACKS)):
        for row, what in enumerate(("distance to the honest mean, sigma", "cosine with the gradient")):
            panel = panels[row][column]
            values = [found[rule, attack][row] for rule in rules]
            panel.barh(rules, [min(value, 3.0) for value in values], color="#0072B2")
            for y, value in enumerate(values):
                panel.text(0, y, f" {value:.2g}", va="center", fontsize=8)
            panel.set_xlabel(what)
            panel.set_title(attack)
            panel.axvline(0, color="black", lw=0.8)
    panels[0][0].invert_yaxis()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Print the table and write the plot."""
    parser = argparse.ArgumentParser(description="ten rules on one attacked matrix")
    parser.add_argument("--output", type=Path, default=Path("rules.png"))
    parser.add_argument("--dimension", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    found = measure(options.dimension, options.seed)
    names = [title(attack) for attack in ATTACKS]
    print(f"{'distance / cosine':32}" + "".join(f"{name:>20}" for name in names))
    for rule in map(title, RULES):
        cells = (found[rule, name] for name in names)
        print(f"{rule:32}" + "".join(f"{distance:>12.3g} /{cosine:6.2f}" for distance, cosine in cells))
    plot(found, options.output)
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
