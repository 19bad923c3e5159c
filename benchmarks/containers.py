"""What the bridge's image weighs, how soon a container of it is ready, and what it takes when idle.

    python benchmarks/containers.py [--rounds N] [--engine podman|docker] [--json]

- *size*: the image, above the one that it builds upon; megabytes of 10^6 bytes.
- *ready*: seconds from `podman run` until the socket for QEMU can be connected to, as
  docker/compose.yaml runs it: read-only, one core, with a recording. Podman's own time is in it.
- *memory*: the resident memory of the process before the first call; megabytes. *cgroup* is
  what the kernel counts for the container, the files that it keeps in memory included.

Needs `make images`.
"""

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "docker"))  # scripts, which are no package
from build_images import IMAGES, Engine  # noqa: E402

BARS = {"size": 70.0, "ready": 1.5, "memory": 60.0}
MEGA = 1e6
SECONDS = 60
OPTIONS = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--network=none")
LIMITS = ("--memory=256m", "--cpus=1.0", "--pids-limit=64")


def output_of(engine: Engine, *arguments: str) -> str:
    done = engine.run(*arguments, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"containers: {engine.name} {arguments[0]}: {done.stderr.strip()}")
    return done.stdout.strip()


def size(engine: Engine) -> float:
    form = '--format={{index .Config.Labels "org.opencontainers.image.base.name"}}'
    base = output_of(engine, "image", "inspect", form, IMAGES["bridge"])
    sizes = [
        int(output_of(engine, "image", "inspect", "--format={{.Size}}", name))
        for name in (IMAGES["bridge"], base)
    ]
    return (sizes[0] - sizes[1]) / MEGA


def one_round(engine: Engine, folder: Path) -> dict[str, float]:
    path = folder / "vmi.sock"
    command = ["run", "--backend", "qemu-plugin:unix:/run/vmibridge/vmi.sock?stay=true"]
    command += ["--handlers", "vmibridge.handlers.hello", "--record", "/recordings/run.mcap"]
    volumes = [f"--volume={folder}:/run/vmibridge", "--volume=/recordings"]
    begin = time.perf_counter()
    name = output_of(
        engine, "run", "--detach", *OPTIONS, *LIMITS, *volumes, IMAGES["bridge"], *command
    )
    try:
        await_listener(path, begin + SECONDS)
        ready = time.perf_counter() - begin
        process = output_of(engine, "inspect", "--format={{.State.Pid}}", name)
        return {"ready": ready, "memory": resident(process), "cgroup": counted(process)}
    finally:
        output_of(engine, "rm", "--force", "--volumes", name)


def await_listener(path: Path, deadline: float) -> None:
    while time.perf_counter() < deadline:
        with socket.socket(socket.AF_UNIX) as tried:
            try:
                tried.connect(str(path))
            except OSError:
                time.sleep(0.005)
            else:
                return
    sys.exit(f"containers: nothing listens at {path}")


def resident(process: str) -> float:
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (kib,) = [int(line.split()[1]) for line in lines if line.startswith("VmRSS:")]
    return kib * 1024 / MEGA


def counted(process: str) -> float:
    """By either version of control groups (cgroups(7))."""
    for line in Path(f"/proc/{process}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup")
        for file in (
            root / f"memory{path}/memory.usage_in_bytes",
            root / f"{path[1:]}/memory.current",
        ):
            if controllers in ("", "memory") and file.exists():
                return int(file.read_text()) / MEGA
    return float("nan")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", choices=["podman", "docker"], default="podman")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        engine = Engine(options.engine, Path(name))
        rounds = []
        for number in range(options.rounds + 1):
            folder = Path(name, str(number))
            folder.mkdir()
            folder.chmod(0o777)
            rounds.append(one_round(engine, folder))
        # The first one has to read the image from the disk.
        rounds = rounds[1:]
        figures = {each: statistics.median(r[each] for r in rounds) for each in rounds[0]}
        figures["size"] = size(engine)
    if options.json:
        print(json.dumps({"cores": os.cpu_count(), "bars": BARS, **figures}))
    else:
        for each, bar in BARS.items():
            print(f"{each:7} {figures[each]:8.2f}   bar {bar:g}")
        print(f"cgroup  {figures['cgroup']:8.2f}")
    return int(any(figures[each] > bar for each, bar in BARS.items()))


if __name__ == "__main__":
    sys.exit(main())
