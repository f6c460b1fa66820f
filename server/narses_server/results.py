"""What a run leaves behind: rounds.jsonl, one line per round; final.safetensors and best.safetensors; summary.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from safetensors.torch import save_file
from torch import Tensor, nn

from narses.errors import ConfigError
from narses_server.model import named


class Results:
    """Files of one run under `folder`; with folder None everything is dropped."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._rounds: TextIO | None = None
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._rounds = (folder / "rounds.jsonl").open("w", encoding="utf-8")
            except OSError as error:
                raise ConfigError(f"output folder {folder}: cannot be written ({error.strerror})") from None

    def round(self, line: dict[str, Any]) -> None:
        """Append one round; buffered, so the disk is touched once in many rounds."""
        if self._rounds is not None:
            self._rounds.write(json.dumps(line) + "\n")

    def model(self, name: str, parameters_D: Tensor, module: nn.Module) -> None:
        """Write the parameters as `name`.safetensors under the model's own names."""
        if self._folder is not None:
            partial = self._folder / f"{name}.safetensors.partial"
            save_file(named(parameters_D, module), partial)
            partial.replace(self._folder / f"{name}.safetensors")

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, whole or not at all, and close."""
        if self._folder is None or self._rounds is None:
            return
        self._rounds.close()
        partial = self._folder / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(self._folder / "summary.json")
