"""Configuration of the adversary: where it stands, and what it does in which run."""

from __future__ import annotations

from functools import cached_property
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from narses.config import Config
from narses.observe.process import address, is_loopback
from narses_adversary.attacks import is_data_attack
from narses_adversary.plan import Plan, Schedule
from narses_worker.config import ClientConfig, WorkerConfig, parse_ids

Table = dict[str, Any]


class Attacking(Config):
    """Either [attack], in force in every run, or [[schedule]] entries {runs = glob, attack = table}; none: honest.

    seed: of the adversary's own randomness (members chosen per round, noise). trusted imports: this is one's own file.
    """

    attack: Table | None = None
    """In force in every run: a table of narses_adversary.attacks with start_round, stop_round, members, f_real."""
    schedule: tuple[Table, ...] = ()
    """[[schedule]]: runs = a glob over run names, attack = a table; the first match decides, none: honest."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the adversary's own randomness: members chosen per round, noise."""

    @field_validator("attack", mode="before")
    @classmethod
    def _table(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("schedule", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.attack is not None and self.schedule:
            raise ValueError(
                "attack and schedule are both there; expected one: attack holds in every run, schedule picks by name"
            )
        _ = self.plans
        return self

    @cached_property
    def plans(self) -> Schedule:
        """Every entry built; ConfigError in one sentence."""
        if self.attack is not None:
            return Schedule.of([{"runs": "*", "attack": self.attack}], source="attack")
        return Schedule.of(list(self.schedule))

    def plan_for(self, run_name: str) -> Plan | None:
        """The plan for a run, None where the adversary stays honest."""
        return self.plans.plan_for(run_name)

    def _enough(self, workers: tuple[int, ...]) -> None:
        """ValueError if a plan wants more attackers than there are `workers`: it could never attack."""
        for entry in self.plans.entries:
            wanted = entry.plan.f_real or 0
            if wanted > len(workers):
                raise ValueError(
                    f"attack {entry.plan.name!r}: f_real = {wanted} exceeds the {len(workers)} ids in workers; lower "
                    f"f_real or add workers"
                )


class AdversaryConfig(WorkerConfig, Attacking):
    """adversary.toml: a daemon that trains for its `workers` like an honest one and lies as the plan says."""

    @model_validator(mode="after")
    def _members(self) -> Self:
        self._enough(self.workers)
        return self


class ProxyConfig(ClientConfig, Attacking):
    """proxy.toml: stands between some daemons and the server; daemons name `listen` as their server.

    workers: whose updates it may rewrite, as a list or as "0-5,8"; null: all that pass. It never touches others.
    """

    listen: str = "127.0.0.1:50061"
    """host:port for the daemons, which name it as their server; port 0 takes a free one."""
    workers: tuple[int, ...] | None = None
    """Whose updates may be rewritten; absent: all that pass."""

    @field_validator("workers", mode="before")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        return value if value is None else parse_ids(value)

    @model_validator(mode="after")
    def _members(self) -> Self:
        for entry in self.plans.entries:
            if is_data_attack(entry.plan.attack):
                raise ValueError(
                    f"attack {entry.plan.name!r} poisons training data, which never pass a proxy; run it in "
                    f"`narses-adversary worker`"
                )
        if self.workers is not None:
            self._enough(self.workers)
        return self

    @model_validator(mode="after")
    def _listens(self) -> Self:
        host, _ = address(self.listen)
        if not is_loopback(host) and not self.insecure_remote:
            raise ValueError(
                f"listen = {self.listen} is reachable from other machines in plaintext; set insecure_remote = true to accept "
                f"that, or listen on 127.0.0.1"
            )
        return self
