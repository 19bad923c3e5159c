"""Environments to install into."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECONDS = 600


def run(*command, **options):
    """Its standard output; where it fails, all that it printed is the failure."""
    done = subprocess.run(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
        **options,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout


def environment(folder, python):
    """A virtual environment without pip; gives its Python."""
    run(BIN / "uv", "venv", "--quiet", f"--python={python}", folder)
    return folder / "bin/python"


def install(python, *what):
    run(BIN / "uv", "pip", "install", "--quiet", f"--python={python}", *what)
    run(BIN / "uv", "pip", "check", "--quiet", f"--python={python}")


def installed_python(version):
    """The path of this Python, if it is installed and runs."""
    path = shutil.which(f"python{version}")
    # A name may be there without what it stands for, as with pyenv.
    works = path and subprocess.run([path, "-c", ""], check=False, capture_output=True)
    return path if works and works.returncode == 0 else None
