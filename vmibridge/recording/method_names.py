"""What requests of a recording are called, by its sessions."""

from vmibridge.recording.messages import Session
from vmibridge.recording.traps import RecordedTrap

__all__ = ["MethodNames"]

_MAX_NAMES = 65_536


class MethodNames:
    """Learns from each session that is heard."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str, int], str] = {}

    def learn(self, session: Session) -> None:
        """Take the handlers of one VM."""
        for handler in session.handlers:
            for method in handler.methods:
                if len(self._names) < _MAX_NAMES:
                    self._names[session.vm, handler.name, method.code] = method.name

    def name(self, vm: str, handler: str | None, code: int) -> str | None:
        """The name of a method; `None` where it has none."""
        return None if handler is None else self._names.get((vm, handler, code))

    def of(self, trap: RecordedTrap) -> str:
        """`handler/method`, or the codes where no handler took it."""
        packet, reply = trap.packet, trap.reply
        if packet is None:
            return trap.event.reason.value
        if reply is None or reply.handler is None:
            return f"{packet.request:#06x}/{packet.method:#06x}"
        name = self.name(trap.event.vm, reply.handler, packet.method)
        return f"{reply.handler}/{f'{packet.method:#06x}' if name is None else name}"
