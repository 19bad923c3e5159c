"""What it takes to look at a large recording: the time, and the peak of memory, by command.

    python benchmarks/recording_memory.py --traps 5000000

Memory is that of the whole process, Python and libraries included, by `ru_maxrss`. It must
not grow with the recording: run it with two sizes to see.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from recording_file import write_recording

_COMMANDS = {
    "replay": ["replay", "--handlers", str(Path(__file__).with_name("recording_file.py"))],
    "recover": ["recover", "-o", "{folder}/clean.mcap"],
    "report": ["report", "-o", "{folder}/report.html"],
    "inspect": ["inspect"],
    "inspect --full --json": ["inspect", "--full", "--json"],
    "inspect --outcome failed": ["inspect", "--outcome", "failed"],
    "export --to jsonl": ["export", "--to", "jsonl"],
    "export --to perfetto": ["export", "--to", "perfetto"],
    "export --to sqlite": ["export", "--to", "sqlite"],
    "export --to parquet": ["export", "--to", "parquet"],
}


def measure(arguments: list[str], folder: Path) -> tuple[float, int, int]:
    """Seconds, peak of memory in MB, and bytes that were written."""
    recording = folder / "recording.mcap"
    kept = {*folder.iterdir()}
    start = time.perf_counter()
    name, *options = (argument.format(folder=folder) for argument in arguments)
    command = [sys.executable, "-m", "vmibridge", name, str(recording), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        # Of this child alone, where getrusage has the largest of all.
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if child.returncode:
        sys.exit(f"{' '.join(arguments)} failed")
    made = {*folder.iterdir()} - kept
    written = sum(path.stat().st_size for path in made)
    for path in made:
        path.unlink()
    return seconds, usage.ru_maxrss // 1024, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--traps", type=int, default=5_000_000)
    parser.add_argument("--only", help="commands whose name has this word")
    parser.add_argument("--folder", help="where the files are put; they are deleted afterwards")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        write_recording(folder / "recording.mcap", options.traps)
        size = (folder / "recording.mcap").stat().st_size
        print(
            f"{options.traps} traps, {size / 1e6:.0f} MB,"
            f" made in {time.perf_counter() - start:.0f} s"
        )
        print(f"{'command':26} {'seconds':>8} {'peak MB':>8} {'file MB':>8}")
        for label, arguments in _COMMANDS.items():
            if options.only and options.only not in label:
                continue
            seconds, peak, written = measure(arguments, folder)
            print(f"{label:26} {seconds:8.1f} {peak:8} {written / 1e6:8.0f}", flush=True)


if __name__ == "__main__":
    main()
