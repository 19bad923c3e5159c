"""How much of what vmibridge exports has a type that every type checker reads alike.

usage: public_types.py [PERCENT]

pyright's own measure, `--verifytypes`, over the whole package. What other packages leave untyped is
theirs and does not count. Exits with 1 below PERCENT (98), and names what is missing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

LOWEST = 98.0
ROOT = Path(__file__).parents[2]
BIN = str(Path(sys.executable).parent)


def report() -> dict[str, Any]:
    """What basedpyright found, as it prints it with `--outputjson`."""
    # Its exit status is 1 for a single symbol without a type: the score decides here.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "basedpyright", "--outputjson"),
            *("--verifytypes", "vmibridge", "--ignoreexternal"),
        ],
        check=False,
        cwd=ROOT,
        # With --verifytypes it ignores --pythonpath, and asks the first python in the path.
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    if "typeCompleteness" not in found:
        raise SystemExit(f"basedpyright did not look at vmibridge:\n{done.stdout}")
    return found["typeCompleteness"]


def main(lowest: float) -> int:
    found = report()
    counts = found["exportedSymbolCounts"]
    known, total = counts["withKnownType"], sum(counts.values())
    if not total:
        raise SystemExit("basedpyright found no symbol of vmibridge")
    score = 100 * found["completenessScore"]
    print(f"{known} of {total} exported symbols have a known type: {score:.1f} %")
    if score >= lowest:
        return 0
    for symbol in found["symbols"]:
        if symbol["isExported"] and not symbol["isTypeKnown"]:
            for diagnostic in symbol["diagnostics"]:
                print(f"{symbol['name']}: {diagnostic['message']}")
    print(f"at least {lowest:g} % is asked for")
    return 1


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) if len(sys.argv) > 1 else LOWEST))
