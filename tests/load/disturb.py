"""Runs a command on a machine that has other work: `disturb.py --busy 6 --pause 0.6 -- make test`.

Two things happen beside it, until it ends:

- `--busy` processes compute, so that the command gets a share of each core only;
- one after the other, processes of the command are stopped at random for up to `--pause` seconds
  and go on then, as if the scheduler had forgotten them.

With `--starve` every other time a single thread is held: it gets no processor, nearly, while the
busy ones want them all, and the other threads of its process go on. What watches a clock then sees
what it never would in a process that stands still as a whole.

A test that fails here and passes on a quiet machine trusts a time. Only descendants of the command
are held: what runs elsewhere is left alone. The exit status is that of the command. The same
`--seed` chooses in the same way, from processes that are never quite the same.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

BETWEEN = 0.05
"""Seconds, on average, between the end of a pause and the next one."""

SPIN = "while True: pass"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that compute."""
    spinning = [subprocess.Popen([sys.executable, "-S", "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for each in spinning:
            each.kill()
            each.wait()


def running(root: int) -> list[int]:
    """The processes below `root`, which is not among them; none that is stopped already.

    A test may have stopped it, and it would go on with the end of the pause.
    """
    parents: dict[int, list[int]] = {}
    stopped = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(folder.name))
                if fields[0] in "TtZX":
                    stopped.add(int(folder.name))
    found: list[int] = []
    waiting = [root]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return sorted(set(found) - stopped)


def threads(root: int) -> list[int]:
    """The threads of the processes below `root`."""
    found: list[int] = []
    for each in running(root):
        with suppress(OSError):
            found += [int(task.name) for task in Path(f"/proc/{each}/task").iterdir()]
    return found


def starve(root: int, chosen: int, seconds: float) -> bool:
    """Starve a thread for so many seconds; whether it was there."""
    nothing = os.sched_param(0)
    try:
        if os.sched_getscheduler(chosen) != os.SCHED_OTHER:
            return False
        os.sched_setscheduler(chosen, os.SCHED_IDLE, nothing)
    except OSError:
        return False  # it has ended meanwhile
    try:
        time.sleep(seconds)
    finally:
        # Threads and children that it has started meanwhile have inherited this.
        for each in {chosen, *threads(root)}:
            with suppress(OSError):
                if os.sched_getscheduler(each) == os.SCHED_IDLE:
                    os.sched_setscheduler(each, os.SCHED_OTHER, nothing)
    return True


def stop(root: int, chosen: int, seconds: float) -> bool:
    """Stop a process for so many seconds; whether it was there."""
    try:
        # By a handle, which never becomes that of another process.
        handle = os.pidfd_open(chosen)
    except ProcessLookupError:
        return False
    try:
        # Its number may have become that of another process before there was a handle.
        if chosen not in running(root):
            return False
        signal.pidfd_send_signal(handle, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            signal.pidfd_send_signal(handle, signal.SIGCONT)
    except ProcessLookupError:
        return False  # it has ended meanwhile
    finally:
        os.close(handle)
    return True


class Hold(NamedTuple):
    """One way to hold a part of the command."""

    find: Callable[[int], list[int]]
    """The numbers of what there is below a process."""
    hold: Callable[[int, int, float], bool]


STOP, STARVE = Hold(running, stop), Hold(threads, starve)


def disturb(
    command: list[str], seconds: float, chance: random.Random, holds: Sequence[Hold]
) -> int:
    """Run the command to its end, with pauses; its exit status."""
    process = subprocess.Popen(command)
    pauses = 0
    try:
        while process.poll() is None:
            way = chance.choice(holds)
            if there := way.find(process.pid):
                one = chance.choice(there)
                pauses += way.hold(process.pid, one, chance.uniform(0, seconds))
            time.sleep(chance.uniform(0, 2 * BETWEEN))
    except KeyboardInterrupt:
        process.wait()
    sys.stderr.write(f"disturb: {pauses} pauses; exit status {process.returncode}\n")
    status = process.returncode
    return status if status >= 0 else 128 - status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--busy", type=int, default=6, help="processes that compute beside it")
    parser.add_argument("--pause", type=float, default=0.6, help="longest pause, in seconds")
    parser.add_argument("--starve", action="store_true", help="single threads, too")
    parser.add_argument("--seed", type=int, default=None, help="of what is chosen; else random")
    parser.add_argument("command", nargs="+", help="what is run, after --")
    given = parser.parse_args()
    # So that nothing stays stopped, and nothing computes on.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with busy(given.busy):
        holds = [STOP, STARVE] if given.starve else [STOP]
        return disturb(given.command, given.pause, random.Random(given.seed), holds)


if __name__ == "__main__":
    sys.exit(main())
