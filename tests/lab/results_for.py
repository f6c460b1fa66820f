"""Made-up results for the tests of what is done with results."""

from narses_lab.demo import ATTACKS, RULES, Cell
from narses_lab.results import Result


def result(rule="mean", attack="none", seed=1, final=0.9, **fields):
    curve = ((5, 0.5), (10, final))
    values = {
        "outcome": "completed",
        "rounds": 10,
        "rounds_per_second": 50.0,
        "seconds": 0.2,
        "best": max(0.5, final),
        "best_round": 10,
        "curve": curve,
        "digest": "ab" * 32,
        "refused": 0,
        "liars_chosen": None,
    }
    return Result(cell=Cell(rule, attack, seed), final=final, **{**values, **fields})


def everything(finals, seeds=1):
    """One result per rule, attack and seed; `finals`: (rule, attack) -> final accuracy, 0.9 where it says nothing."""
    return [
        result(rule, attack, seed, finals.get((rule, attack), 0.9))
        for seed in range(1, seeds + 1)
        for rule in RULES
        for attack in ATTACKS
    ]
