"""What a run leaves behind: rounds.jsonl, one line per round; final.safetensors and best.safetensors; summary.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from safetensors.torch import save_file
from torch import Tensor, nn

from narses.errors import ConfigError
from narses_server.model import named


class Results:
    """Files of one run under `folder`; with folder None everything is dropped."""

    def __init__(self, folder: Path | None, resume_at: int = 0, last: Mapping[str, Any] | None = None) -> None:
        """resume_at: keep the lines of earlier rounds, of an earlier process.

        last: what is known of round resume_at - 1, in case the kill came after it was durable and before its line.
        """
        self._folder = folder
        self._rounds: TextIO | None = None
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / "rounds.jsonl"
                kept = _lines_before(path, resume_at)
                if last is not None and last["round"] not in kept:
                    kept[last["round"]] = json.dumps(last) + "\n"
                # A kill between emptying the file and filling it would lose every line.
                partial = folder / "rounds.jsonl.partial"
                partial.write_text("".join(kept.values()), encoding="utf-8")
                partial.replace(path)
                # Line by line: what was written survives the process, though not the machine.
                self._rounds = path.open("a", encoding="utf-8", buffering=1)
            except OSError as error:
                raise ConfigError(f"output folder {folder}: cannot be written ({error.strerror})") from None

    @property
    def kept(self) -> bool:
        """Whether anything is written."""
        return self._folder is not None

    def round(self, line: dict[str, Any]) -> None:
        """Append one round."""
        if self._rounds is not None:
            self._rounds.write(json.dumps(line) + "\n")

    def model(self, name: str, parameters_D: Tensor, module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
        """Write the parameters, and the buffers that belong to them, as `name`.safetensors under the model's own names."""
        if self._folder is not None:
            partial = self._folder / f"{name}.safetensors.partial"
            save_file({**named(parameters_D, module), **buffers}, partial)
            partial.replace(self._folder / f"{name}.safetensors")

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, whole or not at all, and close."""
        if self._folder is None or self._rounds is None:
            return
        self._rounds.close()
        partial = self._folder / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(self._folder / "summary.json")


def _lines_before(path: Path, round_: int) -> dict[int, str]:
    """The complete lines of rounds before `round_`, by round."""
    if not round_ or not path.exists():
        return {}
    kept = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            of = json.loads(line)["round"]
            if of < round_ and line.endswith("\n"):
                kept[of] = line
        except (ValueError, KeyError, TypeError):
            continue  # the line that a kill cut short
    return kept
