"""Pre-aggregations: a rule that changes the updates, and hands them to another rule."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, SkipValidation, field_validator
from pydantic.dataclasses import dataclass

from narses.config import STRICT
from narses.rules.base import Aggregation, Context, Property, Rule, extra_rows, trusted_samples
from narses.updates import Updates


def _default_rule() -> Any:
    return {"name": "trimmed-mean"}


@dataclass(frozen=True, config=STRICT)
class PreAggregation:
    """What they share: the wrapped `rule` (any, the trimmed mean unless said otherwise), and what can be claimed for both.

    A class claims nothing, since that depends on the rule; an object claims what its rule claims and the change keeps. Memory:
    one more (n, D) matrix. State, scores and what the wrapped rule asks of the context are that rule's own.
    """

    rule: Annotated[Rule, SkipValidation] = Field(default_factory=_default_rule, validate_default=True)

    properties: ClassVar[frozenset[Property]] = frozenset()
    keeps: ClassVar[frozenset[Property]] = frozenset()

    @field_validator("rule", mode="before")
    @classmethod
    def _build_rule(cls, value: Any) -> Rule:
        from narses.rules import make  # the registry holds these classes

        return make(value)

    def __post_init__(self) -> None:
        claimed = self.keeps & frozenset(getattr(self.rule, "properties", ()))
        object.__setattr__(self, "properties", claimed)

    @property
    def trusted_samples(self) -> int:
        """The wrapped rule's."""
        return trusted_samples(self.rule)

    def extra_rows(self, n: int) -> int:
        """The changed updates, and the wrapped rule's own."""
        return n + extra_rows(self.rule, n)

    def min_updates(self, f: int) -> int:
        """The wrapped rule's."""
        return self.rule.min_updates(f)

    def of_mixed(self, updates: Updates, f: int, context: Context | None) -> Aggregation:
        """The wrapped rule on rows that are mixtures: what it selects and scores is no worker's own."""
        result = self.rule(updates, f, context)
        return Aggregation(result.vector_D, state=result.state)
