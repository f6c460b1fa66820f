"""Is the committed protobuf code what the .proto generates? Exit code 1 and one sentence if not: python bench/check_proto.py"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "proto/narses/rpc/v1/parameter_server.proto"
COMMITTED = ROOT / "core/narses/rpc/v1"


def differences(generated: Path) -> list[str]:
    """Names of files that only one side has, or whose content differs."""
    new = {path.name: path.read_bytes() for path in generated.rglob("*_pb2*") if path.is_file()}
    old = {path.name: path.read_bytes() for path in COMMITTED.glob("*_pb2*") if path.is_file()}
    return sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))


def main() -> int:
    """0 if they are the same."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["-I", "proto", f"--python_out={folder}", f"--pyi_out={folder}", SOURCE]
        protoc = subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", *options], cwd=ROOT, capture_output=True, text=True
        )
        if protoc.returncode:
            print(f"{SOURCE} does not compile: {protoc.stderr.strip()}", file=sys.stderr)
            return 1
        wrong = differences(Path(folder))
    if wrong:
        print(
            f"{', '.join(wrong)} in core/narses/rpc/v1 is not what {SOURCE} generates: run 'make proto'",
            file=sys.stderr,
        )
        return 1
    print("generated protobuf code is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
