"""What becomes of one message that is kept: the name of its VM, its time, what is left out."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Final

import msgspec

from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.request import request_in
from vmibridge.errors import ConfigError, UnsupportedTrapError
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import (
    FORMAT_WITH_STEPS,
    MemoryAccess,
    Outside,
    RecordedMessage,
    Reply,
    Session,
)
from vmibridge.recording.redaction import Redaction, RedactionRule
from vmibridge.vm.trap import TrapEvent

__all__ = ["OF_OUTPUT", "Changes"]

_MAX_TIME = (1 << 64) - 1
_MAX_CLOCK = 1 << 63
"""Nanoseconds, either way: what a message can have."""
OF_OUTPUT: Final = tuple(name for name in Reply.__struct_fields__ if name.startswith("output"))
"""All that a reply says of its output."""


class Changes:
    """The same for each message of an edit."""

    def __init__(
        self,
        rename: Mapping[str, str],
        redact: Iterable[RedactionRule | str],
        shift: int,
    ) -> None:
        """`shift` is in nanoseconds. Raises `ConfigError` for a rule that is none."""
        self._rename = rename
        self._redaction = Redaction(redact)
        self._shift = shift
        self._all = frozenset(rule.what for rule in self._redaction.of_traps)
        self.redacts: bool = bool(self._redaction.rules)
        self.renames: bool = bool(rename)
        self._owners: dict[str, str] = {}
        """Of each name that is written, what it was."""

    def left_out_of(self, event: TrapEvent) -> frozenset[str]:
        """What is left out of a trap and of all that belongs to it; of one whose request cannot be
        read, as of any."""
        packet = request_in(event)
        return self._all if packet is None else self._redaction.of(packet.request)

    def of(self, timed: TimedMessage, left_out: frozenset[str] | None) -> TimedMessage:
        """The message as it is written. `left_out` is of its trap; `None`: its trap is not known.

        Raises `ConfigError` for a time beyond what a recording can have, and where two VMs get
        one name.
        """
        time = timed.time + self._shift
        if not 0 <= time <= _MAX_TIME:
            raise ConfigError("--shift: a message would be before 1970, or beyond 64 bits")
        message = timed.message
        if self.redacts:
            message = self._redacted(message, left_out)
        if isinstance(message, Session) and self._shift:
            message = self._shifted(message)
        if message.vm is not None and self._rename:
            message = self._renamed(message, message.vm)
        return TimedMessage(time, message)

    def name_of(self, vm: str) -> str:
        """What a VM is called."""
        return self._rename.get(vm, vm)

    def packet(self, packet: BridgePacket, left_out: frozenset[str]) -> BridgePacket:
        """The request of a trap, in the same way."""
        return self._redaction.packet(packet, left_out) if self.redacts else packet

    def _renamed(self, message: RecordedMessage, vm: str) -> RecordedMessage:
        name = self.name_of(vm)
        owner = self._owners.setdefault(name, vm)
        if owner != vm:
            raise ConfigError(f"--rename: both {owner!a} and {vm!a} would be called {name!a}")
        return message if name == vm else msgspec.structs.replace(message, vm=name)

    def _shifted(self, session: Session) -> Session:
        started = session.started
        with suppress(ValueError, OverflowError):
            then = datetime.fromisoformat(started)
            started = (then + timedelta(microseconds=self._shift // 1000)).isoformat()
        clock = session.clock - self._shift
        if not -_MAX_CLOCK <= clock < _MAX_CLOCK:
            raise ConfigError("--shift: the clock of handlers would be beyond 64 bits")
        return msgspec.structs.replace(session, started=started, clock=clock)

    def _redacted(
        self, message: RecordedMessage, left_out: frozenset[str] | None
    ) -> RecordedMessage:
        redaction = self._redaction
        if isinstance(message, Session):
            # A format of before has no such messages, and its readers do not know the rule.
            knows_outside = message.format >= FORMAT_WITH_STEPS
            further = (
                each for each in redaction.of_traps if knows_outside or each.what != "outside"
            )
            rules = dict.fromkeys((*message.redaction, *further))
            handlers = tuple(
                msgspec.structs.replace(each, settings=None)
                if redaction.hides_settings(each.request)
                else each
                for each in message.handlers
            )
            return msgspec.structs.replace(message, redaction=tuple(rules), handlers=handlers)
        if isinstance(message, TrapEvent):
            return self._trap(message, self._all if left_out is None else left_out)
        if isinstance(message, Reply):
            if left_out is None:
                left_out = redaction.of(message.packet.request)
            if not left_out:
                return message
            writes = message.writes
            return msgspec.structs.replace(
                message,
                packet=redaction.packet(message.packet, left_out),
                writes=None if writes is None else redaction.writes(writes, left_out),
                **dict.fromkeys(OF_OUTPUT),
                error=None if message.error is None else "left out",
            )
        if isinstance(message, MemoryAccess) and "memory" in (
            self._all if left_out is None else left_out
        ):
            return msgspec.structs.replace(message, data=None)
        if isinstance(message, Outside) and (self._all if left_out is None else left_out):
            return message.without_content()
        return message

    def _trap(self, event: TrapEvent, left_out: frozenset[str]) -> TrapEvent:
        try:
            return self._redaction.trap(event, left_out)
        except UnsupportedTrapError:
            # It asks nothing, so each general register may repeat what is left out.
            if self._all <= {"memory", "outside"}:
                return event
            zeros = dict.fromkeys(event.architecture.values, 0)
            registers = msgspec.structs.replace(event.registers, **zeros)
            return msgspec.structs.replace(event, registers=registers)
