"""A replay that stops before a handler is asked, with what is known of the request.

It stops in the hook `handler_began`, on the event loop: so no other handler, timer or trap goes on
while somebody looks.
"""

import pdb
import sys
from collections.abc import Callable, Iterable, Mapping
from inspect import getattr_static, unwrap
from pathlib import Path
from types import CodeType
from typing import Any, TextIO

from vmibridge.bridge.handler import BridgeHandler
from vmibridge.engine.taps import HandlerBegan, Tap
from vmibridge.errors import ConfigError
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.replay.compare import describe
from vmibridge.recording.traps import VALUE_NAMES, RecordedTrap, recorded_traps
from vmibridge.text import printable

_MAX_SHOWN = 32
"""Memory accesses that are shown."""
_NAMES = ("seq", "vm", "vcpu", "handler", "request", "method", *VALUE_NAMES)


class Break:
    """Where to stop: the number of a trap, or an expression of Python."""

    def __init__(self, text: str) -> None:
        """Raises `ConfigError` for an expression that cannot be compiled."""
        self.text: str = text
        self.is_met: bool = False
        """Whether a handler was asked there."""
        self._seq: int | None = None
        self._code: CodeType | None = None
        try:
            self._seq = int(text, 0)
        except ValueError:
            try:
                self._code = compile(text, "--break", "eval")
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
                raise ConfigError(
                    f"--break {text[:80]!r}: is neither a number nor an expression: {error}"
                ) from None

    def is_at(self, began: HandlerBegan) -> bool:
        """Whether it is before this handler. Raises `ConfigError` where the expression raises."""
        if self._code is None:
            return self._seq in (began.first, began.event.seq)
        packet = began.packet
        about = (began.first, began.event.vm, began.event.vcpu, began.handler)
        names = zip(_NAMES, (*about, packet.request, packet.method, *packet.values), strict=True)
        try:
            values = {**dict(names), "packet": packet}
            return bool(eval(self._code, values))  # noqa: S307 - the user's own, in his process
        except Exception as error:
            raise ConfigError(
                f"--break {self.text[:80]!r}: {type(error).__name__}: {error};"
                f" it may name {', '.join(_NAMES)} and packet"
            ) from error


class Breaks(Tap):
    """Stops where it is asked to. `end` ends the replay."""

    def __init__(
        self,
        path: Path,
        places: list[Break],
        recorded: Mapping[str, str],
        end: Callable[[], None],
        *,
        with_pdb: bool,
    ) -> None:
        """`recorded`: from the name of a VM to the one that it has in the recording at `path`."""
        self.error: ConfigError | None = None
        self._path = path
        self._places = places
        self._recorded = recorded
        self._end = end
        self._pdb = with_pdb
        self._handlers: dict[tuple[str, str], BridgeHandler[Any]] = {}

    def hear_handlers(self, vm: str, handlers: Iterable[BridgeHandler[Any]]) -> None:
        """What serves a VM."""
        self._handlers.update({(vm, handler.name): handler for handler in handlers})

    def handler_began(self, began: HandlerBegan) -> None:
        """Stop, where this is the place."""
        try:
            if self.error is not None:
                return
            met = [each for each in self._places if each.is_at(began)]
            if not met:
                return
            for each in met:
                each.is_met = True
        except ConfigError as error:
            self.error = error
            self._end()
            return
        for line in self._lines(began):
            sys.stderr.write(f"{printable(line)}\n")
        handler = self._handlers.get((began.event.vm, began.handler))
        if self._pdb and handler is not None:
            _stop_in(handler, began, self._end)
        elif sys.stdin.isatty():
            sys.stderr.write("Enter goes on, q ends: ")
            sys.stderr.flush()
            if sys.stdin.readline().strip() in ("q", "quit"):
                self._end()

    def _lines(self, began: HandlerBegan) -> list[str]:
        event, packet = began.event, began.packet
        name = began.handler if began.method is None else f"{began.handler}/{began.method}"
        values = " ".join(f"{value:#x}" for value in packet.values)
        codes = f"request {packet.request:#06x} method {packet.method:#06x}"
        lines = [
            f"break before {name}: trap {began.first} of vm {event.vm}, vcpu {event.vcpu}",
            f"  asked     magic {packet.magic:#010x} {codes}",
            f"  values    {values}",
        ]
        then = self._recorded_trap(self._recorded.get(event.vm, event.vm), began.first)
        if then is None or then.reply is None:
            return [*lines, "  the recording has no answer to it"]
        reply = then.reply
        written = "nothing"
        if reply.writes is not None:
            shown = (" . " if each is None else f"{each:#x}" for each in reply.writes.values)
            written = " ".join(each.strip() for each in shown)
        lines += [f"  expected  {reply.kind.value}: {written}"]
        lines += [f"  output    {reply.output}"] if reply.output is not None else []
        lines += [f"  error     {reply.error}"] if reply.error is not None else []
        lines += [f"  {describe(access)}" for access in then.accesses[:_MAX_SHOWN]]
        more = len(then.accesses) - _MAX_SHOWN + then.left_out
        return [*lines, f"  further accesses: {more}"] if more > 0 else lines

    def _recorded_trap(self, vm: str, seq: int) -> RecordedTrap | None:
        """The trap with its answer, or the last retry of it, which got the answer."""
        found = None
        with RecordingReader(self._path) as reader:
            for trap in recorded_traps(reader.messages()):
                reply = trap.reply
                if trap.event.vm != vm or reply is None:
                    continue
                if seq in (trap.event.seq, reply.retry_of):
                    found = trap
                    if reply.kind.value != "waiting":
                        break
        return found


class _Debugger(pdb.Pdb):
    """Goes on to the first line of a function; to quit it ends the replay."""

    def __init__(self, end: Callable[[], None], out: TextIO) -> None:
        super().__init__(stdin=sys.stdin, stdout=out, nosigint=True, readrc=False)
        # Run at the first stop, which is the one in this module.
        self.rcLines += ["tbreak function", "continue"]
        self._end_replay = end

    def set_quit(self) -> None:
        super().set_quit()
        self._end_replay()


def _stop_in(handler: BridgeHandler[Any], began: HandlerBegan, end: Callable[[], None]) -> None:
    marked = handler.methods.get(began.packet.method)
    has_own = type(handler).handle is not BridgeHandler.handle
    name = "handle" if has_own or marked is None else marked.name
    function = unwrap(getattr_static(type(handler), name))
    assert function is not None  # for the debugger, which is told its name
    _Debugger(end, sys.stderr).set_trace(sys._getframe())  # noqa: SLF001 - as pdb does
