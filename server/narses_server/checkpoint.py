"""Checkpoints: everything a run needs to go on after its process was killed at any instant.

One file per checkpoint, a safetensors file: the tensors, and in the header's metadata a JSON manifest and a digest over both.
The files are written in turn, each over the oldest checkpoint and in place: creating, renaming and removing files would be two
more waits for the disk, every round. A file is complete if it has its digest, and the ones not being written always are.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from narses import durable
from narses.errors import CheckpointError, ConfigError
from narses.rpc.digest import hasher

log = structlog.get_logger("narses.server")

FORMAT = 2
DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
"""What a checkpoint can hold, under safetensors' names."""

_DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError)
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")
_HALF_WRITTEN = re.compile(_NAME.pattern + re.escape(durable.PARTIAL))
_FREE = "free"  # stands for the rest of a file, so that the file keeps its size
_FREE_ENTRY = 128  # bytes of it in the header, at most


@dataclass(frozen=True)
class Checkpoint:
    """State after `rounds` rounds. tensors: "parameters" and whatever else the run carries; facts: plain JSON values."""

    rounds: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in `folder`: the last `keep` complete ones, and a file more that is written over next.

    `config_hash` ties them to the run's configuration.
    """

    def __init__(self, folder: Path, config_hash: str, keep: int) -> None:
        self._folder = folder
        self._config_hash = config_hash
        self._keep = keep
        self._damaged: set[Path] = set()
        self._files: deque[Path] = deque()  # in the order in which they are written over; known from the first save on
        self._sizes: dict[Path, int] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"checkpoint folder {folder}: cannot be made ({error.strerror})") from None

    def save(self, rounds: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> int:
        """Make the state after `rounds` rounds durable; returns the bytes written. CheckpointError if the disk refuses.

        tensors: dense, of one of DTYPES. Beside their own memory none is needed for tensors on the CPU.
        """
        content = _Content({"format": FORMAT, "config": self._config_hash, "rounds": rounds, "facts": facts}, tensors)
        try:
            if not self._files:
                self._take_stock()
            path = self._files[0]
            if content.least <= self._sizes[path]:
                durable.overwrite(path, content.buffers(self._sizes[path]))
            else:
                size = content.least + content.least // 8  # room for what the next ones have more
                buffers = content.buffers(size)
                durable.write(path, [*buffers, bytes(size - sum(map(len, buffers)))])
                self._sizes[path] = size
        except OSError as error:
            raise CheckpointError(
                f"round {rounds - 1} cannot be made durable in {self._folder} ({error.strerror}); the run stops, and resumes "
                f"from the checkpoint before it once the disk takes writes again"
            ) from None
        self._files.rotate(-1)
        return content.least

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint of this configuration; damaged ones are named in the log and passed over.

        ConfigError if the newest complete one belongs to another configuration: starting over would overwrite it.
        """
        for path in reversed(self._by_age()):
            try:
                checkpoint, manifest = _load(path)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                log.warning(
                    "checkpoint is incomplete or damaged, the one before it is tried", file=str(path), why=str(error)
                )
                self._damaged.add(path)
                continue
            if manifest["format"] != FORMAT:
                raise ConfigError(
                    f"{path} has format {manifest['format']}, this version reads {FORMAT}; go on with the version that wrote "
                    f"it, or choose another output folder or run name"
                )
            found = manifest["config"]
            if found != self._config_hash:
                raise ConfigError(
                    f"{path} belongs to another configuration (hash {found[:12]}, this run has "
                    f"{self._config_hash[:12]}); restore the configuration, or choose another output folder or run name"
                )
            return checkpoint
        return None

    def _by_age(self) -> list[Path]:
        """The files that there are, oldest checkpoint first; before all others what is no checkpoint any more."""
        ages = {p: -1 if p in self._damaged else _rounds(p) for p in self._folder.iterdir() if _NAME.fullmatch(p.name)}
        return sorted(ages, key=lambda path: (ages[path], path))

    def _take_stock(self) -> None:
        """Decide which files are written over, in which order; what a kill left half-written goes."""
        for path in self._folder.iterdir():
            if _HALF_WRITTEN.fullmatch(path.name):
                path.unlink()
        there = self._by_age()
        while len(there) > self._keep + 1:
            there.pop(0).unlink()
        names = (self._folder / f"checkpoint-{i}.safetensors" for i in range(len(there) + self._keep + 1))
        new = [path for path in names if path not in there][: self._keep + 1 - len(there)]
        self._sizes = {path: path.stat().st_size for path in there} | dict.fromkeys(new, 0)
        self._files.extend([*new, *there])


class _Content:
    """A safetensors file as buffers, which refer to the tensors' own memory: safetensors' `save` would make two copies of it.

    Eight bytes of header length, the header as JSON, the tensors one after another; the wider types first, so that each
    tensor begins at a multiple of its type's size; and the rest of the file, which is not written.
    """

    def __init__(self, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        text = json.dumps(manifest, sort_keys=True)
        raw = {name: _raw(tensor) for name, tensor in tensors.items()}
        self._header: dict[str, Any] = {"__metadata__": {"manifest": text, "digest": _digest(text, tensors, raw)}}
        self._data: list[memoryview] = []
        self._end = 0
        for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
            self._append(name, DTYPES[tensors[name].dtype], list(tensors[name].shape), len(raw[name]))
            self._data.append(raw[name])
        self._header_bytes = -(-(len(json.dumps(self._header)) + _FREE_ENTRY) // 8) * 8

    def _append(self, name: str, dtype: str, shape: list[int], count: int) -> None:
        self._header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [self._end, self._end + count]}
        self._end += count

    @property
    def least(self) -> int:
        """Bytes that the file must have."""
        return 8 + self._header_bytes + self._end

    def buffers(self, size: int) -> list[bytes | memoryview]:
        """The beginning of a file of `size` bytes. Once."""
        free = size - self.least
        self._append(_FREE, "U8", [free], free)
        text = json.dumps(self._header).encode().ljust(self._header_bytes)
        assert len(text) == self._header_bytes
        return [len(text).to_bytes(8, "little"), text, *self._data]


def config_hash(config: Mapping[str, Any]) -> str:
    """The hash that ties a checkpoint to a run's configuration, as model_dump(mode="json") gives it."""
    state = hasher("blake3")
    state.update(json.dumps(config, sort_keys=True).encode())
    return state.digest().hex()


def _rounds(path: Path) -> int:
    """After how many rounds it was written, going by its header alone; -1 if that is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return int(json.loads(file.metadata()["manifest"])["rounds"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return -1


def _load(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """The checkpoint and its whole manifest."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys() if name != _FREE}  # noqa: SIM118
    text = metadata["manifest"]
    if metadata["digest"] != _digest(text, tensors, {name: _raw(tensor) for name, tensor in tensors.items()}):
        raise ValueError("its content does not have its digest")
    manifest = json.loads(text)
    return Checkpoint(manifest["rounds"], tensors, manifest["facts"]), manifest


def _raw(tensor: Tensor) -> memoryview:
    """The tensor's bytes: its own memory if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _digest(manifest: str, tensors: Mapping[str, Tensor], raw: Mapping[str, memoryview]) -> str:
    """BLAKE3 over the manifest and every tensor's name and bytes, in order of name."""
    state = hasher("blake3")
    state.update(manifest.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        state.update(raw[name])
    return state.digest().hex()
