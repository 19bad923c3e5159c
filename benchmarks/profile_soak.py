"""Whether the profile `plugin` of docker/compose.yaml grows anywhere, in an hour at full rate.

    python benchmarks/profile_soak.py [--minutes N] [--keep MIB] [--count N] [--guest FOLDER]
                                      [--engine podman|docker] [--json]

A Linux guest makes calls on two CPUs without a pause and checks every answer (docs/linux-guest.md);
the bridge records each trap. Recordings go on in another file after a quarter of `--keep`, so that
old ones are removed all the time. Every 15 s it is looked at:

- *disk*: bytes of the recordings, which `--keep` bounds.
- *log*: bytes of what each container has printed, which compose.yaml bounds.
- *RSS*: the resident memory of each container's first process, in MB of 10^6 bytes; *slope* is that
  of its least squares over the second half, in MB an hour.

It ends with 1 if a bound is broken or the guest has seen an error. What it started it ends, volumes
too. Needs `make images` and `make linux`, and root, to see the volume.
"""

import argparse
import json
import os
import re
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired

from containers import MEGA, Engine, output_of, resident

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ("bridge", "qemu")
PERIOD = 15
"""Seconds."""
MIB = 1 << 20
SLOPE = 1.0
"""MB an hour."""
LOG = 5 * 10 * MIB
"""The options `max-file` and `max-size` of compose.yaml."""
COMMAND_SECONDS = 300
LATE_SECONDS = 600
"""The guest ends by itself when the programs of its last round have ended."""
KERNEL = "console=ttyS0 quiet panic=-1 no_timer_check vmibridge=user"
COMPOSE = {"podman": f"{shlex.quote(sys.executable)} -m podman_compose", "docker": "docker compose"}


@dataclass
class Sample:
    """What was seen at one time, in seconds since the containers are up. Sizes are in bytes."""

    seconds: float
    traps: int
    disk: int
    rss: dict[str, float]
    logs: dict[str, int]


@dataclass
class Profile:
    """The containers of one run."""

    engine: Engine
    ids: dict[str, str]
    processes: dict[str, str]
    volume: Path
    log_paths: dict[str, Path]
    recordings: set[str] = field(default_factory=set)
    """The names of all that were seen."""

    def sample(self, seconds: float) -> Sample:
        files = sizes(self.volume, "*")
        self.recordings.update(files)
        told = re.findall(r"(\d+) traps? so far", self.said("bridge", "--tail=20"))
        return Sample(
            seconds,
            int(told[-1]) if told else 0,
            sum(files.values()),
            {name: resident(process) for name, process in self.processes.items()},
            {name: self.logged(name) for name in SERVICES},
        )

    def logged(self, service: str) -> int:
        path = self.log_paths[service]
        return sum(sizes(path.parent, f"{path.name}*").values())

    def said(self, service: str, *options: str) -> str:
        command = ("logs", *options, self.ids[service])
        done = self.engine.run(*command, seconds=COMMAND_SECONDS, capture_output=True, text=True)
        return str(done.stdout + done.stderr)


def sizes(folder: Path, names: str) -> dict[str, int]:
    """Of the files that are still there when they are looked at."""
    found = {}
    for path in folder.glob(names):
        try:
            found[path.name] = path.stat().st_size
        except FileNotFoundError:
            continue
    return found


@contextmanager
def up(engine: Engine, options: argparse.Namespace) -> Iterator[Profile]:
    """The profile, and its end with all that it has made."""
    project = f"vmibridge-soak-{os.getpid()}"
    # What is tried out here has to be what compose.yaml has, and not what this shell has set.
    kept = {k: v for k, v in engine.environment.items() if not k.startswith("VMIBRIDGE_")}
    engine.environment = {
        **kept,
        "COMPOSE_PROFILES": "plugin",
        "COMPOSE_PROJECT_NAME": project,
        "VMIBRIDGE_COMPOSE": COMPOSE[engine.name],
        "VMIBRIDGE_GUEST": str(options.guest.resolve()),
        "VMIBRIDGE_RECORDINGS": f"{options.keep}M",
        "VMIBRIDGE_APPEND": f"{KERNEL} count={options.count} seconds={round(60 * options.minutes)}",
    }
    try:
        compose(engine, "up", "-d", "--no-build")
        ids = {name: container(engine, project, name) for name in SERVICES}
        yield Profile(
            engine,
            ids,
            {name: shown(engine, "{{.State.Pid}}", ids[name]) for name in SERVICES},
            Path(volume(engine, f"{project}_recordings")),
            {name: log_path(engine, ids[name]) for name in SERVICES},
        )
    finally:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        compose(engine, "down", "-v", "-t", "20")


def compose(engine: Engine, *arguments: str) -> None:
    """In a session of its own, so that an interrupt goes to it from here alone."""
    command = [str(ROOT / "docker/vm"), *arguments]
    with Popen(
        command, env=engine.environment, stdout=sys.stderr, start_new_session=True
    ) as process:
        try:
            status = process.wait(COMMAND_SECONDS)
        except BaseException:  # Ctrl-C, too: what it has started ends with it
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
    if status:
        sys.exit(f"profile_soak: compose {arguments[0]} has failed")


def container(engine: Engine, project: str, service: str) -> str:
    labels = {"project": project, "service": service}
    filters = [f"--filter=label=com.docker.compose.{k}={v}" for k, v in labels.items()]
    return output_of(engine, "ps", "--quiet", *filters)


def shown(engine: Engine, form: str, name: str) -> str:
    return output_of(engine, "inspect", f"--format={form}", name)


def volume(engine: Engine, name: str) -> str:
    return output_of(engine, "volume", "inspect", "--format={{.Mountpoint}}", name)


def log_path(engine: Engine, name: str) -> Path:
    form = {"podman": "{{.HostConfig.LogConfig.Path}}", "docker": "{{.LogPath}}"}
    return Path(shown(engine, form[engine.name], name))


def soak(profile: Profile, minutes: float) -> tuple[list[Sample], float, int]:
    """Sample it until the guest ends; returns when that was, and QEMU's status, too."""
    begin = time.monotonic()
    samples: list[Sample] = []
    command = [profile.engine.name, "wait", profile.ids["qemu"]]
    with Popen(command, env=profile.engine.environment, stdout=PIPE, text=True) as waiting:
        try:
            while not has_ended(waiting):
                passed = time.monotonic() - begin
                if passed > 60 * minutes + LATE_SECONDS:
                    sys.exit("profile_soak: the guest does not end")
                try:
                    samples.append(profile.sample(passed))
                except FileNotFoundError as error:
                    if not has_ended(waiting):
                        sys.exit(f"profile_soak: a container has ended: {error}")
            told, _ = waiting.communicate()
            return samples, time.monotonic() - begin, int(told)
        finally:
            waiting.kill()


def has_ended(process: "Popen[str]") -> bool:
    try:
        process.wait(PERIOD)
    except TimeoutExpired:
        return False
    return True


def slope(samples: list[Sample], service: str) -> float:
    """MB an hour, in the second half."""
    half = [each for each in samples if each.seconds >= samples[-1].seconds / 2]
    hours = [each.seconds / 3600 for each in half]
    return statistics.linear_regression(hours, [each.rss[service] for each in half]).slope


@dataclass
class Figures:
    """What there is to tell. Sizes are in MB."""

    minutes: float
    traps: int
    rate: float
    """Traps a second, the boot included."""
    outcomes: str
    recordings: int
    disk: float
    disk_most: float
    log: dict[str, float]
    rss: dict[str, tuple[float, float]]
    """The first, and the last."""
    slope: dict[str, float]
    programs: int
    """Of the guest, that had nothing but right answers."""
    guest_errors: int
    status: int

    def broken(self, keep: int) -> list[str]:
        """The bounds that do not hold."""
        bars = {
            "disk": self.disk_most * MEGA <= keep * MIB,
            "guest": (self.guest_errors, self.status) == (0, 0),
        }
        for name in SERVICES:
            bars[f"log of {name}"] = self.log[name] * MEGA <= LOG
            bars[f"RSS of {name}"] = self.slope[name] < SLOPE
        return [name for name, holds in bars.items() if not holds]

    def table(self, keep: int) -> list[str]:
        lines = [
            f"minutes        {self.minutes:10.1f}",
            f"traps          {self.traps:10}      {self.rate:.0f} a second: {self.outcomes}",
            f"recordings     {self.recordings:10}",
            f"disk           {self.disk:10.1f} MB",
            f"at most        {self.disk_most:10.1f} MB   bar {keep * MIB / MEGA:.1f}",
        ]
        for name in SERVICES:
            first, last = self.rss[name]
            lines += [
                f"log {name:10} {self.log[name]:10.3f} MB   bar {LOG / MEGA:.1f}",
                f"RSS {name:10} {last:10.1f} MB   was {first:.1f}",
                f"slope {name:8} {self.slope[name]:10.2f} MB   an hour; bar {SLOPE:g}",
            ]
        return [
            *lines,
            f"programs       {self.programs:10}      QEMU's status {self.status}",
            f"guest errors   {self.guest_errors:10}      bar 0",
        ]


def figures(profile: Profile, samples: list[Sample], seconds: float, status: int) -> Figures:
    """After the end of the guest; ends the bridge, whose last line has all traps."""
    lines = [line for line in profile.said("qemu").splitlines() if "vmibridge: " in line]
    output_of(profile.engine, "stop", "--time=15", profile.ids["bridge"])
    summary = re.findall(r"^(\d+) traps: (.*)$", profile.said("bridge"), re.MULTILINE)
    traps, outcomes = summary[-1] if summary else (samples[-1].traps, "by the last minute's line")
    # The first one says that it is up.
    is_right = len(lines) > 1 and lines[-1].rstrip().endswith("vmibridge: all right")
    last = samples[-1]
    return Figures(
        minutes=seconds / 60,
        traps=int(traps),
        rate=int(traps) / seconds,
        outcomes=outcomes,
        recordings=len(profile.recordings),
        disk=last.disk / MEGA,
        disk_most=max(each.disk for each in samples) / MEGA,
        log={name: max(each.logs[name] for each in samples) / MEGA for name in SERVICES},
        rss={name: (samples[0].rss[name], last.rss[name]) for name in SERVICES},
        slope={name: slope(samples, name) for name in SERVICES},
        programs=sum(": right, " in line for line in lines),
        guest_errors=sum(": right, " not in line for line in lines[1:-1]) + (not is_right),
        status=status,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--keep", type=int, default=64, help="MiB of recordings")
    parser.add_argument("--count", type=int, default=20_000, help="calls of a program")
    parser.add_argument("--guest", type=Path, default=ROOT / ".linux")
    parser.add_argument("--engine", choices=list(COMPOSE), default="podman")
    parser.add_argument("--json", action="store_true", help="the samples, too")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as name:
        engine = Engine(options.engine, Path(name))
        with up(engine, options) as profile:
            samples, seconds, status = soak(profile, options.minutes)
            if len(samples) < 4:
                sys.exit("profile_soak: too short for a slope")
            found = figures(profile, samples, seconds, status)
    failed = found.broken(options.keep)
    if options.json:
        seen = {"samples": [asdict(each) for each in samples]}
        print(json.dumps({**asdict(found), "broken": failed, **seen}))
    else:
        print(*found.table(options.keep), sep="\n")
        print("broken: " + ", ".join(failed) if failed else "all bounds hold")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
