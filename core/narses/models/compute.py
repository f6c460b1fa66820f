"""Where a model's arithmetic runs, and how its bits are kept independent of cores, of threads and of what ran before."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from narses.errors import ConfigError

_drawing = threading.Lock()


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


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, whatever draws from torch's global generators (dropout knows no others) draws from the stream of `seed`.

    Afterwards they go on as if nothing had happened. They belong to the whole process, so one thread at a time: keep it short.
    """
    generators = _generators(device)
    with _drawing:
        states = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(seed)
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def trial(module: nn.Module, inputs: Tensor, classes: int) -> bool:
    """Run `module`, in the mode it is in, on `inputs` (B, *shape): whether it draws random numbers.

    ConfigError if what comes out is not (B, classes) logits. Its buffers may change.
    """
    with seeded(0, inputs.device), torch.no_grad():
        before = [generator.get_state() for generator in _generators(inputs.device)]
        logits = module(inputs)
        after = [generator.get_state() for generator in _generators(inputs.device)]
    if not isinstance(logits, Tensor) or logits.shape != (len(inputs), classes):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ConfigError(
            f"model {type(module).__name__} answers {len(inputs)} inputs of shape {tuple(inputs.shape[1:])} with {got}, "
            f"expected logits of shape {(len(inputs), classes)}"
        )
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _generators(device: torch.device) -> list[torch.Generator]:
    if device.type != "cuda":
        return [torch.default_generator]
    return [torch.default_generator, torch.cuda.default_generators[torch.cuda.current_device()]]
