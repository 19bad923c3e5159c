"""The fault soak: a long run in which many things go wrong, and what has to hold all the same.

    python tests/soak/fault_soak.py [--traps N] [--lanes N] [--loop asyncio|uvloop|trio]
                                    [--seed N] [--json]

A guest that is made up sends N traps over its lanes (vCPUs), several at a time in each. One in
a hundred raises, one hangs past its hard deadline, one is cancelled from within, one has a bad
pointer; others run past their soft deadline, are retried, or never are; are denied, unknown, or
not ours. The table `KINDS` holds them all. On top of the N come the retries, and at the end:

1. Nothing is open, and all that was told to wait is collected or has expired.
2. As many handlers as there are places run at once: none was lost on the way.
3. Ordinary traps use up the quota of the VM, to the last request; all that follow are denied.
4. Meanwhile a handler hangs in each of as many lanes again, with a trap queued behind it. The
   server is stopped, and answers them.

It fails, with exit status 1, unless:

- each trap is answered once, in the order of its lane, with the reply that its kind calls for,
  and has one outcome that says the same;
- each run of a handler that was told to wait ends in a reply, or is counted as uncollected;
- a quota lets through what it has, and no more;
- guest memory is touched only while the vCPU stands still;
- the memory of the process stays flat: the median of its second half within 5 % of the first's;
- each request goes from state to state as the table of the engine says;
- no task, thread, context or pending request is left, and nothing was logged but what was asked
  for.

What is sent is fixed by the seed; when it is retried is not. Where time decides between two
outcomes, both are allowed, and sums have to agree. Nothing here depends on how fast the
machine is.
"""

import argparse
import json
import sys
import threading
import time
import warnings

import anyio
from soak_kinds import HARD
from soak_run import LOOPS, Report, Soak, resident

# --- the command ------------------------------------------------------------------------


class Progress:
    """One line on standard error: rewritten at a terminal, else a new one every few seconds."""

    EVERY = 5.0

    def __init__(self, traps: int) -> None:
        self._traps = traps
        self._started = self._told = time.monotonic()
        self._terminal = sys.stderr.isatty()

    def __call__(self, answered: int) -> None:
        now = time.monotonic()
        if not self._terminal and now - self._told < self.EVERY:
            return
        self._told = now
        rate = answered / max(now - self._started, 1e-9)
        line = (
            f"{answered:>11,} traps, planned {self._traps:,} and their retries; "
            f"{rate:,.0f}/s, {resident():.0f} MiB"
        )
        sys.stderr.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._terminal:
            sys.stderr.write("\r\x1b[K")


def as_table(report: Report) -> str:
    """The report for people."""
    lines = [f"{'kind':<16} {'sent':>10}  outcomes"]
    for name, counts in report.kinds.items():
        told = ", ".join(f"{n:,} {outcome}" for outcome, n in counts.items() if outcome != "sent")
        lines.append(f"{name:<16} {counts['sent']:>10,}  {told or 'ran natively'}")
    lines += ["", f"{'outcome':<16} {'traps':>10}"]
    lines += [f"{name:<16} {count:>10,}" for name, count in report.outcomes.items()]
    lines += [
        "",
        f"{'loop':<16} {report.loop:>10}",
        f"{'lanes':<16} {report.lanes:>10,}",
        f"{'seed':<16} {report.seed:>10}",
        f"{'traps':<16} {report.traps:>10,}",
        f"{'retries':<16} {report.retries:>10,}",
        f"{'uncollected':<16} {report.uncollected:>10,}",
        f"{'seconds':<16} {report.seconds:>10.1f}",
        f"{'traps/s':<16} {report.traps_per_second:>10,.0f}",
        f"{'longest hang':<16} {report.longest_hang * 1000:>10.0f} ms of {HARD * 1000:.0f}",
        f"{'most tasks':<16} {report.most_tasks:>10,}",
        f"{'RSS, first half':<16} {report.first_half:>10.1f} MiB",
        f"{'RSS, second half':<16} {report.second_half:>10.1f} MiB",
        "",
        *[f"WRONG: {what}" for what in report.first_wrongs],
        f"{report.wrongs:,} wrong" if report.wrongs else "all as it has to be",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--traps", type=int, default=1_000_000, help="that are planned")
    parser.add_argument("--lanes", type=int, default=64, help="vCPUs that send them")
    parser.add_argument("--loop", choices=LOOPS, default="asyncio")
    parser.add_argument("--seed", type=int, default=1, help="fixes what is sent")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args()
    if not 1 <= args.lanes <= 1024 or args.traps < 1:
        parser.error("--lanes takes 1 to 1024, --traps at least 1")
    warnings.simplefilter("error")
    progress = Progress(args.traps)
    soak = Soak(args.traps, args.lanes, args.seed, args.loop, progress)
    threads = threading.active_count()
    report: Report = anyio.run(soak.run, **LOOPS[args.loop])
    progress.end()
    if threading.active_count() > threads:
        report = report._replace(
            wrongs=report.wrongs + 1, first_wrongs=[*report.first_wrongs, "a thread is left"]
        )
    told = json.dumps(report._asdict(), indent=2) if args.json else as_table(report)
    sys.stdout.write(f"{told}\n")
    return 1 if report.wrongs else 0


if __name__ == "__main__":
    sys.exit(main())
