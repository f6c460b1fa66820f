"""Configuration that every daemon has: where it can be watched, and how it logs."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from narses.config import Config
from narses.observe.process import address


class Endpoint(Config):
    """[metrics], [health]: where to listen; listen = "" turns it off. Port 0 takes a free one and the log says which."""

    listen: str = ""

    @field_validator("listen")
    @classmethod
    def _parses(cls, text: str) -> str:
        if text:
            address(text)
        return text


class LogConfig(Config):
    """[log]: format "console" for people, "json" for machines."""

    format: Literal["console", "json"] = "console"
    level: Literal["debug", "info", "warning", "error"] = "info"
