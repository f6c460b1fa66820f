"""Strict, typed configuration: one tree of frozen pydantic models, loaded from TOML, validated whole before anything starts."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from narses.errors import ConfigError

STRICT = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
"""For registry entries too: `@dataclass(frozen=True, config=STRICT)`."""


class Config(BaseModel):
    """Base of every configuration table: unknown keys, wrong types, later changes, and TOML's inf and nan are errors."""

    model_config = ConfigDict(**STRICT, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def of(cls, tree: Mapping[str, Any], source: str = "configuration") -> Self:
        """Validate `tree`; raises ConfigError whose text names every wrong key with its value."""
        try:
            return cls.model_validate(dict(tree))
        except ValidationError as error:
            raise ConfigError(f"{source}: {explain(error)}") from None

    @classmethod
    def load(cls, path: Path | None, sets: Sequence[str] = ()) -> Self:
        """Read the TOML file at `path` (none: defaults), apply `section.key=value` overrides, validate."""
        tree = read_toml(path) if path is not None else {}
        for assignment in sets:
            apply_set(tree, assignment)
        return cls.of(tree, source=str(path) if path is not None else "command line")


def read_toml(path: Path) -> dict[str, Any]:
    """The parsed TOML table at `path`; ConfigError if it is absent, unreadable or not TOML."""
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None


def apply_set(tree: dict[str, Any], assignment: str) -> None:
    """Apply one `--set section.key=value` to `tree` in place; the value is TOML, a bare word is a string."""
    key, equals, text = assignment.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {assignment}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    table = tree
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {assignment}: {name} is a value, not a section")
    table[names[-1]] = value


def explain(error: ValidationError) -> str:
    """One sentence per wrong key: where, what came, what was expected."""
    sentences: dict[
        str, list[str]
    ] = {}  # where a value may be of several kinds, each kind complains: one sentence for all
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if not _is_kind(part)) or "(whole)"
        match item["type"]:
            case "extra_forbidden" | "unexpected_keyword_argument":
                start, complaint = f"unknown key {where} (value {item['input']!r})", ""
            case "missing" | "missing_argument":
                start, complaint = f"{where} is required", ""
            case "value_error":
                cause = item.get("ctx", {}).get("error")
                text = str(cause) if cause is not None else item["msg"]
                start, complaint = (text, "") if where == "(whole)" else (where, text)
            case _:
                start, complaint = f"{where} = {item['input']!r}", f"{item['msg'][:1].lower()}{item['msg'][1:]}"
        sentences.setdefault(start, []).append(complaint)
    return "; ".join(
        f"{start}: {', or '.join(complaints)}" if any(complaints) else start for start, complaints in sentences.items()
    )


def _is_kind(part: str | int) -> bool:
    """Whether pydantic put `part` into a location to tell which member of a union complains."""
    return isinstance(part, str) and re.match(r"constrained-|literal\[|tuple\[", part) is not None
