"""podman or docker, run as a program."""

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path
from typing import Any

NOFILE = 1 << 20
"""Open files of a container, where no setting says otherwise (containers.conf(5))."""
NPROC = 4096
"""Processes of its user: more than any of these needs, and fewer than limits are."""


class BuildError(Exception):
    """An image cannot be had."""


class Runner:
    """Runs podman or docker. `folder` is for files that have to be there as long as it is used."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.environment = dict(os.environ)
        if name == "podman":
            self._limit()
        if proxy := _proxy_of_apt():
            self.environment.setdefault("http_proxy", proxy)

    def _limit(self) -> None:
        """A process with lower limits than podman's defaults cannot start a container."""
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        is_configured = (
            "CONTAINERS_CONF" in os.environ or Path("/etc/containers/containers.conf").exists()
        )
        if is_configured or files == resource.RLIM_INFINITY or files >= NOFILE:
            return
        limits = [f"nofile={files}:{files}", f"nproc={NPROC}:{NPROC}"]
        settings = self.folder / "containers.conf"
        settings.write_text(f"[containers]\ndefault_ulimits = {json.dumps(limits)}\n")
        self.environment["CONTAINERS_CONF"] = str(settings)

    def run(
        self, *arguments: str, seconds: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[Any]:
        """Raises `TimeoutExpired`."""
        return subprocess.run(
            [self.name, *arguments],
            env=self.environment,
            timeout=seconds,
            check=False,
            **options,
        )

    def printed(self, *arguments: str, seconds: float = 300) -> str:
        """What it prints. Raises `BuildError` with its message if it fails."""
        try:
            done = self.run(*arguments, seconds=seconds, capture_output=True, text=True)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{self.name} {arguments[0]}: nothing in {seconds:g} s") from error
        if done.returncode:
            raise BuildError(f"{self.name} {arguments[0]}: {done.stderr.strip()[-500:]}")
        return str(done.stdout).strip()

    def has(self, image: str) -> bool:
        return self.run("image", "inspect", image, capture_output=True).returncode == 0


def _proxy_of_apt() -> str | None:
    if not shutil.which("apt-config"):
        return None
    done = subprocess.run(
        ["apt-config", "dump", "--format", "%v", "Acquire::http::Proxy"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None
