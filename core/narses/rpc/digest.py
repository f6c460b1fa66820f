"""Digests of payloads, computed chunk by chunk while the bytes pass."""

from __future__ import annotations

import hashlib
from typing import Protocol

import blake3 as _blake3


class Hasher(Protocol):
    """What hashlib and blake3 objects have in common."""

    def update(self, data: memoryview | bytes, /) -> object: ...
    def digest(self) -> bytes: ...


def hasher(algorithm: str) -> Hasher:
    """A fresh 32-byte hasher; algorithm is "blake3" or "sha256" (the Task names it)."""
    if algorithm == "blake3":
        return _blake3.blake3()
    assert algorithm == "sha256", algorithm
    return hashlib.sha256()


def digest(algorithm: str, data: memoryview | bytes) -> bytes:
    """The 32-byte digest of `data`."""
    state = hasher(algorithm)
    state.update(data)
    return state.digest()
