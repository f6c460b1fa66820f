"""python -m bench [NAME] [options]: run all benchmarks, or the one of NAMES, and say where the results are written."""

from __future__ import annotations

import importlib
import sys

NAMES = ("push", "rounds", "checkpoint", "gradients", "rules", "distances", "experiment")


def main(arguments: list[str]) -> int:
    """Run what `arguments` ask for; 2 for a name that is none."""
    names, options = (arguments[:1], arguments[1:]) if arguments else (list(NAMES), [])
    if names[0] not in NAMES:
        print(f"{names[0]!r} is no benchmark: expected one of {', '.join(NAMES)}, or nothing for all", file=sys.stderr)
        return 2
    for name in names:
        print(f"measuring {name} ...", flush=True)
        result = importlib.import_module(f"bench.{name}").main(options)
        path = result.write()
        print(path.read_text(encoding="utf-8"))
        print(f"written: {path} and .json\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
