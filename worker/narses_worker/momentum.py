"""The momentum of a daemon's logical workers, kept per round so that it can follow a server that resumes.

A server that was killed goes on from the round after its last durable one, so what its workers had gathered since must be
forgotten: momentum is kept from that round on, in memory and, with a folder, on disk, where it also survives the daemon.

K = workers, D = parameters in the flat vector.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from narses import durable
from narses.errors import ConfigError

log = structlog.get_logger("narses.worker")

Rows = NDArray[np.float32]

_NAME = re.compile(r"before-(\d{10})-\d+\.safetensors")


class Momentum:
    """Of `workers` in run `run_id`. A restarted daemon may host other workers of the same folder than before."""

    def __init__(self, run_id: bytes, workers: Sequence[int], dimension: int, folder: Path | None) -> None:
        """folder: where every run has a folder of its own; those of other runs are over and are removed.

        ConfigError if it cannot be written.
        """
        self._workers = tuple(workers)
        self._shape = (len(self._workers), dimension)
        self._kept: dict[int, Rows] = {}  # round -> momentum before it
        self._folder = None if folder is None else folder / run_id.hex()
        if folder is None or self._folder is None:
            log.warning("no state_dir: if this daemon is restarted, its workers' momentum begins again at zero")
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for other in folder.iterdir():
                if other != self._folder and re.fullmatch("[0-9a-f]{32}", other.name):
                    shutil.rmtree(other)
        except OSError as error:
            raise ConfigError(f"state_dir {folder}: cannot be written ({error.strerror})") from None

    def before(self, round_: int, durable_round: int | None) -> Rows:
        """(K, D), fresh memory: what the workers had gathered before `round_`; nothing older is needed from now on.

        durable_round: the last round that the server cannot lose; None where it loses everything.
        """
        if round_ not in self._kept:
            self._kept[round_] = self._load(round_)
        self._forget(round_ if durable_round is None else min(round_, durable_round + 1))
        return self._kept[round_].copy()

    def after(self, round_: int, rows_KD: Rows) -> None:
        """Keep what the workers have gathered after `round_`, before the server counts on it. OSError if the disk refuses."""
        self._kept[round_ + 1] = rows_KD
        if self._folder is not None:
            rows = {str(worker): row_D for worker, row_D in zip(self._workers, rows_KD, strict=True)}
            name = f"before-{round_ + 1:010d}-{self._workers[0]}.safetensors"
            durable.write(self._folder / name, save(rows))

    def _forget(self, first: int) -> None:
        """Whatever is older than `first`."""
        for round_ in [known for known in self._kept if known < first]:
            del self._kept[round_]
        for round_, path in self._files():
            # One older file of this daemon's own would do no harm, but a run has many rounds.
            if round_ < first and path.name.endswith(f"-{self._workers[0]}.safetensors"):
                path.unlink(missing_ok=True)

    def _load(self, round_: int) -> Rows:
        """From disk: of each worker the newest that is not after `round_`, else zero."""
        rows_KD = np.zeros(self._shape, np.float32)
        if round_ == 0:
            return rows_KD
        found: dict[int, int] = {}
        for before, path in sorted(self._files(), reverse=True):
            if before <= round_:
                self._read(path, before, rows_KD, found)
        late = sorted(worker for worker in self._workers if found.get(worker) != round_)
        if late:
            known = {worker: found.get(worker, "zero") for worker in late}
            log.warning("momentum of this round is not there, older is taken", round=round_, workers=known)
        return rows_KD

    def _read(self, path: Path, before: int, rows_KD: Rows, found: dict[int, int]) -> None:
        try:
            with safe_open(path, framework="np") as file:
                names = set(file.keys())
                for index, worker in enumerate(self._workers):
                    if worker not in found and str(worker) in names:
                        row_D = file.get_tensor(str(worker))
                        if row_D.shape != self._shape[1:]:
                            raise ValueError(f"{row_D.shape[0]} values, expected {self._shape[1]}")
                        rows_KD[index] = row_D
                        found[worker] = before
        except (SafetensorError, OSError, ValueError) as error:
            log.warning("a file of momentum is damaged, an older one is tried", file=str(path), why=str(error))

    def _files(self) -> list[tuple[int, Path]]:
        if self._folder is None:
            return []
        found = [(_NAME.fullmatch(path.name), path) for path in self._folder.iterdir()]
        return [(int(match[1]), path) for match, path in found if match]
