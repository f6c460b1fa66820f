"""The Task: what a worker trains, fixed for one run by the server and sent once per session."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator

from narses.config import Config


class LearningRate(Config):
    """eta(t) = initial * r / (t + r) with r = fading (the papers' fading rate); fading = null keeps it constant."""

    initial: float = Field(gt=0)
    fading: float | None = Field(default=None, gt=0)

    def at(self, round_: int) -> float:
        """The learning rate of round `round_`, counted from 0."""
        return self.initial if self.fading is None else self.initial * self.fading / (round_ + self.fading)


class Task(Config):
    """Everything a worker needs to compute update (worker, round) from the round's parameters, and nothing about attacks.

    model, dataset, partition: registry tables. The batch of worker i in round t and its dropout masks are functions of
    (seed, i, t) alone.
    """

    run_id: bytes = Field(min_length=16, max_length=16)
    run_name: str
    n: PositiveInt
    rounds: PositiveInt
    model: dict[str, Any]
    dataset: dict[str, Any]
    partition: dict[str, Any] = Field(default_factory=lambda: {"name": "shards"})
    batch: PositiveInt
    update: Literal["gradient"] = "gradient"
    loss: Literal["cross-entropy"] = "cross-entropy"
    seed: int = Field(ge=0, lt=2**63)
    learning_rate: LearningRate
    dimension: PositiveInt
    layout: bytes = Field(min_length=32, max_length=32)
    chunk_bytes: PositiveInt = 1 << 20
    dtype: Literal["float32"] = "float32"
    digest: Literal["blake3", "sha256"] = "blake3"

    @field_validator("partition", mode="before")
    @classmethod
    def _table(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value
