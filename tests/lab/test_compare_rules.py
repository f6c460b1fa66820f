"""examples/compare-rules runs, and shows what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "examples" / "compare-rules" / "compare_rules.py"


def test_ten_rules_under_every_attack(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    specification = importlib.util.spec_from_file_location("compare_rules", FILE)
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    picture = tmp_path / "rules.png"
    monkeypatch.setattr("sys.argv", ["compare_rules.py", "--output", str(picture), "--dimension", "2000"])
    script.main()

    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(script.RULES) == 10
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    found = script.measure(2000, 1)
    assert found["mean", "gaussian"][0] > 10, "averaging is destroyed"
    assert found["median", "gaussian"][0] < 0.5
    assert found["mean", "ipm epsilon 10.0"][1] < 0, "the mean climbs"
    assert found["bulyan", "ipm epsilon 10.0"][1] > 0.5
