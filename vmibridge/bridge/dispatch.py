"""From a packet to the handler that answers it.

Handlers are tried in order, and the first whose magic and request match wins. The
order is worked out once, into a table: a match is one look-up, however many handlers
there are. A nested bridge is taken apart into its handlers; a dispatcher of another
kind is asked itself, and passes a request on by answering *unmatched*.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterable, Sequence
from inspect import getattr_static, isfunction
from operator import itemgetter
from pathlib import Path
from traceback import walk_tb
from typing import Any, ClassVar, TypeAlias, cast

from msgspec.structs import replace

from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.contract import BridgeContract
from vmibridge.bridge.handler import (
    BridgeHandler,
    check_instance,
    check_retry_values,
    check_timeout,
)
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.response import BridgeResponse
from vmibridge.text import printable, str_of, type_name
from vmibridge.vm.trap import TrapFilter, TrapReason

__all__ = ["Bridge", "BridgeDispatch", "Target"]

log: logging.Logger = logging.getLogger(__name__)

_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_ENGINE = tuple(f"{_PACKAGE}{name}{os.sep}" for name in ("aio", "bridge", "engine"))
"""The files that are on the way to each handler."""
_MAX_ERROR = 500
"""Characters."""

# Asking an Enum for a member takes as long as a call before Python 3.12.
_HANDLED = OutcomeKind.HANDLED


class BridgeDispatch(ABC):
    """Something that answers packets: a bridge, or a dispatcher of one's own."""

    ANY_CPUID: ClassVar[bool] = False
    """With a contract without magic: make every CPUID of the guest ours."""
    may_wait: ClassVar[bool] = False
    """Its guests take WAIT for what it is: the soft deadline of the server holds for it."""

    @abstractmethod
    def contracts(self) -> Sequence[BridgeContract]:
        """What it may answer to, in its order; fixed for its life."""

    @abstractmethod
    async def dispatch(self, vmi: BridgeContext, packet: BridgePacket) -> Outcome[Any]:
        """Answer a packet, stamps included. It may raise; it may be cancelled."""


Target: TypeAlias = BridgeHandler[Any] | BridgeDispatch
"""What a bridge may hold: handlers, and dispatchers of one's own, other bridges among them."""


class Entry:
    """One place in the order of a bridge: a target, and what it answers to."""

    __slots__ = (
        "any_cpuid",
        "contract",
        "handler",
        "instant",
        "name",
        "own_task",
        "serial",
        "stamps",
        "target",
        "task_names",
        "waits",
    )

    def __init__(self, target: Target, contract: BridgeContract) -> None:
        self.target: Target = target
        self.contract: BridgeContract = contract
        self.handler: BridgeHandler[Any] | None = (
            target if isinstance(target, BridgeHandler) else None
        )
        self.stamps: bool = any(value is not None for value in contract.verify_values)
        self.any_cpuid: bool = target.ANY_CPUID
        self.instant: bool = self.handler is not None and self.handler.instant
        self.serial: bool = self.handler is not None and self.handler.serial
        self.own_task: bool = self.handler is None or (
            self.handler.own_task and not self.handler.instant
        )
        self.waits: dict[int | None, str] = {}
        """What was seen to wait, and is asked in a task of its own: the name of that task, by the
        code of the method, `None` for codes that the handler does not name."""
        self.task_names: dict[int | None, str] = {}
        """Those that were asked for, by the same."""
        if self.handler is not None:
            # An instance may have set its own.
            check_instance(self.handler)
            check_timeout(self.handler.timeout)
            check_timeout(self.handler.soft_timeout, "soft_timeout")
            check_retry_values(self.handler.retry_values)
        self.name: str = type(target).__name__ if self.handler is None else self.handler.name

    def key_of(self, method: int) -> int | None:
        """Its key in `waits`. A guest can make up any number of codes, and no more keys."""
        return None if self.handler is None or method not in self.handler.methods else method

    def task_name(self, method: int) -> str:
        """What the task is named that asks it for this method and waits."""
        key = self.key_of(method)
        name = self.task_names.get(key)
        if name is None:
            assert self.handler is not None or key is None
            named = "" if key is None or self.handler is None else self.handler.methods[key].name
            name = f"vmibridge handler {self.name}{'.' if named else ''}{named}"
            self.task_names[key] = name
        return name


class Bridge(BridgeDispatch):
    """An ordered set of handlers and other dispatchers; `Bridge()` answers nothing.

    Raises `ValueError` when a handler's contract is out of range, `TypeError` for
    what is neither a handler nor a dispatcher.
    """

    def __init__(self, *targets: Target) -> None:
        self.entries: list[Entry] = []
        """Who is asked, in order; nested bridges are taken apart."""
        for target in targets:
            # One that answers in its own way is asked itself.
            if isinstance(target, Bridge) and type(target).dispatch is Bridge.dispatch:
                self.entries += target.entries
            elif isinstance(target, BridgeDispatch):
                self.entries += [Entry(target, contract) for contract in target.contracts()]
            elif isinstance(target, BridgeHandler):
                self.entries.append(Entry(target, target.contract))
            else:
                raise TypeError(f"a bridge takes handlers and dispatchers, not {target!r}")
        self._magics = frozenset(
            entry.contract.magic for entry in self.entries if entry.contract.magic is not None
        )
        self._exact: dict[tuple[int, int], tuple[Entry, ...]] = {}
        self._any_magic: dict[int, tuple[Entry, ...]] = {}
        self._any_cpuid: dict[int, tuple[Entry, ...]] = {}
        self._build_tables()

    def _build_tables(self) -> None:
        anonymous: dict[int, list[tuple[int, Entry]]] = {}
        named: dict[tuple[int, int], list[tuple[int, Entry]]] = {}
        for place, entry in enumerate(self.entries):
            request, magic = entry.contract.request, entry.contract.magic
            if magic is None:
                anonymous.setdefault(request, []).append((place, entry))
            else:
                named.setdefault((magic, request), []).append((place, entry))
        for request, placed in anonymous.items():
            opted_in = _until_final([each for each in placed if each[1].any_cpuid])
            self._any_cpuid[request] = tuple(entry for _, entry in opted_in)
            anonymous[request] = _until_final(placed)
            self._any_magic[request] = tuple(entry for _, entry in anonymous[request])
        for key, placed in named.items():
            merged = sorted(placed + anonymous.get(key[1], []), key=itemgetter(0))
            self._exact[key] = tuple(entry for _, entry in _until_final(merged))

    def contracts(self) -> Sequence[BridgeContract]:
        return [entry.contract for entry in self.entries]

    @property
    def handlers(self) -> list[BridgeHandler[Any]]:
        """The handlers in order, those of nested bridges included."""
        found: list[BridgeHandler[Any]] = []
        for entry in self.entries:
            if entry.handler is not None:
                found.append(entry.handler)
            elif isinstance(entry.target, Bridge):
                found += entry.target.handlers
        return found

    @property
    def never_asked(self) -> list[tuple[Entry, Entry]]:
        """Each handler that is never asked, with the one that takes all its requests before it."""
        tables = (self._exact, self._any_magic, self._any_cpuid)
        asked = {entry for table in tables for found in table.values() for entry in found}
        pairs: list[tuple[Entry, Entry]] = []
        for entry in self.entries:
            if entry.handler is not None and entry not in asked:
                request, magic = entry.contract.request, entry.contract.magic
                found = self._any_magic[request] if magic is None else self._exact[magic, request]
                pairs.append((entry, found[-1]))
        return pairs

    @property
    def trap_filter(self) -> TrapFilter:
        """Which traps are this bridge's own."""
        anonymous = [entry for entry in self.entries if entry.contract.magic is None]
        return TrapFilter(
            magics=self._magics,
            any_hypercall=bool(anonymous),
            any_cpuid=any(entry.any_cpuid for entry in anonymous),
        )

    def match(self, packet: BridgePacket, reason: TrapReason) -> tuple[Entry, ...]:
        """The handlers that may answer, first choice first; empty if there are none.

        A CPUID with a magic that no handler names goes only to those that opted in.
        """
        found = self._exact.get((packet.magic, packet.request))
        if found is not None:
            return found
        if reason is TrapReason.CPUID and packet.magic not in self._magics:
            return self._any_cpuid.get(packet.request, ())
        return self._any_magic.get(packet.request, ())

    async def dispatch(self, vmi: BridgeContext, packet: BridgePacket) -> Outcome[Any]:
        """Find the handler and await its answer.

        A handler that raises makes the outcome *failed*, and is logged with the place. There is
        no deadline here: that is the server's. Cancellation passes through.
        """
        for entry in self.match(packet, vmi.event.reason):
            try:
                outcome = outcome_of(entry, packet, await ask(entry, vmi, packet))
            except Exception as error:
                return failure(entry, packet, error)
            if outcome.kind is not OutcomeKind.UNMATCHED:
                return outcome
        return Outcome(OutcomeKind.UNMATCHED, packet)


Answer: TypeAlias = BridgeResponse[Any] | Outcome[Any] | None
"""What a handler returns, or a dispatcher of another kind."""


def ask(entry: Entry, vmi: BridgeContext, packet: BridgePacket) -> Awaitable[Answer]:
    """Ask one target; `outcome_of` tells what its answer means."""
    if entry.handler is None:
        assert isinstance(entry.target, BridgeDispatch)
        return entry.target.dispatch(vmi, packet)
    return entry.handler.handle(vmi, packet)


def outcome_of(entry: Entry, packet: BridgePacket, response: Answer) -> Outcome[Any]:
    """The outcome of an answer, stamped. Raises `TypeError` for what is no answer."""
    if entry.handler is None:
        return _checked(response)
    if response is None:
        return Outcome(OutcomeKind.REJECTED, packet, handler=entry.name)
    if type(response) is not BridgeResponse:
        response = _as_response(response, f"{_answering(entry.handler, packet)} returned")
    if entry.stamps:
        response = entry.contract.stamp(response)
    return Outcome(_HANDLED, packet, response, entry.name)


def _answering(handler: BridgeHandler[Any], packet: BridgePacket) -> str:
    """What answers a packet, as `Verdict.look_up()`."""
    return f"{type_name(handler)}.{_method_of(handler, packet)}()"


def _method_of(handler: BridgeHandler[Any], packet: BridgePacket) -> str:
    marked = handler.methods.get(packet.method)
    overrides = type(handler).handle is not BridgeHandler.handle
    return "handle" if overrides or marked is None else marked.name


def _as_response(given: object, whose: str) -> BridgeResponse[Any]:
    # By its type: an object may say anything of its class.
    if not issubclass(type(given), BridgeResponse):
        raise TypeError(f"{whose} {type_name(given)}, not a BridgeResponse")
    response = cast("BridgeResponse[Any]", given)
    # Its class may have a `__post_init__` of its own.
    BridgeResponse.__post_init__(response)
    return response


def _checked(given: object) -> Outcome[Any]:
    """What a dispatcher of one's own returned, in the types that files and frames take."""
    if type(given) is not Outcome:
        raise TypeError(f"dispatch() returned {type_name(given)}, not an Outcome")
    outcome: Outcome[Any] = given
    if type(outcome.kind) is not OutcomeKind or type(outcome.packet) is not BridgePacket:
        raise TypeError("dispatch() returned an Outcome without an OutcomeKind or a BridgePacket")
    if outcome.response is not None:
        _as_response(outcome.response, "dispatch() returned an Outcome with")
    for name in ("handler", "error"):
        text = getattr(outcome, name)
        if text is not None and not (type(text) is str and text.isprintable()):
            outcome = replace(outcome, **{name: printable(str_of(text))})
    return outcome


def failure(entry: Entry, packet: BridgePacket, error: BaseException) -> Outcome[Any]:
    """The outcome of a handler that raised, or whose answer is none; logs the error with its
    traceback."""
    text, name = one_line(error), entry.name
    place = place_of(error) or _place_of_method(entry.handler, packet)
    log.error(
        "handler %s failed on method %#06x%s: %s",
        name,
        packet.method,
        f" at {place}" if place else "",
        text,
        exc_info=error,
    )
    return Outcome(OutcomeKind.FAILED, packet, handler=name, error=text)


def one_line(error: BaseException) -> str:
    """An error as printable text of at most 500 characters: it may quote the guest."""
    kind = type(error).__name__
    try:
        text = f"{kind}: {error}"
    except BaseException:  # an error that cannot say what it is, and may raise anything instead
        text = kind
    return printable(text[:_MAX_ERROR])[:_MAX_ERROR]


def place_of(error: BaseException) -> str | None:
    """Where a handler raised, as `FILE:LINE`: the last line of its own file on the way.

    Its own file is the first one that is not of this package's engine. `None` when the error was
    not raised by a handler.
    """
    place = place_in(
        (frame.f_code.co_filename, line) for frame, line in walk_tb(error.__traceback__)
    )
    if place is None and error.__cause__ is not None:
        # Python makes another error of a StopIteration, and leaves the place with that.
        return place_of(error.__cause__)
    return place


def _place_of_method(handler: BridgeHandler[Any] | None, packet: BridgePacket) -> str | None:
    """Where the method is that answered; `None` where that is not known."""
    if handler is None:
        return None
    method = getattr_static(type(handler), _method_of(handler, packet), None)
    code = method.__code__ if isfunction(method) else None
    return None if code is None else place_in([(code.co_filename, code.co_firstlineno)])


def place_in(stack: Iterable[tuple[str, int]]) -> str | None:
    """The same for a stack of files and lines, from the engine to the top."""
    own: str | None = None
    line = 0
    for file, number in stack:
        if own is None and not file.startswith(_ENGINE):
            own = file
        if file == own:
            line = number
    return None if own is None else f"{printable(own)}:{line}"


def _until_final(placed: Sequence[tuple[int, Entry]]) -> list[tuple[int, Entry]]:
    # A handler that matches always answers, so nothing behind it is ever asked.
    # A dispatcher that matches by two of its contracts is asked once.
    kept: dict[int, tuple[int, Entry]] = {}
    for place, entry in placed:
        kept.setdefault(id(entry.target), (place, entry))
        if entry.handler is not None:
            break
    return list(kept.values())
