"""The exits of guests: outputs of type `GuestExit`, and what the command makes of them.

The first one of a VM counts. It says more than how a vCPU ends behind it, so a VM that has exited
has not failed.
"""

import logging
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from vmibridge.bridge.guest_exit import GuestExit
from vmibridge.bridge.outcome import Outcome
from vmibridge.text import printable

log: logging.Logger = logging.getLogger(__name__)

NO_EXITS: Mapping[str, GuestExit] = MappingProxyType({})


class ExitLine(msgspec.Struct):
    """The exit of one VM, for `--json`."""

    vm: str
    status: int
    reason: str | None


class GuestExits:
    """The exits of one run."""

    def __init__(self) -> None:
        self.of: dict[str, GuestExit] = {}
        """By the name of the VM, in their order."""

    def take(self, outcome: Outcome[Any]) -> str | None:
        """The VM that has exited by this outcome, if it had not yet."""
        given = outcome.output
        if not isinstance(given, GuestExit) or outcome.event is None:
            return None
        vm = outcome.event.vm
        if vm in self.of:
            return None
        self.of[vm] = given
        log.info("vm %s: %s", printable(vm), _text(given))
        return vm

    def leave(self, vm: str) -> dict[str, GuestExit]:
        """The exit of a VM that has ended: another one may come under its name."""
        given = self.of.pop(vm, None)
        return {} if given is None else {vm: given}

    def status(self, vms: Iterable[str]) -> int:
        """Of the command: that of the first of `vms` whose status is not 0; else 0."""
        given = (self.of[vm].exit_status for vm in vms if vm in self.of)
        return next((status for status in given if status), 0)


def exit_lines(exits: Mapping[str, GuestExit]) -> list[ExitLine]:
    """For `--json`."""
    return [ExitLine(vm, each.status, each.reason) for vm, each in exits.items()]


def exits_text(exits: Mapping[str, GuestExit]) -> str:
    """For people, behind the counts of a run; empty where no guest has exited."""
    told = [
        _text(each) if vm == "vm" else f"vm {printable(vm)} {_text(each)}"
        for vm, each in exits.items()
    ]
    return "".join(f"; {each}" for each in told)


def _text(given: GuestExit) -> str:
    reason = "" if given.reason is None else f": {printable(given.reason)}"
    return f"exited with status {given.status}{reason}"
