"""What a process says of itself: three checks, and the reasons why one fails.

| check | passes when | who asks |
|---|---|---|
| live | the event loop turns, and no stop is overdue | what restarts a process that hangs |
| started | VMs are opened, handlers entered, and sockets listen | what waits for a start |
| ready | it would answer a trap now | what sends traps, or shows its state |

Each check includes those above it: a reason that fails `live` fails all three.

Invariants:

- The parts of a process (server, agent, recorder) are asked when somebody asks, on the event loop.
  So nothing is paid on the path of a trap, and no state is out of date.
- A part that raises is a reason itself: whoever asks gets an answer.
- A report is bounded, in reasons and in characters, and is fit for a terminal.
- No carrier is known here: a report goes over a socket, to a service manager, or over HTTP.
"""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

import msgspec

from vmibridge.text import printable, type_name

__all__ = ["Check", "Code", "Event", "Health", "Part", "Reason", "Report"]

log: logging.Logger = logging.getLogger(__name__)

Check: TypeAlias = Literal["live", "started", "ready"]
Code: TypeAlias = Literal[
    "starting",  # VMs are opened, handlers entered, sockets made
    "stopping",  # a signal, the end of its guests
    "overdue",  # it stops for longer than it may
    "server-unreachable",  # an agent without a server
    "nats-unreachable",  # a connection to NATS that is lost
    "vm-failed",  # one of several VMs has ended with an error
    "disk-full",  # the recording's volume has no room
    "not-recording",  # a recording was asked for, and cannot be written for another reason
    "handlers-failed",  # those of a VM cannot be made
    "reload-failed",  # the handlers of before go on
    "unknown",  # a part that cannot tell
    # What only who asks can say: `ask`.
    "loop-blocked",
    "process-stopped",
    "not-running",
]
Event: TypeAlias = Literal["reloading", "reloaded", "stopping"]

_CHECKS: tuple[Check, ...] = ("live", "started", "ready")
_MAX_REASONS = 16
_MAX_TEXT = 300
"""Characters of a reason."""
_STOP_WITHIN = 60.0
"""Seconds that a stop may take where nobody says otherwise."""


class Reason(msgspec.Struct, frozen=True):
    """Why a check fails, or what is worth knowing while none does."""

    code: Code
    text: str
    fails: Check | None = "ready"
    """The first check that fails for it, and with it those behind; `None`: none."""


Part: TypeAlias = Callable[[], Iterable[Reason]]
"""Asked on the event loop; gives the reasons that hold now, and waits for nothing."""


class Report(msgspec.Struct, frozen=True):
    """What one check came to."""

    check: Check
    ok: bool
    live: bool
    started: bool
    ready: bool
    reasons: tuple[Reason, ...]
    """Those that fail the check first."""

    @property
    def line(self) -> str:
        """One line for people: `ready`, or `not ready: CODE: TEXT; ...`."""
        told = "; ".join(f"{each.code}: {each.text}" for each in self.reasons)
        if not self.ok:
            return f"not {self.check}: {told}"
        return f"{self.check}; {told}" if told else self.check


class Health:
    """The health of one process. Add its parts before it runs.

    `stop_within`: seconds that a stop may take; after that the process is not live any more.
    """

    def __init__(self, *, stop_within: float = _STOP_WITHIN) -> None:
        self.stop_within = stop_within
        self._parts: list[Part] = []
        self._observers: list[Callable[[Event], None]] = []
        self._reload_failed = ""
        self._stopping_since: float | None = None

    def add(self, part: Part) -> None:
        """Ask `part`, too. Without any, a process counts as one that is starting."""
        self._parts.append(part)

    def observe(self, observer: Callable[[Event], None]) -> None:
        """Call `observer` at once when a reload or a stop begins or ends. It may not raise."""
        self._observers.append(observer)

    def reload_begins(self) -> None:
        """Handlers are about to be loaded again."""
        self._tell("reloading")

    def reload_ends(self, failed: str = "") -> None:
        """They were, or could not be, which `failed` says: those of before go on."""
        self._reload_failed = failed
        self._tell("reloaded")

    def stop_begins(self) -> None:
        """The process stops. Once more does nothing."""
        if self._stopping_since is None:
            self._stopping_since = time.monotonic()
            self._tell("stopping")

    def report(self, check: Check) -> Report:
        """What a check comes to now. On the event loop; raises nothing."""
        found = self._reasons()
        if any(reason.code == "stopping" for reason in found):
            if self._stopping_since is None:
                self._stopping_since = time.monotonic()
            lasts = time.monotonic() - self._stopping_since
            if lasts > self.stop_within:
                text = f"it stops for {lasts:.0f} s, {self.stop_within:g} were expected"
                found.append(Reason("overdue", text, "live"))
        passed = {name: not any(_fails(reason, name) for reason in found) for name in _CHECKS}
        found.sort(key=lambda reason: not _fails(reason, check))
        left = len(found) - _MAX_REASONS
        if left > 0:
            del found[_MAX_REASONS:]
            found[-1] = Reason("unknown", f"{left + 1} more reasons", found[-1].fails)
        shown = tuple(Reason(each.code, _shown(each.text), each.fails) for each in found)
        return Report(
            check, passed[check], passed["live"], passed["started"], passed["ready"], shown
        )

    def _reasons(self) -> list[Reason]:
        found: list[Reason] = []
        if not self._parts:
            found.append(Reason("starting", "nothing is served yet", "started"))
        for part in self._parts:
            try:
                found += part()
            except Exception as error:
                log.debug("health", exc_info=error)
                found.append(Reason("unknown", f"a part cannot tell: {type_name(error)}"))
        if self._stopping_since is not None and not any(r.code == "stopping" for r in found):
            found.append(Reason("stopping", "what is pending is being answered"))
        if self._reload_failed:
            found.append(Reason("reload-failed", self._reload_failed, None))
        return found

    def _tell(self, event: Event) -> None:
        for observer in self._observers:
            observer(event)


def _fails(reason: Reason, check: Check) -> bool:
    return reason.fails is not None and _CHECKS.index(reason.fails) <= _CHECKS.index(check)


def _shown(text: str) -> str:
    text = printable(" ".join(text[: 2 * _MAX_TEXT].split()))
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
