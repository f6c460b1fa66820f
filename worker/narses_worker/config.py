"""Configuration of a daemon that connects to a server: the honest worker's, and what the adversary's builds on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import PositiveFloat, PositiveInt, field_validator, model_validator

from narses.config import Config
from narses.observe.config import Endpoint, LogConfig
from narses.observe.process import address, is_loopback


class ClientConfig(Config):
    """How to reach the server, and when to give up. Times are seconds.

    connect_timeout: without an answer for this long the daemon exits. session_timeout: how long a live session of the same
    worker id is waited for, before the id is taken to be in use elsewhere. push_timeout: for one stream of updates.
    """

    server: str = "127.0.0.1:50051"
    insecure: bool = False
    insecure_remote: bool = False
    connect_timeout: PositiveFloat = 60.0
    session_timeout: PositiveFloat = 20.0
    push_timeout: PositiveFloat = 120.0
    drain_timeout: PositiveFloat = 10.0
    keep_large_blocks: bool = True
    metrics: Endpoint = Endpoint()
    health: Endpoint = Endpoint()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _plaintext(self) -> Self:
        host, port = address(self.server)
        if port == 0:
            raise ValueError(f"server = {self.server}: port 0 is no address to connect to")
        if not self.insecure:
            raise ValueError(
                f"server = {self.server}: connections are plaintext in this version; set insecure = true to accept that the "
                f"server is not authenticated and updates can be rewritten on the way"
            )
        if not is_loopback(host) and not self.insecure_remote:
            raise ValueError(
                f"server = {self.server} is another machine and the connection plaintext; set insecure_remote = true to "
                f"accept that"
            )
        return self


class WorkerConfig(ClientConfig):
    """worker.toml. workers: the logical workers this daemon hosts, as a list or as "0-5,8".

    threads: of torch; updates are computed on one thread whatever this says, so that their bits do not depend on it.
    """

    workers: tuple[int, ...]
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data_dir: Path | None = None
    threads: PositiveInt = 1

    @field_validator("workers", mode="before")
    @classmethod
    def _ids(cls, value: Any) -> Any:
        return parse_ids(value)

    @field_validator("data_dir", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return Path(value) if isinstance(value, str) else value


def parse_ids(value: Any) -> Any:
    """Worker ids from a list or from text such as "0-5,8"; ascending, each once. ValueError names what is wrong."""
    if isinstance(value, str):
        ids: list[int] = []
        for part in value.split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
                raise ValueError(f'{value!r}: expected worker ids such as "0-5,8"')
            if dash and int(last) - int(first) >= 4096:
                raise ValueError(f"{value!r}: at most 4096 workers")
            ids.extend(range(int(first), int(last or first) + 1))
        value = ids
    if isinstance(value, list | tuple) and all(type(i) is int for i in value):
        if not value or min(value) < 0:
            raise ValueError(f"{list(value)}: expected one or more ids, counted from 0")
        if len(set(value)) < len(value):
            raise ValueError(f"{list(value)}: an id is there twice")
        return tuple(sorted(value))
    return value
