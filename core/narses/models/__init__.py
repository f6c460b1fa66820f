"""Models by name: frozen dataclasses with `build(shape, classes, seed)`, whose fields are their configuration."""

from __future__ import annotations

from typing import Any

from narses import registry
from narses.errors import ConfigError
from narses.models.base import Init, Model
from narses.models.cnn import CnnS
from narses.models.dense import Mlp, Softmax

__all__ = ["MODELS", "CnnS", "Init", "Mlp", "Model", "Softmax", "make"]

MODELS: dict[str, type] = {
    "softmax": Softmax,
    "mlp": Mlp,
    "cnn-s": CnnS,
}


def make(table: Any, *, trusted: bool = False) -> Model:
    """The model that `table` (a name, a table or a model) describes; ConfigError if there is none.

    trusted: the table is one's own, so import strings count.
    """
    model = registry.build("model", MODELS, table, trusted=trusted)
    if not isinstance(model, Model):
        raise ConfigError(f"model {table!r}: {type(model).__name__} has no build(shape, classes, seed)")
    return model
