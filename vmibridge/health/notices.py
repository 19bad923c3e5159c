r"""What a service manager is sent, as sd_notify(3) of systemd has it. No I/O.

One datagram a notice, of lines `NAME=VALUE`, to the socket that `NOTIFY_SOCKET` names: a path, or
an abstract name that begins with `@`.

| state | notice | next state |
|---|---|---|
| starting | when the check `started` passes: `READY=1`, `STATUS=` | serving |
| serving | a reload begins: `RELOADING=1`, `MONOTONIC_USEC=` | reloading |
| reloading | it has ended, well or not: `READY=1` | serving |
| any | a stop begins: `STOPPING=1` | stopping |
| any | the line of the check `ready` is another: `STATUS=` | the same |
| any | half of `WATCHDOG_USEC` is over, and the process is live: `WATCHDOG=1` | the same |

`READY=1` does not wait for what is elsewhere: an agent without its server has started, and its
status says that it is not ready. Else a server that is away would have the agent ended, again and
again, when its start has taken too long.

The watchdog is fed by whoever calls `look`, which is a task of the event loop: a loop that is
blocked feeds nothing.
"""

import os
from collections.abc import MutableMapping
from typing import Literal, Self

from vmibridge.health.state import Event, Report

__all__ = ["Notices"]

_MAX_STATUS = 1000
"""Characters. systemd takes datagrams of 4 KiB."""
_LOOKS = 1.0
"""Seconds between two looks, while nothing is due before."""
_FIRST_LOOKS = 0.05
"""The same, until it has started."""


class Notices:
    """The notices of one process. `watchdog`: seconds within which the manager wants to hear of
    it, or `None`."""

    def __init__(self, address: str, watchdog: float | None = None) -> None:
        self.address = address
        """Of the datagram socket, for `sendto`."""
        self.half: float | None = None if watchdog is None else watchdog / 2
        self._state: Literal["starting", "serving", "reloading", "stopping"] = "starting"
        self._status = ""
        self._fed: float | None = None

    @classmethod
    def taken_from(cls, environment: MutableMapping[str, str]) -> Self | None:
        """As the environment says; `None` without a service manager. Its variables are removed, so
        that no child takes itself for the service."""
        path = environment.pop("NOTIFY_SOCKET", "")
        microseconds = environment.pop("WATCHDOG_USEC", "")
        process = environment.pop("WATCHDOG_PID", "")
        if path[:1] not in ("/", "@"):  # vsock: and others are of no use here
            return None
        watched = process in ("", str(os.getpid())) and microseconds.isascii()
        watchdog = int(microseconds) / 1e6 if watched and microseconds.isdigit() else 0
        return cls("\0" + path[1:] if path[0] == "@" else path, watchdog or None)

    @property
    def pause(self) -> float:
        """Seconds until the next look."""
        looks = _FIRST_LOOKS if self._state == "starting" else _LOOKS
        return looks if self.half is None else min(looks, self.half / 2)

    def look(self, ready: Report, now: float) -> list[bytes]:
        """What to send, in this order, given the report of the check `ready`, and the time in
        seconds."""
        found: list[bytes] = []
        status = f"STATUS={ready.line[:_MAX_STATUS]}"
        if self._state == "starting" and ready.started:
            self._state = "serving"
            found.append(f"READY=1\n{status}".encode())
        elif status != self._status:
            found.append(status.encode())
        self._status = status
        # A look early rather than late: the next one may be past the half.
        fed, half = self._fed, self.half
        if half is not None and ready.live and (fed is None or now - fed + self.pause > half):
            self._fed = now
            found.append(b"WATCHDOG=1")
        return found

    def event(self, event: Event, now: float) -> bytes | None:
        """What to send when this happens."""
        if event == "stopping":
            self._state = "stopping"
            return b"STOPPING=1\nSTATUS=stopping"
        if event == "reloading" and self._state == "serving":
            self._state = "reloading"
            return f"RELOADING=1\nMONOTONIC_USEC={round(now * 1e6)}".encode()
        if event == "reloaded" and self._state == "reloading":
            self._state = "serving"
            return b"READY=1"
        return None
