"""Randomness as a pure function of names: the same (seed, keys) give the same stream on every machine and in every process."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *keys: str | int) -> int:
    """A 63-bit seed for the stream called `keys` under `seed`: SHA-256 over an unambiguous encoding, truncated."""
    text = "\x1f".join([str(seed), *(f"{type(key).__name__}:{key}" for key in keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *keys: str | int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator for the stream called `keys`, e.g. generator(seed, "batch", worker, round)."""
    return torch.Generator(device=device).manual_seed(derive(seed, *keys))
