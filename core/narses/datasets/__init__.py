"""Data sets by name: frozen dataclasses with `load(folder) -> Dataset`, whose fields are their configuration."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Any

from narses import registry
from narses.datasets.base import Dataset, Source, data_folder
from narses.datasets.digits import Digits
from narses.datasets.synthetic import Synthetic
from narses.datasets.vision import Cifar10, Cifar100, Mnist
from narses.errors import ConfigError

__all__ = [
    "DATASETS",
    "Cifar10",
    "Cifar100",
    "Dataset",
    "Digits",
    "Mnist",
    "Source",
    "Synthetic",
    "data_folder",
    "load",
    "make",
]

DATASETS: dict[str, type] = {
    "digits": Digits,
    "mnist": Mnist,
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "synthetic": Synthetic,
}

_loaded: dict[tuple[Source, Path], Dataset] = {}
_lock = threading.Lock()


def make(table: Any, *, trusted: bool = False, allow: Collection[str] | None = None) -> Source:
    """The source that `table` (a name, a table or a source) describes; ConfigError if there is none.

    trusted: the table is one's own, so import strings and `download` count. allow: import strings that count in a peer's
    table too. A peer's table never makes this process fetch anything: a field `download` is false in it.
    """
    source = registry.build("dataset", DATASETS, table, trusted=trusted, allow=allow)
    if not isinstance(source, Source):
        raise ConfigError(f"dataset {table!r}: {type(source).__name__} has no load(folder)")
    if source is not table and not trusted and getattr(source, "download", False):
        source = dataclasses.replace(source, download=False)  # type: ignore[type-var]
    if not isinstance(source, Hashable):
        raise ConfigError(
            f"dataset {table!r}: {type(source).__name__} is not hashable; declare it @dataclass(frozen=True)"
        )
    return source


def load(table: Any, data_dir: Path | None, *, trusted: bool = False, allow: Collection[str] | None = None) -> Dataset:
    """The set that `table` describes, read once per process and folder and shared by all callers, on any thread.

    data_dir: where files lie, None for the default of data_folder. DataError names the folder looked in and the remedy.
    trusted, allow: as for make.
    """
    source = make(table, trusted=trusted, allow=allow)
    key = (source, data_folder(data_dir))
    with _lock:
        if key not in _loaded:
            _loaded[key] = source.load(key[1])
        return _loaded[key]
