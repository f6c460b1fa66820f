"""A daemon as an operating-system process: how it is told to stop, what it runs, where it listens."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import platform
import signal
from importlib import metadata
from types import FrameType

from narses.errors import ConfigError

REVISION_VARIABLE = "NARSES_REVISION"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


async def stop_event() -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; a second one ends the process at once with 128 + its number.

    To be called once, from the main thread's loop. The handlers go when the loop closes.
    """
    loop = asyncio.get_running_loop()
    event = asyncio.Event()

    def first() -> None:
        event.set()
        for number in STOP_SIGNALS:
            # Not through the loop, which may be what hangs; and not the default action, which the kernel withholds from
            # process 1 of a container.
            loop.remove_signal_handler(number)
            signal.signal(number, _exit)

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, first)
    return event


def _exit(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


def build_info() -> dict[str, str]:
    """The labels of narses_build_info: version, revision ("unknown" if nothing tells it), python, torch."""
    return {
        "version": _version("narses"),
        "revision": os.environ.get(REVISION_VARIABLE) or _installed_revision(),
        "python": platform.python_version(),
        "torch": _version("torch"),
    }


def address(text: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[IPv6]:port"; port 0 means any free one. ConfigError for anything else."""
    host, _, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if bracketed:
        host = host[1:-1]
    legal_host = _is_ipv6(host) if bracketed else bool(host) and not set(host) & set("[]:/ ") and host.isprintable()
    legal_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
    if not (legal_host and legal_port):
        raise ConfigError(f"address {text!r}: expected host:port with a port of 0 to 65535, an IPv6 host in [brackets]")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than "localhost" is not looked up, and not believed."""
    if host.lower() == "localhost":
        return True
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (mapped or ip).is_loopback


def _is_ipv6(host: str) -> bool:
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _installed_revision() -> str:
    """The commit of an installation from a repository (PEP 610)."""
    try:
        text = metadata.distribution("narses").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return "unknown"
    revision = json.loads(text or "{}").get("vcs_info", {}).get("commit_id", "unknown")
    return str(revision)
