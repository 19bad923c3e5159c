"""The requests of a recording, with what each was answered: all of them, in memory, within bounds.

| a recorded request | can be given again |
|---|---|
| whose values were left out | no: nothing tells it from others |
| whose answer, or bytes that it wrote into the guest, were left out | no |
| without its last reply, or that a stop of the server cut off | no |
| that began in the file before | no |
| that a policy denied | no: the policy of now decides |
| whose bytes that it read were left out | yes; they are not compared |

A request that was told to wait has one answer, its last one, which is given at once.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import msgspec

from vmibridge.bridge.outcome import GONE, STOPPED, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.request import request_in
from vmibridge.errors import RecordingReadError
from vmibridge.recording.file.reader import RecordingReader, TimedMessage
from vmibridge.recording.messages import MemoryAccess, Reply, Session
from vmibridge.recording.redaction import Redaction
from vmibridge.recording.traps import RecordedTrap, recorded_traps
from vmibridge.vm.trap import TrapReason

__all__ = ["Answer", "Loaded", "RequestKey", "VmAnswers", "load_answers"]

RequestKey: TypeAlias = tuple[int, BridgePacket]
"""vCPU, and what is asked."""

_MAX_REQUESTS = 1_000_000
_MAX_DATA = 512 << 20
"""Bytes that were read and written."""
_MAX_WAITING = 16_384
"""Requests that were told to wait, and have no answer yet."""
_CUT_OFF = (GONE, STOPPED)
_VALUES = frozenset({"value1", "value2", "value3", "value4"})


class Answer(msgspec.Struct, eq=False):
    """One request of then, and what came of it."""

    seq: int
    """Of the trap that it came with."""
    reply: Reply
    reads: tuple[MemoryAccess, ...] = ()
    """What it read of the guest, before it wrote there itself; without what was left out."""
    writes: tuple[MemoryAccess, ...] = ()


class VmAnswers(msgspec.Struct):
    """The answers of one VM."""

    sessions: list[Session] = []
    by_request: dict[RequestKey, list[Answer]] = {}
    """In the order in which they were asked."""
    count: int = 0
    unusable: Counter[str] = msgspec.field(default_factory=Counter)
    """Why others cannot be given, and how many."""
    any_cpuid: bool = False
    """Whether a CPUID without the magic of a handler was answered."""


class Loaded(msgspec.Struct):
    """A recording that was read."""

    path: Path
    vms: dict[str, VmAnswers]
    problems: list[str]
    """What could not be read of it, in lines."""


class _Asked(msgspec.Struct):
    """A request that was told to wait."""

    seq: int
    vcpu: int
    packet: BridgePacket
    accesses: list[MemoryAccess]


def load_answers(path: Path) -> Loaded:
    """Read a recording. Blocking.

    Raises `RecordingReadError` for a file that is no recording, that has no request, or that is
    more than is kept: 1,000,000 requests, and 512 MiB of guest memory.
    """
    with RecordingReader(path) as reader:
        loading = _Loading(path)
        for trap in recorded_traps(reader.messages(), loading.other):
            loading.take(trap)
        loading.end()
        problems = reader.problem_lines()
    if not any(vm.count or vm.unusable for vm in loading.vms.values()):
        raise RecordingReadError(f"{path}: there is no request in it")
    return Loaded(path, loading.vms, problems)


class _Loading:
    def __init__(self, path: Path) -> None:
        self.vms: dict[str, VmAnswers] = {}
        self._path = path
        self._waiting: dict[tuple[str, int], _Asked] = {}
        self._redactions: dict[str, Redaction] = {}
        self._requests = self._data = 0

    def other(self, _place: int, timed: TimedMessage) -> None:
        """What belongs to no trap that is open."""
        if isinstance(timed.message, Session):
            session = timed.message
            self._vm(session.vm).sessions.append(session)
            self._redactions[session.vm] = Redaction(session.redaction)

    def take(self, trap: RecordedTrap) -> None:
        """A trap, with its reply."""
        event, packet, reply = trap.event, request_in(trap.event), trap.reply
        if packet is None:
            return
        vm = self._vm(event.vm)
        first = event.seq if reply is None or reply.retry_of is None else reply.retry_of
        asked = self._waiting.pop((event.vm, first), None)
        accesses = trap.accesses if asked is None else [*asked.accesses, *trap.accesses]
        if reply is not None and reply.kind is OutcomeKind.WAITING:
            if first == event.seq or asked is not None:
                asked = asked or _Asked(event.seq, event.vcpu, packet, [])
                asked.accesses = accesses
                self._waiting[event.vm, first] = asked
                if len(self._waiting) > _MAX_WAITING:
                    del self._waiting[next(iter(self._waiting))]
                    vm.unusable["its answer is missing"] += 1
            return
        why = self._why_not(trap, packet, accesses, has_begun=first == event.seq or bool(asked))
        if why is not None:
            vm.unusable[why] += 1
            return
        assert reply is not None
        packet = packet if asked is None else asked.packet
        if event.reason is TrapReason.CPUID and not any(
            handler.magic == packet.magic for session in vm.sessions for handler in session.handlers
        ):
            vm.any_cpuid = True
        reads, writes = _split(accesses)
        self._bound(reads, writes)
        key = (event.vcpu if asked is None else reply.vcpu, packet)
        vm.by_request.setdefault(key, []).append(Answer(first, reply, reads, writes))
        vm.count += 1

    def end(self) -> None:
        """All was read."""
        for (name, first), asked in self._waiting.items():
            vm = self.vms[name]
            later = vm.by_request.get((asked.vcpu, asked.packet), ())
            # One that was forgotten before its handler had begun was asked as a new request.
            if not any(answer.reply.seq > first for answer in later):
                vm.unusable["its answer is missing"] += 1
        for answers in self.vms.values():
            for several in answers.by_request.values():
                several.sort(key=lambda answer: answer.seq)

    def _vm(self, name: str) -> VmAnswers:
        return self.vms.setdefault(name, VmAnswers())

    def _why_not(
        self,
        trap: RecordedTrap,
        packet: BridgePacket,
        accesses: list[MemoryAccess],
        *,
        has_begun: bool,
    ) -> str | None:
        reply, redaction = trap.reply, self._redactions.get(trap.event.vm)
        left_out = frozenset() if redaction is None else redaction.of(packet.request) & _VALUES
        is_lost = any(note.kind == "lost" for _, note in trap.notes)
        if left_out:
            return f"{', '.join(sorted(left_out))} was left out of the recording"
        if is_lost or not has_begun:
            return "it began before this file"
        if reply is None or (reply.kind is OutcomeKind.CANCELLED and reply.error in _CUT_OFF):
            return "its answer is missing"
        if reply.kind is OutcomeKind.DENIED:
            return "the policy denied it"
        if any(each.write and each.data is None and each.error is None for each in accesses):
            return "what it wrote was left out of the recording"
        return None if not trap.left_out else "its memory accesses are too many"

    def _bound(self, *accesses: Iterable[MemoryAccess]) -> None:
        self._requests += 1
        self._data += sum(len(each.data or b"") for several in accesses for each in several)
        if self._requests > _MAX_REQUESTS or self._data > _MAX_DATA:
            raise RecordingReadError(
                f"{self._path}: has more than {_MAX_REQUESTS} requests or {_MAX_DATA >> 20} MiB of"
                " guest memory to answer from; cut it with vmibridge edit"
            )


def _split(
    accesses: list[MemoryAccess],
) -> tuple[tuple[MemoryAccess, ...], tuple[MemoryAccess, ...]]:
    """What was read of the guest's own, and what was written."""
    reads: list[MemoryAccess] = []
    writes: list[MemoryAccess] = []
    for each in accesses:
        if each.error is not None:
            continue
        if each.write:
            writes.append(each)
        elif each.data is not None and not any(_overlap(each, write) for write in writes):
            reads.append(each)
    return tuple(reads), tuple(writes)


def _overlap(one: MemoryAccess, other: MemoryAccess) -> bool:
    return one.address < other.address + other.size and other.address < one.address + one.size
