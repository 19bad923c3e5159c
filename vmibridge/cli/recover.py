"""`vmibridge recover`: a clean file made of a damaged recording."""

import sys
from pathlib import Path

import msgspec

from vmibridge.cli.progress import with_progress
from vmibridge.recording.recover import recover
from vmibridge.text import printable

_MOST_PROBLEMS = 10


def recover_recording(source: Path, target: Path, *, as_json: bool) -> int:
    """Write it and tell what was kept; returns the exit status. Raises `VmiBridgeError`."""
    done = recover(
        source, target, lambda messages, reader: with_progress(messages, reader, "reading")
    )
    if as_json:
        sys.stdout.write(msgspec.json.encode(done).decode() + "\n")
        return 0
    lines = [f"{source}: {problem}" for problem in done.problems[:_MOST_PROBLEMS]]
    if done.problem_count > _MOST_PROBLEMS:
        lines.append(f"{source}: {done.problem_count - _MOST_PROBLEMS} problems more")
    if done.complete:
        lines.append(f"{source}: is whole; there was nothing to recover")
    kept = ", ".join(f"{count} {topic}" for topic, count in done.messages.items() if count)
    lines.append(f"{target}: {kept or 'no message'} kept")
    sys.stdout.write("".join(f"{printable(line)}\n" for line in lines))
    return 0
