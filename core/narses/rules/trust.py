"""What rules share that judge updates by the server's own data."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from narses.errors import InputError
from narses.rules.base import Context, Rule, TrustedBatch, trusted_samples


class Trusted(NamedTuple):
    """What such a rule needs of its context."""

    batch: TrustedBatch
    parameters_D: Tensor
    learning_rate: float


def trusted(rule: Rule, context: Context | None) -> Trusted:
    """The trusted batch and where the model stands; InputError, in one sentence, if there is none."""
    if context is None or context.trusted is None or context.parameters_D is None or context.learning_rate is None:
        raise InputError(
            f"{type(rule).__name__} judges updates by {trusted_samples(rule)} samples of the server's own data, but was called "
            f"without: play it in a server's run, or give a Context with trusted, parameters_D and learning_rate"
        )
    return Trusted(context.trusted, context.parameters_D, context.learning_rate)
