"""Configuration trees: strict, and every mistake told in one sentence that names the key and the value."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator

from narses.config import Config, apply_set, read_toml
from narses.errors import ConfigError


class Inner(Config):
    size: PositiveInt = 3
    rate: PositiveFloat = 0.5
    mode: Literal["fast", "slow"] = "fast"

    @field_validator("size")
    @classmethod
    def _even(cls, size: int) -> int:
        if size % 2 == 0 and size > 10:
            raise ValueError(f"size {size} is even")
        return size


class Outer(Config):
    name: str
    on: bool = False
    inner: Inner = Inner()

    @model_validator(mode="after")
    def _both(self) -> Outer:
        if self.on and self.inner.size == 1:
            raise ValueError("on with size = 1 makes no sense")
        return self


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({}, "name is required"),
        ({"name": "a", "nmae": 7}, "unknown key nmae (value 7)"),
        ({"name": "a", "inner": {"sizee": 7}}, "unknown key inner.sizee (value 7)"),
        ({"name": 7}, "name = 7: input should be a valid string"),
        ({"name": "a", "on": "yes"}, "on = 'yes': input should be a valid boolean"),
        ({"name": "a", "on": 1}, "on = 1: input should be a valid boolean"),
        ({"name": "a", "inner": 3}, "inner = 3: input should be a valid dictionary"),
        ({"name": "a", "inner": {"size": "3"}}, "inner.size = '3': input should be a valid integer"),
        ({"name": "a", "inner": {"size": 3.0}}, "inner.size = 3.0: input should be a valid integer"),
        ({"name": "a", "inner": {"size": True}}, "inner.size = True: input should be a valid integer"),
        ({"name": "a", "inner": {"size": 0}}, "inner.size = 0: input should be greater than 0"),
        ({"name": "a", "inner": {"size": 12}}, "inner.size: size 12 is even"),
        ({"name": "a", "inner": {"rate": float("inf")}}, "inner.rate = inf: input should be a finite number"),
        ({"name": "a", "inner": {"rate": float("nan")}}, "inner.rate = nan: input should be a finite number"),
        ({"name": "a", "inner": {"mode": "middling"}}, "inner.mode = 'middling': input should be 'fast' or 'slow'"),
        ({"name": "a", "on": True, "inner": {"size": 1}}, "on with size = 1 makes no sense"),
    ],
)
def test_a_mistake_is_told_with_key_and_value(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        Outer.of(tree, source="outer.toml")
    assert str(error.value).startswith(f"outer.toml: {sentence}")
    assert "\n" not in str(error.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Outer.of({"name": 1, "extra": 2, "inner": {"size": -1}})
    assert str(error.value).count(";") == 2


def test_whole_numbers_are_numbers() -> None:
    """TOML's `rate = 1` is meant."""
    assert Outer.of({"name": "a", "inner": {"rate": 1}}).inner.rate == 1.0


def test_a_configuration_does_not_change() -> None:
    outer = Outer(name="a")
    with pytest.raises(ValidationError, match="frozen"):
        outer.name = "b"  # type: ignore[misc]


def test_a_file_with_overrides(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('name = "file"\n[inner]\nsize = 5\n')
    assert Outer.load(path) == Outer(name="file", inner=Inner(size=5))
    changed = Outer.load(path, ["inner.size=7", "name=command line", "on=true", 'inner.mode="slow"', "inner.rate=1e-3"])
    assert changed == Outer(name="command line", on=True, inner=Inner(size=7, mode="slow", rate=1e-3))
    assert Outer.load(None, ["name=bare"]) == Outer(name="bare")


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text("size = 3")
    with pytest.raises(ConfigError) as error:
        Outer.load(path)
    assert str(error.value) == f"{path}: name is required; unknown key size (value 3)"
    with pytest.raises(ConfigError, match=r"^command line: name is required"):
        Outer.load(None)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"name = ", "not valid TOML"), (b"a = 1\na = 2", "not valid TOML"), (b"\xff\xfe", "not valid TOML")],
)
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint) as error:
        read_toml(path)
    assert str(error.value).startswith(str(path))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        read_toml(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_toml(tmp_path)


@pytest.mark.parametrize("assignment", ["name", "=3", "a..b=3", ".a=3", "a.=3", ""])
def test_an_override_that_is_none(assignment: str) -> None:
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        apply_set({}, assignment)


def test_an_override_inside_a_value() -> None:
    with pytest.raises(ConfigError, match="name is a value, not a section"):
        apply_set({"name": "a"}, "name.first=b")


def test_an_override_may_hold_an_equals_sign_and_any_toml() -> None:
    tree: dict[str, Any] = {}
    for assignment in ("a.b=x=y", "a.c=[1, 2]", 'a.d={ name = "krum", p = 1 }', "e=", "f = 3 "):
        apply_set(tree, assignment)
    assert tree == {"a": {"b": "x=y", "c": [1, 2], "d": {"name": "krum", "p": 1}}, "e": "", "f": 3}
