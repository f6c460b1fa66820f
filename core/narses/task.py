"""The Task: what a worker trains, fixed for one run by the server and sent once per session.

D = parameters in the flat vector.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from narses.config import Config


class LearningRate(Config):
    """eta(t) = initial * r / (t + r) with r = fading (the papers' fading rate); fading = null keeps it constant."""

    initial: float = Field(gt=0)
    fading: float | None = Field(default=None, gt=0)

    def at(self, round_: int) -> float:
        """The learning rate of round `round_`, counted from 0."""
        return self.initial if self.fading is None else self.initial * self.fading / (round_ + self.fading)


UpdateKind = Literal["gradient", "parameters"]


class Task(Config):
    """Everything a worker needs to compute update (worker, round) from the round's parameters, and nothing about attacks.

    model, dataset, partition: registry tables. The batch of worker i in round t and its dropout masks are functions of
    (seed, i, t) alone.

    update: what is pushed. "gradient": g, of the mean loss over one batch at the round's parameters P (and with
    local_momentum the sum m <- local_momentum m + g). "parameters": the worker's own parameters after local_steps steps
    v <- local_momentum v - eta(round) g; p <- p + v that start at p = P, Algorithm 1 of Baruch et al., "A Little Is
    Enough" (2019). local_l2 w is added to every gradient. batch: samples of one step, or "shard", the worker's whole one.
    micro_batch: samples that pass through the model at once; the gradient of a batch is the mean over its pieces.
    """

    run_id: bytes = Field(min_length=16, max_length=16)
    run_name: str
    n: PositiveInt
    rounds: PositiveInt
    model: dict[str, Any]
    dataset: dict[str, Any]
    partition: dict[str, Any] = Field(default_factory=lambda: {"name": "shards"})
    batch: PositiveInt | Literal["shard"]
    micro_batch: PositiveInt | None = None
    update: UpdateKind = "gradient"
    local_steps: PositiveInt | Literal["pass"] = 1
    local_momentum: float = Field(default=0.0, ge=0, lt=1)
    local_l2: NonNegativeFloat = 0.0
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

    @model_validator(mode="after")
    def _one_gradient(self) -> Self:
        if self.update == "gradient" and self.local_steps != 1:
            raise ValueError(several_steps(self.local_steps))
        return self


def several_steps(local_steps: int | str) -> str:
    """Why gradients have no local steps, for error texts."""
    return (
        f'local_steps = {local_steps!r} goes with update = "parameters": a gradient is taken once, at the parameters of the '
        f"round; change update or remove local_steps"
    )
