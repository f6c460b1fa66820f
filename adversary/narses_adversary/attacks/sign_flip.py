"""Sign flip: every member sends minus its own honest update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import FiniteFloat
from pydantic.dataclasses import dataclass

from narses.config import STRICT
from narses_adversary.attacks import rows

if TYPE_CHECKING:
    from torch import Tensor

    from narses_adversary.view import View


@dataclass(frozen=True, config=STRICT)
class SignFlip:
    """Member i sends -scale * x_i, x_i being the update it would have sent honestly.

    Needs one seen update. Cost O(count D). For a member whose update was not seen the mean of all seen updates stands
    in and memory["estimate"] is True; a view without members flips its rows in worker order.

    scale: 1 is the plain flip, larger values the opposite gradient scaled up.

    A folklore baseline that knows nothing but the members' own updates. The omniscient attack of Blanchard et al.,
    "Machine Learning with Adversaries" (2017), scales the opposite of the true gradient instead. Of parameters the
    way from the round's parameters is flipped.
    """

    scale: FiniteFloat = 1.0

    def __call__(self, view: View, count: int) -> Tensor:
        """(count, D), row i for members[i]. InputError where no update was seen."""
        rows.check(view, count)
        row_of = {worker: row for row, worker in enumerate(view.worker_ids)}
        members = view.members or tuple(sorted(view.worker_ids))[:count]
        own = [row_of.get(worker) for worker in members] + [None] * (count - len(members))
        view.memory["estimate"] = None in own

        x_HD, origin = view.updates_HD, rows.origin(view)
        flipped = torch.empty(count, x_HD.shape[1], dtype=x_HD.dtype, device=x_HD.device)
        mean_D = rows.mean(x_HD, rows.in_worker_order(view)) if None in own else None
        for i, row in enumerate(own):
            x_D = mean_D if row is None else x_HD[row].double()
            assert x_D is not None
            flipped[i] = rows.finite(origin - self.scale * (x_D - origin), like=x_HD)
        return flipped

    def strength(self, n: int | None, m: int | None) -> float:
        """The scale."""
        return self.scale
