"""What we write reads back equal."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narses_lab.toml import dumps

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(texts, v, max_size=3), max_leaves=12)


@given(st.dictionaries(texts, values | st.lists(st.dictionaries(texts, values, max_size=3), max_size=3), max_size=5))
def test_round_trip(tree):
    assert tomllib.loads(dumps(tree)) == tree


def test_sections_come_after_plain_values_whatever_their_order():
    assert dumps({"a": {"x": 1}, "b": 2, "c": [{"y": 3}]}) == "b = 2\n\n[a]\nx = 1\n\n[[c]]\ny = 3\n"


@pytest.mark.parametrize("value", [None, object(), {1, 2}])
def test_what_toml_has_not_is_refused(value):
    with pytest.raises(TypeError, match="TOML"):
        dumps({"key": value})
