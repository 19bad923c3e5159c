"""What is built: version, commit and time of the checkout, and what an image says of them."""

import os
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from base_images import Base

ROOT = Path(__file__).resolve().parents[1]
PREFIX = "org.opencontainers.image"
"""Of the labels that the image specification of OCI has (annotations.md)."""
UNKNOWN = "unknown"


class SourceState(NamedTuple):
    """`epoch`: seconds since 1970 of the commit, or of SOURCE_DATE_EPOCH; None without both."""

    version: str
    revision: str
    epoch: int | None
    is_changed: bool
    """Files that git knows differ from the commit, or nobody can say."""
    url: str


def source_state(url: str | None = None) -> SourceState:
    """`url` is where the source is to be had: by default that of git's `origin`, if it is https."""
    found = re.search(r'__version__ = "(.*)"', (ROOT / "vmibridge/__init__.py").read_text())
    revision = _git("rev-parse", "HEAD")
    time = os.environ.get("SOURCE_DATE_EPOCH") or _git("log", "-1", "--format=%ct")
    origin = _git("remote", "get-url", "origin") or ""
    return SourceState(
        version=found[1] if found else UNKNOWN,
        revision=revision or UNKNOWN,
        epoch=int(time) if time else None,
        is_changed=_git("status", "--porcelain", "--untracked-files=no") != "",
        url=url or (origin if origin.startswith("https://") else UNKNOWN),
    )


def labels(state: SourceState, base: Base) -> dict[str, str]:
    """Those that differ from build to build. Title, description and licenses are in Dockerfiles."""
    told = {
        "version": state.version,
        "revision": state.revision,
        "source": state.url,
        "documentation": state.url,
        "base.name": base.name,
        "base.digest": base.digest,
    }
    if state.epoch is not None:
        told["created"] = datetime.fromtimestamp(state.epoch, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {f"{PREFIX}.{name}": value for name, value in told.items()}


def _git(*arguments: str) -> str | None:
    """What git prints; None where there is no git, or no commit."""
    try:
        done = subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
