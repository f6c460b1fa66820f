"""Where a model's arithmetic runs, and how its bits are kept independent of the machine's number of cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from narses.errors import ConfigError


def choose_device(device: str) -> torch.device:
    """ "auto" takes CUDA where there is one; ConfigError for "cuda" without CUDA and for unknown names."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {device!r}: expected auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda': torch finds no CUDA device here; use device = 'cpu' or 'auto'")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on the calling thread alone: a product split over threads rounds differently for each number of them.

    torch keeps the number per calling thread (OpenMP's and MKL's own scope), so other threads keep theirs.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
