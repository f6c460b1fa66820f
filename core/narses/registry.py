"""Building a rule, attack, model or data set from its configuration table.

A table is a name (`"krum"`), a mapping with a name and fields (`{"name": "krum", "p": 2}`) or an object that is already built.
Registries are literal dicts `name -> class`; classes are frozen pydantic dataclasses whose fields are the configuration.
`"my_package.rules:MyRule"` is imported, but only where `trusted` is true, or where one's own configuration names that very
string in `allow`: a name that came over the wire imports nothing by itself.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from narses.config import explain
from narses.errors import ConfigError

_IMPORT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def is_import_string(name: str) -> bool:
    """Whether `name` has the form "package.module:Class"."""
    return len(name) <= 200 and _IMPORT.fullmatch(name) is not None


def resolve(
    kind: str,
    registry: Mapping[str, type],
    name: str,
    *,
    trusted: bool = False,
    allow: Collection[str] | None = None,
) -> type:
    """The class behind `name`; ConfigError lists the known names if there is none.

    trusted: the name is from one's own configuration, so any import string counts. Else only those in `allow` do; None
    where the caller has no such setting.
    """
    if name in registry:
        return registry[name]
    if is_import_string(name):
        if trusted or name in (allow or ()):
            return _import(kind, name)
        raise ConfigError(
            f"{kind} {name!r}: import strings are accepted from one's own configuration only{_how(name, allow)}"
        )
    raise ConfigError(f"unknown {kind} {name!r}: expected one of {', '.join(sorted(registry))}")


def build(
    kind: str,
    registry: Mapping[str, type],
    table: Any,
    *,
    trusted: bool = False,
    allow: Collection[str] | None = None,
) -> Any:
    """The object that `table` describes. ConfigError names the kind, the entry, and the wrong field.

    trusted, allow: as for resolve.
    """
    if isinstance(table, str):
        table = {"name": table}
    if not isinstance(table, Mapping):
        return table
    fields = dict(table)
    name = fields.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"{kind}: expected a table with a name, got {dict(table)!r}")
    cls = resolve(kind, registry, name, trusted=trusted, allow=allow)
    try:
        return cls(**fields)
    except ValidationError as error:
        raise ConfigError(f"{kind} {name!r}: {explain(error)}") from None
    except TypeError as error:
        raise ConfigError(f"{kind} {name!r}: {error}") from None


def _how(name: str, allow: Collection[str] | None) -> str:
    """What to write where, for somebody who has that code and trusts it."""
    if allow is None:
        return ""
    line = ", ".join(f'"{entry}"' for entry in [*sorted(allow), name])
    return (
        f"; if that code is yours, let this program import it with the line allow = [{line}] in its configuration file"
    )


def _import(kind: str, name: str) -> type:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise ConfigError(
                f"{kind} {name!r}: there is no module {error.name!r} to import; install it, or put its "
                f"folder on PYTHONPATH"
            ) from None
        raise  # the module exists and broke while importing: its own error is the useful one
    found = getattr(module, attribute, None)
    if not isinstance(found, type):
        raise ConfigError(f"{kind} {name!r}: module {module_name!r} has no class {attribute!r}")
    return found
