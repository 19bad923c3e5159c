"""A new recording of an old one: the recorded traps, with the new answers where they differ.

    accepted = Accepted()
    ...                                  # a replay whose verdict has it
    write_accepted(source, target, accepted)

What is not replayed, not compared or not different is copied, with its times. Of a request that
is accepted

- the final reply is the new one, in the place and at the time of the recorded one;
- the memory accesses are the new ones, right behind its first trap;
- calls of `vmi.outside` that are not in the recording are where their functions had come to
  something, those that are stay where they were, if they were made;
- nothing is left where it ran natively now: no recording has such traps.

So what was accepted replays without a difference, and to accept it again changes nothing.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from stat import S_IMODE

import msgspec

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.errors import NotReplayedError
from vmibridge.recording.export import new_files
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.reader import RecordingReader, TimedMessage
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import (
    CHANNELS,
    MemoryAccess,
    Note,
    Outside,
    RecordedHandler,
    RecordedMessage,
    Reply,
    Session,
    Step,
)
from vmibridge.recording.redaction import Redaction
from vmibridge.recording.replay.compare import reply_of
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.text import counted
from vmibridge.vm.trap import TrapEvent

__all__ = ["Accepted", "write_accepted"]

_CHUNK = 1 << 20
"""Bytes before compression after which a chunk is cut."""


class _Request(msgspec.Struct):
    """One request as it is answered now."""

    seqs: tuple[int, ...]
    """Of its traps."""
    reply: Reply | None
    """`None`: it ran natively."""
    accesses: list[MemoryAccess]
    outside: list[tuple[int, Outside]]
    """Calls of `vmi.outside` that are not in the recording, and the times of their places in it; 0:
    with its trap."""
    made: set[tuple[str, int]]
    """Those that are, by key and number."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Request).decode


class Accepted:
    """The new answers that are to be in the new recording."""

    def __init__(self, *, all_handlers: bool = True) -> None:
        """`all_handlers`: the sessions get those of now; else those that were accepted alone."""
        self.count: int = 0
        """Requests that are accepted."""
        # Encoded, as there may be many.
        self._requests: dict[tuple[str, int], bytes] = {}
        """From the VM and the first trap."""
        self._firsts: dict[tuple[str, int], int] = {}
        """From the VM and any other trap of a request to its first."""
        self._handlers: dict[str, tuple[RecordedHandler, ...]] = {}
        self._all_handlers = all_handlers
        self._changed: set[tuple[str, str]] = set()

    def hear_handlers(self, vm: str, handlers: Iterable[RecordedHandler]) -> None:
        """What serves a VM now."""
        self._handlers[vm] = tuple(handlers)

    def keep(self, vm: str, request: ReplayedRequest) -> None:
        """Accept what became of a request. Raises `NotReplayedError`: its accesses are too many."""
        reply, outcome, first = request.reply, request.outcome, request.event.seq
        assert reply is not None
        accesses = request.all_accesses
        if accesses is None:
            raise NotReplayedError(f"trap {first} of vm {vm}: too many memory accesses to accept")
        now = None if outcome is None else msgspec.structs.replace(reply_of(outcome, reply), vm=vm)
        self.count += 1
        self._requests[vm, first] = _encode(
            _Request(
                (first, *request.seqs),
                now,
                [msgspec.structs.replace(each, vm=vm, seq=first) for each in accesses],
                [(at, msgspec.structs.replace(each, vm=vm)) for at, each in request.outside.others],
                request.outside.made,
            )
        )
        for seq in request.seqs:
            self._firsts[vm, seq] = first
        if now is not None and now.handler is not None:
            self._changed.add((vm, now.handler))

    def request(self, vm: str | None, seq: int | None) -> "_Request | None":
        """The accepted request that a trap belongs to."""
        if vm is None or seq is None:
            return None
        data = self._requests.get((vm, self._firsts.get((vm, seq), seq)))
        return None if data is None else _decode(data)

    def session(self, then: Session) -> Session:
        """The session of a VM, with the handlers that answered what was accepted."""
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


def write_accepted(
    source: Path, target: Path, accepted: Accepted, *, replace: bool = False
) -> None:
    """Write the new recording. Blocking; one chunk in memory at a time.

    With `replace` it takes the place of a `target` that is there, such as `source`, and its mode,
    once it is whole. Raises `RecordingReadError` when `source` cannot be read, `ConfigError` when
    `target` is there already, `RecordingError` when it cannot be written. Then `target` is as it
    was.
    """
    with RecordingReader(source) as reader, new_files([target], replace=replace) as (path,):
        if replace and target.exists():
            path.chmod(S_IMODE(target.stat().st_mode))
        writer = RecordingWriter(path, f"vmibridge {version('vmibridge')}", overwrite=True)
        try:
            _write(_accept(reader.messages(), accepted), writer)
            writer.finish()
        except BaseException:
            writer.close()
            raise


def _write(messages: Iterable[tuple[int, RecordedMessage]], writer: RecordingWriter) -> None:
    chunk = ChunkBuilder()
    for time, message in messages:
        # The traps of an architecture have a type of their own.
        number = next(each.id for each in CHANNELS if isinstance(message, each.kind))
        if chunk.add(number, time, message) >= _CHUNK:
            writer.add(chunk.pack())
            chunk = ChunkBuilder()
    if len(chunk):
        writer.add(chunk.pack())


def _accept(
    messages: Iterable[TimedMessage], accepted: Accepted
) -> Iterator[tuple[int, RecordedMessage]]:
    redactions: dict[str, Redaction] = {}
    changes: dict[str, Counter[str]] = {}
    calls = _LaterCalls()
    for time, message in messages:
        yield from calls.due(time, message)
        if isinstance(message, Session):
            redactions.setdefault(message.vm, Redaction(message.redaction))
            yield time, accepted.session(message)
            continue
        if isinstance(message, Note) and message.kind == "end":
            change = changes.get(message.vm or "", Counter())
            counts = {name: count + change[name] for name, count in message.counts.items()}
            yield (
                time,
                msgspec.structs.replace(message, counts=counts, text=_total(counts, message)),
            )
            continue
        request = accepted.request(message.vm, message.seq)
        if request is None:
            yield time, message
            continue
        now = request.reply
        if isinstance(message, Reply):
            change = changes.setdefault(message.vm, Counter())
            if now is None:
                change[message.kind.value] -= 1
                change["native"] += 1
            elif message.kind is OutcomeKind.WAITING:
                yield time, message
            else:
                change[message.kind.value] -= 1
                change[now.kind.value] += 1
                hidden = _hidden(redactions.get(message.vm), message)
                yield time, now if not hidden else _redacted(now, redactions[message.vm], hidden)
        elif now is not None and _is_kept(message, request):
            yield time, message
            if isinstance(message, TrapEvent) and message.seq == request.seqs[0]:
                hidden = _hidden(redactions.get(message.vm), now)
                for each in _done_now(request, hidden):
                    yield time, each
                for at, call in request.outside:
                    calls.add(max(at, time), call.without_content() if hidden else call)
                yield from calls.due(time)


def _is_kept(message: RecordedMessage, request: _Request) -> bool:
    """Whether something of an accepted request, other than its reply, is as it was."""
    if isinstance(message, Outside):
        return (message.key, message.number) in request.made
    return not isinstance(message, MemoryAccess)


class _LaterCalls:
    """New calls of `vmi.outside`, whose places are behind that of their trap."""

    def __init__(self) -> None:
        self._calls: list[tuple[int, int, Outside]] = []
        self._count = 0

    def add(self, time: int, call: Outside) -> None:
        """One more."""
        self._count += 1
        heappush(self._calls, (time, self._count, call))

    def due(
        self, time: int, message: RecordedMessage | None = None
    ) -> Iterator[tuple[int, Outside]]:
        """Those whose place is before this message: by their time, and at the latest before the
        handler of their request has ended."""
        while self._calls and self._calls[0][0] <= time:
            yield time, heappop(self._calls)[2]
        first = _ended_by(message) if self._calls and message is not None else None
        of_it = [] if first is None else [each for each in self._calls if _is_of(each[2], *first)]
        if of_it:
            self._calls = [each for each in self._calls if each not in of_it]
            heapify(self._calls)
            yield from ((time, call) for _, _, call in sorted(of_it, key=itemgetter(0, 1)))


def _ended_by(message: RecordedMessage) -> tuple[str, int] | None:
    """The VM and the first trap of the request whose handler has ended; `None`: of none."""
    if isinstance(message, Step) and message.kind in ("ended", "cut off"):
        return message.vm, message.seq
    if isinstance(message, Reply) and message.kind is not OutcomeKind.WAITING:
        return message.vm, message.seq if message.retry_of is None else message.retry_of
    return None


def _is_of(call: Outside, vm: str, first: int) -> bool:
    return (call.vm, call.seq) == (vm, first)


def _done_now(request: _Request, hidden: frozenset[str]) -> Iterator[MemoryAccess]:
    for access in request.accesses:
        yield msgspec.structs.replace(access, data=None) if "memory" in hidden else access


def _hidden(redaction: Redaction | None, reply: Reply) -> frozenset[str]:
    return frozenset() if redaction is None else redaction.of(reply.packet.request)


def _redacted(reply: Reply, redaction: Redaction, hidden: frozenset[str]) -> Reply:
    writes = None if reply.writes is None else redaction.writes(reply.writes, hidden)
    error = None if reply.error is None else "left out"
    return msgspec.structs.replace(
        reply, writes=writes, output=None, output_sha256=None, error=error
    )


def _total(counts: dict[str, int], note: Note) -> str:
    if not counts:
        return note.text
    return counted(sum(counts.values()) - counts.get("native", 0), "trap")
