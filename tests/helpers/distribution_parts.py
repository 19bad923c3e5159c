"""How the tests of wheel and sdist run commands."""

import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SECONDS = 300


class Built(NamedTuple):
    wheel: Path
    sdist: Path


def run(*command, cwd=ROOT):
    """Its output; where it fails, that is the failure."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout
