"""Task and tables over the wire: the round trip is exact, and what a peer sends is validated like a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narses.errors import ConfigError
from narses.rpc.convert import TABLE_LIMIT, table_from_wire, table_to_wire, task_from_wire, task_to_wire
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses.task import LearningRate, Task

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
tables = st.builds(
    lambda name, fields: {**fields, "name": name}, st.text(), st.dictionaries(st.text(), json_values, max_size=4)
)


def task(**changes: Any) -> Task:
    """A task, with `changes`."""
    fields: dict[str, Any] = {
        "run_id": bytes(range(16)),
        "run_name": "a/b",
        "n": 12,
        "rounds": 50,
        "model": {"name": "mlp", "hidden": 32},
        "dataset": {"name": "digits"},
        "partition": {"name": "iid"},
        "batch": 32,
        "seed": 2**63 - 1,
        "learning_rate": LearningRate(initial=0.1, fading=10000.0),
        "dimension": 2410,
        "layout": bytes(32),
        "chunk_bytes": 4096,
        "digest": "sha256",
    }
    return Task(**{**fields, **changes})


@given(
    n=st.integers(1, 4096),
    rounds=st.integers(1, 2**63),
    seed=st.integers(0, 2**63 - 1),
    rate=st.floats(1e-300, 1e300),
    fading=st.none() | st.floats(1e-300, 1e300),
    partition=st.sampled_from(["shards", "iid"]) | tables,
    digest=st.sampled_from(["blake3", "sha256"]),
    model=tables,
    dataset=tables,
    dimension=st.integers(1, 2**40),
)
def test_a_task_survives_the_wire(rate: float, fading: float | None, **changes: Any) -> None:
    sent = task(learning_rate=LearningRate(initial=rate, fading=fading), **changes)
    frame = task_to_wire(sent).SerializeToString()
    assert task_from_wire(pb.Task.FromString(frame)) == sent


@given(tables)
def test_a_table_survives_the_wire_in_one_spelling(table: dict[str, Any]) -> None:
    text = table_to_wire(table)
    assert table_from_wire(text, "rule") == table
    assert table_to_wire(json.loads(text)) == text
    assert table_to_wire(dict(reversed(table.items()))) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_00, "not JSON"),
        ("null", "no name"),
        ("[]", "no name"),
        ('{"name": 3}', "no name"),
        ('{"hidden": 3}', "no name"),
        ('{"name": "' + "a" * TABLE_LIMIT + '"}', f"at most {TABLE_LIMIT}"),
    ],
)
def test_a_table_that_is_none(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as error:
        table_from_wire(text, "model")
    assert "model table from the peer" in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda m: m.ClearField("run_id"), "run_id"),
        (lambda m: m.ClearField("n"), "n = 0"),
        (lambda m: m.ClearField("rounds"), "rounds = 0"),
        (lambda m: m.ClearField("local_steps"), "local_steps = 'pass' goes with update = \"parameters\""),
        (lambda m: setattr(m, "local_momentum", 1.0), "local_momentum = 1.0"),
        (lambda m: setattr(m, "local_l2", -1.0), "local_l2 = -1.0"),
        (lambda m: m.ClearField("dimension"), "dimension = 0"),
        (lambda m: m.ClearField("chunk_bytes"), "chunk_bytes = 0"),
        (lambda m: m.ClearField("layout"), "layout"),
        (lambda m: m.ClearField("partition"), "partition table"),
        (lambda m: m.ClearField("update"), "update kind number 0 is unknown"),
        (lambda m: m.ClearField("dtype"), "data type number 0 is unknown"),
        (lambda m: m.ClearField("digest"), "digest algorithm number 0 is unknown"),
        (lambda m: setattr(m, "seed", 2**63), "seed"),
        (lambda m: setattr(m, "learning_rate", 0.0), "initial = 0.0"),
        (lambda m: setattr(m, "learning_rate", float("nan")), "initial = nan"),
        (lambda m: setattr(m, "learning_rate", float("inf")), "initial = inf"),
        (lambda m: setattr(m, "fading", float("nan")), "fading = nan"),
        (lambda m: setattr(m, "model", "no json"), "model table"),
    ],
)
def test_a_task_that_cannot_be(spoil: Callable[[pb.Task], None], complaint: str) -> None:
    message = task_to_wire(task())
    spoil(message)
    with pytest.raises(ConfigError, match=complaint) as error:
        task_from_wire(message)
    assert "from the peer" in str(error.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_task_or_a_config_error(data: bytes) -> None:
    try:
        message = pb.Task.FromString(data)
    except Exception:
        return
    with pytest.raises(ConfigError):
        task_from_wire(message)  # too short to hold all that a task needs
