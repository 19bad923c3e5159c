"""The new answers of a replay that are accepted, and what has to be known to write them."""

from collections.abc import Iterable
from functools import partial

import msgspec

from vmibridge.errors import NotReplayedError
from vmibridge.recording.messages import (
    MemoryAccess,
    Outside,
    RecordedHandler,
    Reply,
    Session,
)
from vmibridge.recording.replay.compare import reply_of
from vmibridge.recording.replay.journal import Journal
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.session import loop_name

__all__ = ["Accepted", "AcceptedRequest"]


class AcceptedRequest(msgspec.Struct):
    """One request as it is answered now."""

    final: int
    """The trap that has its final reply."""
    reply: Reply | None
    """`None`: it ran natively."""
    accesses: list[MemoryAccess]
    """Those that have a place of their own."""
    there: set[int]
    """Numbers of the recorded ones that stay."""
    outside: list[Outside]
    """Calls of `vmi.outside` that are not in the recording."""
    made: set[tuple[str, int]]
    """Those that are, by key and number."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(AcceptedRequest).decode


class Accepted:
    """The new answers that are to be in the new recording."""

    def __init__(self, *, all_handlers: bool = True) -> None:
        """`all_handlers`: the sessions get those of now; else those that were accepted alone."""
        self.count: int = 0
        """Requests that are accepted."""
        self.journal: Journal = Journal()
        """What handlers did, and where."""
        self._moved: dict[tuple[str, int], bytes] = {}
        """Replies that are as they were, and were given earlier; from the VM and the first trap."""
        # Encoded, as there may be many.
        self._requests: dict[tuple[str, int], bytes] = {}
        """From the VM and the first trap."""
        self._firsts: dict[tuple[str, int], int] = {}
        """From the VM and any other trap of a request to its first."""
        self._handlers: dict[str, tuple[RecordedHandler, ...]] = {}
        self._loop = ""
        self._all_handlers = all_handlers
        self._changed: set[tuple[str, str]] = set()

    def hear_handlers(self, vm: str, handlers: Iterable[RecordedHandler]) -> None:
        """What serves a VM now, on the running loop."""
        self._handlers[vm] = tuple(handlers)
        self._loop = loop_name()

    def keep(self, vm: str, request: ReplayedRequest) -> None:
        """Accept what became of a request. Raises `NotReplayedError`: its accesses are too many."""
        reply, outcome, first = request.reply, request.outcome, request.event.seq
        assert reply is not None
        if request.has_too_many:
            raise NotReplayedError(f"trap {first} of vm {vm}: too many memory accesses to accept")
        now = None if outcome is None else msgspec.structs.replace(reply_of(outcome, reply), vm=vm)
        self.count += 1
        self._add(vm, request, now)
        if now is not None and now.handler is not None:
            self._changed.add((vm, now.handler))

    def _add(self, vm: str, request: ReplayedRequest, now: Reply | None) -> None:
        reply, first = request.reply, request.event.seq
        assert reply is not None
        of = partial(msgspec.structs.replace, vm=vm, seq=request.first)
        self._requests[vm, first] = _encode(
            AcceptedRequest(
                reply.seq,
                now,
                [of(each) for each in request.kept.others],
                request.kept.there,
                [of(each) for each in request.outside.others],
                request.outside.made,
            )
        )
        for seq in request.seqs:
            self._firsts[vm, seq] = first

    def move(self, vm: str, request: ReplayedRequest) -> None:
        """A request was compared: what it does may come at another time, though it is the same."""
        place, reply = request.reply_place, request.reply
        has_others = request.has_outside and request.outside.others
        if (has_others or request.restarted_by is not None) and not request.has_too_many:
            self._add(vm, request, reply)
        if place is not None and place != request.recorded_place and reply is not None:
            self._moved[vm, request.first] = msgspec.msgpack.encode(reply)

    def moved(self, vm: str, first: int) -> Reply | None:
        """The recorded reply of a request, if it is given earlier."""
        data = self._moved.get((vm, first))
        return None if data is None else msgspec.msgpack.decode(data, type=Reply)

    def request(self, vm: str | None, seq: int | None) -> AcceptedRequest | None:
        """The accepted request that a trap belongs to."""
        if vm is None or seq is None:
            return None
        data = self._requests.get((vm, self._firsts.get((vm, seq), seq)))
        return None if data is None else _decode(data)

    def session(self, then: Session) -> Session:
        """The session of a VM, with the handlers that answered what was accepted, and the loop in
        whose steps they did."""
        then = msgspec.structs.replace(then, accepted=True, loop=self._loop or then.loop)
        now = {each.name: each for each in self._handlers.get(then.vm, ())}
        if not now:
            return then
        if self._all_handlers:
            return msgspec.structs.replace(then, handlers=tuple(now.values()))
        kept = {each.name: each for each in then.handlers}
        for vm, name in self._changed:
            if vm == then.vm and name in now:
                kept[name] = now[name]
        return msgspec.structs.replace(then, handlers=tuple(kept.values()))
