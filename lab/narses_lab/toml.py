"""Writing TOML, which the standard library only reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dumps(tree: Mapping[str, Any]) -> str:
    """`tree` as TOML that reads back equal: plain values first, then a section per table, deeper tables inline.

    Values are str, bool, int, finite float, list and dict; a tuple is written as a list. TypeError for anything else.
    """
    plain, sections = [], []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            sections.append(_section(f"[{_key(key)}]", value))
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            sections += [_section(f"[[{_key(key)}]]", item) for item in value]
        else:
            plain.append(f"{_key(key)} = {_value(value)}\n")
    return "\n".join(["".join(plain), *sections]).lstrip("\n")


def _section(head: str, table: Mapping[str, Any]) -> str:
    return "".join([f"{head}\n", *(f"{_key(key)} = {_value(value)}\n" for key, value in table.items())])


def _key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # JSON's escapes are TOML's, except that TOML wants the delete character escaped too
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _string(value)
        case int() | float():
            return repr(value)
        case list() | tuple():
            return f"[{', '.join(map(_value, value))}]"
        case Mapping():
            return f"{{ {', '.join(f'{_key(key)} = {_value(item)}' for key, item in value.items())} }}"
    raise TypeError(f"{value!r} has no TOML form here")
