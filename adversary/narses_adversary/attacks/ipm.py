"""Inner product manipulation: send the honest mean backwards, so that the aggregate climbs the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import FiniteFloat
from pydantic.dataclasses import dataclass

from narses.config import STRICT
from narses_adversary.attacks import rows

if TYPE_CHECKING:
    from torch import Tensor

    from narses_adversary.view import View


@dataclass(frozen=True, config=STRICT)
class Ipm:
    """All members send -epsilon times the mean of the remaining correct updates.

    Needs one seen update. Cost O(K D) for K remaining rows. The updates that the members replace are not in the mean;
    where nothing else was seen, the mean of all seen updates stands in and memory["estimate"] is True.

    epsilon: > 0 opposes the mean (large values break the median, small ones Krum), 0 sends zeros, < 0 pushes along.

    Xie, Koyejo, Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation" (2019),
    sections 6.2 and 6.3. The paper has gradients; of parameters the way from the round's parameters is multiplied.
    """

    epsilon: FiniteFloat

    def __call__(self, view: View, count: int) -> Tensor:
        """(count, D), all rows equal. InputError where no update was seen."""
        rows.check(view, count)
        mean_D = rows.mean(view.updates_HD, rows.remaining(view))
        origin = rows.origin(view)
        return rows.repeated(origin - self.epsilon * (mean_D - origin), count, like=view.updates_HD)

    def strength(self, n: int | None, m: int | None) -> float:
        """epsilon, with its sign."""
        return self.epsilon
