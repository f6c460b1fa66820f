"""Models by name: frozen dataclasses with `build(shape, classes, seed)`, whose fields are their configuration."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from narses import registry
from narses.errors import ConfigError
from narses.models.base import Init, Model, initialise
from narses.models.cnn import CnnL, CnnS, IpmCnn
from narses.models.dense import Mlp, Softmax
from narses.models.wide_resnet import Wrn40x4

__all__ = ["MODELS", "CnnL", "CnnS", "Init", "IpmCnn", "Mlp", "Model", "Softmax", "Wrn40x4", "initialise", "make"]

MODELS: dict[str, type] = {
    "softmax": Softmax,
    "mlp": Mlp,
    "cnn-s": CnnS,
    "cnn-l": CnnL,
    "ipm-cnn": IpmCnn,
    "wrn-40-4": Wrn40x4,
}


def make(table: Any, *, trusted: bool = False, allow: Collection[str] | None = None) -> Model:
    """The model that `table` (a name, a table or a model) describes; ConfigError if there is none.

    trusted: the table is one's own, so import strings count. allow: import strings that count in a peer's table too.
    """
    model = registry.build("model", MODELS, table, trusted=trusted, allow=allow)
    if not isinstance(model, Model):
        raise ConfigError(f"model {table!r}: {type(model).__name__} has no build(shape, classes, seed)")
    return model
