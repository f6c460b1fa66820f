"""Task and tables between their typed form and the wire. What came over the wire is validated like a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from narses.errors import ConfigError
from narses.rpc.v1 import parameter_server_pb2 as pb
from narses.task import LearningRate, Task

_UPDATES = {"gradient": pb.UPDATE_KIND_GRADIENT, "parameters": pb.UPDATE_KIND_PARAMETERS}
_DTYPES = {"float32": pb.DATA_TYPE_FLOAT32}
_DIGESTS = {"blake3": pb.DIGEST_ALGORITHM_BLAKE3, "sha256": pb.DIGEST_ALGORITHM_SHA256}

TABLE_LIMIT = 16 << 10
"""Characters of the longest registry table accepted from a peer."""


def table_to_wire(table: Mapping[str, Any]) -> str:
    """Canonical JSON of a registry table: sorted keys, no spaces."""
    return json.dumps(table, sort_keys=True, separators=(",", ":"))


def table_from_wire(text: str, what: str) -> dict[str, Any]:
    """A registry table from the wire; ConfigError if it is not a JSON object with a name, or too long."""
    if len(text) > TABLE_LIMIT:
        raise ConfigError(f"{what} table from the peer has {len(text)} characters, at most {TABLE_LIMIT} are accepted")
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(f"{what} table from the peer is not JSON") from None
    if not isinstance(table, dict) or not isinstance(table.get("name"), str):
        raise ConfigError(f"{what} table from the peer has no name")
    return table


def task_to_wire(task: Task) -> pb.Task:
    """The protobuf form of `task`."""
    return pb.Task(
        run_id=task.run_id,
        run_name=task.run_name,
        n=task.n,
        rounds=task.rounds,
        model=table_to_wire(task.model),
        dataset=table_to_wire(task.dataset),
        partition=table_to_wire(task.partition),
        batch=0 if task.batch == "shard" else task.batch,
        update=_UPDATES[task.update],
        seed=task.seed,
        learning_rate=task.learning_rate.initial,
        fading=task.learning_rate.fading or 0.0,
        dimension=task.dimension,
        layout=task.layout,
        chunk_bytes=task.chunk_bytes,
        dtype=_DTYPES[task.dtype],
        digest=_DIGESTS[task.digest],
        local_steps=0 if task.local_steps == "pass" else task.local_steps,
        local_momentum=task.local_momentum,
        local_l2=task.local_l2,
        micro_batch=task.micro_batch or 0,
    )


def task_from_wire(message: pb.Task) -> Task:
    """The typed form of a Task from a peer; ConfigError names what is wrong with it."""
    return Task.of(
        {
            "run_id": message.run_id,
            "run_name": message.run_name,
            "n": message.n,
            "rounds": message.rounds,
            "model": table_from_wire(message.model, "model"),
            "dataset": table_from_wire(message.dataset, "data set"),
            "partition": table_from_wire(message.partition, "partition"),
            "batch": message.batch or "shard",
            "update": _named(_UPDATES, message.update, "update kind"),
            "seed": message.seed,
            "learning_rate": LearningRate.of(
                {"initial": message.learning_rate, "fading": message.fading or None}, source="task from the peer"
            ),
            "dimension": message.dimension,
            "layout": message.layout,
            "chunk_bytes": message.chunk_bytes,
            "dtype": _named(_DTYPES, message.dtype, "data type"),
            "digest": _named(_DIGESTS, message.digest, "digest algorithm"),
            "local_steps": message.local_steps or "pass",
            "local_momentum": message.local_momentum,
            "local_l2": message.local_l2,
            "micro_batch": message.micro_batch or None,
        },
        source="task from the peer",
    )


def _named(names: Mapping[str, int], value: int, what: str) -> str:
    for name, number in names.items():
        if number == value:
            return name
    raise ConfigError(f"task from the peer: {what} number {value} is unknown here; update this program")
