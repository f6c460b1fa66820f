"""The attacks by their configuration names, and the contract each of them keeps.

An attack on updates is called with a View and the number of rows to send. It MUST

1. return a (count, D) tensor, row i for members[i], in the dtype and on the device of view.updates_HD;
2. return fresh memory: no row shares storage with the view or with another row;
3. never write to the view, its memory excepted, which is the attack's own;
4. return finite values for finite updates (1e38 in float32 included);
5. draw randomness from view.generator alone, so that the same view and generator state give the same rows;
6. know no more than the view's fields, and depend on (worker id, update) pairs, not on the order they arrived in;
7. compute its statistics in float64;
8. be a frozen pydantic dataclass whose fields are its configuration, refusing a wrong one with ConfigError.

An attack on data replaces a training batch, and its workers are otherwise honest. It MUST return fresh tensors of the
same shapes and dtypes, keep to the generator it is given, and offer `bind(classes)` (returning itself where it does not
care).

Statistics: ALIE takes them from the members' own updates, IPM from the others'. Where a view lacks the rows a formula
asks for, others stand in and memory["estimate"] is True.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from narses import registry
from narses.errors import ConfigError
from narses_adversary.attacks.alie import Alie, alie_z_max
from narses_adversary.attacks.gaussian import Gaussian
from narses_adversary.attacks.ipm import Ipm
from narses_adversary.attacks.label_flip import LabelFlip
from narses_adversary.attacks.sign_flip import SignFlip
from narses_adversary.view import View

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ATTACKS", "DataAttack", "UpdateAttack", "View", "alie_z_max", "is_data_attack", "make", "strength"]


class UpdateAttack(Protocol):
    """Crafts the updates of `count` workers from what was seen of the round."""

    def __call__(self, view: View, count: int) -> Tensor: ...


@runtime_checkable
class DataAttack(Protocol):
    """Poisons the batches of the workers it commands."""

    def __call__(self, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]: ...

    def bind(self, classes: int) -> DataAttack: ...


ATTACKS: dict[str, type] = {
    "alie": Alie,
    "gaussian": Gaussian,
    "ipm": Ipm,
    "label-flip": LabelFlip,
    "sign-flip": SignFlip,
}


def make(table: Any, *, trusted: bool = True) -> UpdateAttack | DataAttack:
    """The attack that `table` describes: a name, a table with a name and fields, or an attack that is already built.

    trusted = False refuses import strings ("my_package.attacks:MyAttack"). ConfigError says what is wrong.
    """
    attack: UpdateAttack | DataAttack = registry.build("attack", ATTACKS, table, trusted=trusted)
    if isinstance(attack, type) or not callable(attack):
        raise ConfigError(f"attack: expected a name, a table or an attack, got {table!r}")
    return attack


def is_data_attack(attack: object) -> bool:
    """Whether `attack` poisons batches (and has `bind`) rather than crafting updates."""
    return isinstance(attack, DataAttack)


def strength(attack: object, *, n: int | None = None, m: int | None = None) -> float | None:
    """The one number that says how hard `attack` pushes (z, epsilon, scale, std), None where there is none.

    n, m: workers and attackers, which ALIE's z = "auto" depends on. Asked at start-up it also raises the ConfigError
    that the first attacked round would.
    """
    measure = getattr(attack, "strength", None)
    return None if measure is None else measure(n, m)
