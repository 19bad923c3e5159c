"""One run of compose.yaml, with names and volumes of its own."""

import json
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from children import Child, run

ROOT = Path(__file__).parents[2]
COMPOSE = (sys.executable, "-m", "podman_compose")
SECONDS = 300
TRAP = re.compile(r"^\d+ +\S+ +(cpuid|vmcall|vmmcall|device)\d\d ")
KERNEL = "console=ttyS0 quiet panic=-1 no_timer_check"


class Compose:
    """The services of one profile."""

    def __init__(self, engine, profile, guest, name="", **variables):
        self.engine = engine
        self.project = f"vmibridge-test-{os.getpid()}-{name or profile}"
        self.environment = {
            **engine.environment,
            "COMPOSE_PROFILES": profile,
            "COMPOSE_PROJECT_NAME": self.project,
            "VMIBRIDGE_COMPOSE": " ".join(COMPOSE),
            "VMIBRIDGE_GUEST": str(guest),
            "VMIBRIDGE_OUTCOMES": "true",
            **variables,
        }

    def compose(self, *arguments):
        line = [*COMPOSE, "-f", ROOT / "docker/compose.yaml", *arguments]
        return run(line, seconds=SECONDS, env=self.environment)

    def vm(self, *arguments):
        """`docker/vm`, with these arguments."""
        return run([ROOT / "docker/vm", *arguments], seconds=2 * SECONDS, env=self.environment)

    def containers(self):
        """The names of those that are there."""
        label = f"label=com.docker.compose.project={self.project}"
        return self.podman("ps", "-a", "--filter", label, "--format={{.Names}}").stdout.split()

    def podman(self, *arguments):
        return self.engine.run(*arguments, seconds=SECONDS, capture_output=True, text=True)

    def name(self, service):
        return f"{self.project}_{service}_1"

    def logs(self, service):
        """Standard output and standard error."""
        done = self.podman("logs", self.name(service))
        return done.stdout.splitlines() + done.stderr.splitlines()

    def traps(self, service):
        """How many traps it has told of."""
        return sum(1 for line in self.logs(service) if TRAP.match(line))

    def await_traps(self, service, count):
        """Wait until it has told of so many."""
        self._await(service, TRAP.match, count)

    def await_line(self, service, words):
        """Wait until it has said them in a line."""
        self._await(service, lambda line: words in line)

    def _await(self, service, matches, count=1):
        command = ["podman", "logs", "--follow", self.name(service)]
        with Child(
            command, seconds=SECONDS, env=self.engine.environment, stderr=subprocess.STDOUT
        ) as following:
            for line in following.stdout:
                count -= bool(matches(line))
                if count <= 0:
                    break
        assert count <= 0, self.logs(service)

    def wait(self, service):
        """Wait for its end; gives its exit status."""
        return int(self.podman("wait", self.name(service)).stdout)

    def stop(self, service):
        """As a user would; gives its exit status."""
        assert self.podman("stop", "-t", "20", self.name(service)).returncode == 0
        return self.inspect(service, "{{json .State.ExitCode}}")

    def restart(self, service):
        done = self.podman("restart", "-t", "20", self.name(service))
        assert done.returncode == 0, done.stderr

    def run(self, service, *command):
        """A command in its container, as its user."""
        return self.podman("exec", self.name(service), *command)

    def python(self, service, code):
        """What Python code prints in its container, as JSON."""
        done = self.run(service, "/opt/vmibridge/bin/python", "-c", code)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def inspect(self, service, form):
        return json.loads(self.podman("inspect", "--format", form, self.name(service)).stdout)

    def is_healthy(self, service):
        return self.podman("healthcheck", "run", self.name(service)).returncode == 0

    def await_health(self, service):
        deadline = time.monotonic() + SECONDS
        while not self.is_healthy(service):
            assert time.monotonic() < deadline, self.logs(service)
            time.sleep(0.1)

    def recordings(self, service, folder):
        """Those of the volume, by their names."""
        folder.mkdir(parents=True, exist_ok=True)
        done = self.podman("cp", f"{self.name(service)}:/recordings", str(folder))
        assert done.returncode == 0, done.stderr
        return sorted(folder.rglob("*.mcap"))


def kernel(**words):
    return " ".join([KERNEL, *(f"{name}={value}" for name, value in words.items())])


@contextmanager
def planned(engine, profile, guest, **variables):
    """Nothing is up yet; down again with all that was made."""
    compose = Compose(engine, profile, guest, **variables)
    try:
        yield compose
    finally:
        compose.compose("down", "-v", "-t", "5")


@contextmanager
def composed(engine, profile, guest, *files, **variables):
    """Up, with `files` over compose.yaml; and down again with all that was made."""
    with planned(engine, profile, guest, **variables) as compose:
        overrides = [word for file in files for word in ("-f", file)]
        done = compose.compose(*overrides, "up", "-d", "--no-build")
        assert done.returncode == 0, done.stderr
        yield compose


def inspected(recording):
    """The traps of a recording, and how it ends, as the command has them."""
    command = [sys.executable, "-m", "vmibridge", "inspect", "--json", recording]
    done = run(command, seconds=SECONDS, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [line for line in lines if "outcome" in line], lines[-1]
