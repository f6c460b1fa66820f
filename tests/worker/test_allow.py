"""The line that lets a server name code which this worker then imports: import strings, to the letter, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narses import registry
from narses.errors import ConfigError
from narses_adversary.config import AdversaryConfig
from narses_worker.config import WorkerConfig

LEGAL: dict[str, Any] = {"insecure": True, "workers": [0]}


def test_nothing_is_allowed_by_default() -> None:
    assert WorkerConfig.of(LEGAL).allow == ()


@pytest.mark.parametrize("config", [WorkerConfig, AdversaryConfig])
def test_import_strings(config: type[WorkerConfig]) -> None:
    names = ["my_package.models:MyModel", "data:Set2"]
    assert config.of({**LEGAL, "allow": names}).allow == tuple(names)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (["mlp"], "'mlp': expected import strings"),
        (["my_package.models"], "expected import strings"),
        (["a:B", "*"], r"'\*': expected import strings"),
        (["a:B.c"], "expected import strings"),
        (["a: B"], "expected import strings"),
        ([3], "allow.0 = 3"),
        ("a:B", "allow = 'a:B'"),
    ],
)
def test_what_is_no_list_of_import_strings(value: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        WorkerConfig.of({**LEGAL, "allow": value})


@given(st.text(max_size=30) | st.from_regex(r"[a-z.]{1,8}:[A-Z]?[a-z.]{0,5}", fullmatch=True))
def test_a_name_from_a_peer_is_imported_only_if_it_is_listed(name: str) -> None:
    allow = ["collections:OrderedDict"]
    if name in allow:
        return
    with pytest.raises(ConfigError):
        registry.resolve("model", {}, name, allow=allow)


def test_a_listed_name_is_imported() -> None:
    found = registry.resolve("model", {}, "collections:OrderedDict", allow=["collections:OrderedDict"])
    assert found.__name__ == "OrderedDict"
    with pytest.raises(ConfigError, match="no class 'namedtuple'"):  # a function: nothing that is not a class is called
        registry.resolve("model", {}, "collections:namedtuple", allow=["collections:namedtuple"])


def test_a_registered_name_cannot_be_taken_by_an_import() -> None:
    assert registry.resolve("model", {"a:B": dict}, "a:B") is dict
