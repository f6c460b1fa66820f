"""Configuration that every daemon has: where it can be watched, and how it logs."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from narses.config import Config
from narses.observe.process import address


class Endpoint(Config):
    """[metrics]: Prometheus over HTTP. [health]: grpc.health.v1, plaintext, on a port of its own."""

    listen: str = ""
    """host:port; empty turns it off, port 0 takes a free one and the log says which."""

    @field_validator("listen")
    @classmethod
    def _parses(cls, text: str) -> str:
        if text:
            address(text)
        return text


class LogConfig(Config):
    """[log]: on stderr."""

    format: Literal["console", "json"] = "console"
    """"console" for people, "json" (one object per line) for machines."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe events that are shown."""
