"""The command as users run it: a process of its own, over an image that nasm assembled.

A fork server starts the processes (`forked.py`), but for what a test starts without
`vmibridge` and `children`.
"""

import os
from pathlib import Path

import pytest
from children import Children
from children import run as run_child
from forked import fork_server
from needs import needs
from probe_guest import HANDLERS, command


@pytest.fixture
def image(tmp_path):
    def build(code, width=64, org=0x100000):
        source = tmp_path / "guest.asm"
        source.write_text(f"bits {width}\norg {org}\n{code}\n")
        target = tmp_path / "guest.bin"
        run_child([needs("nasm"), "-f", "bin", source, "-o", target], check=True)
        return str(target)

    return build


@pytest.fixture
def handlers(tmp_path):
    path = tmp_path / "probe.py"
    path.write_text(HANDLERS)
    return str(path)


@pytest.fixture(scope="session")
def forks():
    with fork_server() as server:
        yield server


@pytest.fixture
def children(forks):
    started = Children(forks.start)
    try:
        yield started
    finally:
        started.end()


@pytest.fixture
def vmibridge(forks, tmp_path):
    def run(*arguments, **options):
        options.setdefault("env", {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"})
        return run_child(command(*arguments), kind=forks.start, cwd=tmp_path, **options)

    return run


@pytest.fixture
def root():
    return Path(__file__).parents[2]
