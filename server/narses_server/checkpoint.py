"""Checkpoints: everything a run needs to go on after its process was killed at any instant.

One file per checkpoint, `checkpoint-<rounds>.safetensors`: the tensors, and in the header's metadata a JSON manifest and a
digest over both. One file, because every fsync costs milliseconds. It is written under a temporary name, fsynced, renamed, and
the folder fsynced: a name that exists is complete, and the digest finds what a disk does to it later.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from narses.errors import CheckpointError, ConfigError
from narses.rpc.digest import hasher

log = structlog.get_logger("narses.server")

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d{10})\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """State after `rounds` rounds. tensors: "parameters" and whatever else the run carries; facts: plain JSON values."""

    rounds: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in `folder`; the last `keep` stay. `config_hash` ties them to the run's configuration."""

    def __init__(self, folder: Path, config_hash: str, keep: int) -> None:
        self._folder = folder
        self._config_hash = config_hash
        self._keep = keep
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"checkpoint folder {folder}: cannot be made ({error.strerror})") from None

    def save(self, rounds: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> int:
        """Make the state after `rounds` rounds durable; returns the file's bytes. CheckpointError if the disk refuses."""
        try:
            return self._save(rounds, tensors, facts)
        except OSError as error:
            raise CheckpointError(
                f"round {rounds - 1} cannot be made durable in {self._folder} ({error.strerror}); the run stops, and resumes "
                f"from the checkpoint before it once the disk takes writes again"
            ) from None

    def _save(self, rounds: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> int:
        manifest = json.dumps(
            {"format": FORMAT, "config": self._config_hash, "rounds": rounds, "facts": facts}, sort_keys=True
        )
        metadata = {"manifest": manifest, "digest": _digest(manifest, tensors)}
        content = save(dict(tensors), metadata=metadata)
        path = self._folder / f"checkpoint-{rounds:010d}.safetensors"
        partial = path.with_suffix(".partial")
        descriptor = os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        try:
            with memoryview(content) as view:
                written = 0
                while written < len(view):
                    written += os.write(descriptor, view[written:])
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
        self._sync_folder()
        self._prune(rounds)
        return len(content)

    def newest(self) -> Checkpoint | None:
        """The newest complete checkpoint of this configuration; damaged ones are named in the log and passed over.

        ConfigError if the newest complete one belongs to another configuration: starting over would overwrite it.
        """
        for path in sorted(self._folder.glob("checkpoint-*.safetensors"), reverse=True):
            if not _NAME.fullmatch(path.name):
                continue
            try:
                checkpoint, found = _load(path)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                log.warning("checkpoint is damaged, the one before it is tried", file=str(path), why=str(error))
                continue
            if found != self._config_hash:
                raise ConfigError(
                    f"{path} belongs to another configuration (hash {found[:12]}, this run has "
                    f"{self._config_hash[:12]}); restore the configuration, or choose another output folder or run name"
                )
            return checkpoint
        return None

    def _prune(self, newest: int) -> None:
        """Older than the last `keep`; a half-written one left by a kill goes too."""
        complete = sorted(p for p in self._folder.glob("checkpoint-*.safetensors") if _NAME.fullmatch(p.name))
        for path in complete[: -self._keep]:
            path.unlink(missing_ok=True)
        for path in self._folder.glob("checkpoint-*.partial"):
            path.unlink(missing_ok=True)

    def _sync_folder(self) -> None:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def config_hash(config: Mapping[str, Any]) -> str:
    """The hash that ties a checkpoint to a run's configuration, as model_dump(mode="json") gives it."""
    state = hasher("blake3")
    state.update(json.dumps(config, sort_keys=True).encode())
    return state.digest().hex()


def _load(path: Path) -> tuple[Checkpoint, str]:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a mapping
    manifest_text = metadata["manifest"]
    if metadata["digest"] != _digest(manifest_text, tensors):
        raise ValueError("its content does not have its digest")
    manifest = json.loads(manifest_text)
    if manifest["format"] != FORMAT:
        raise ValueError(f"format {manifest['format']} is unknown here, expected {FORMAT}")
    return Checkpoint(manifest["rounds"], tensors, manifest["facts"]), manifest["config"]


def _digest(manifest: str, tensors: Mapping[str, Tensor]) -> str:
    """BLAKE3 over the manifest and every tensor's name and bytes, in order of name."""
    state = hasher("blake3")
    state.update(manifest.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        state.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        state.update(tensor.contiguous().view(-1).numpy().view("uint8").data)
    return state.digest().hex()
