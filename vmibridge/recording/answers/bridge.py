"""What answers a guest of now with the answers of then: a bridge without handlers.

A request of now is answered as the first one of the recording that was not used yet and has in
common with it

- the vCPU, the magic, the codes of request and method, and the four values,
- what was read of guest memory for it, at the same physical addresses.

So it is of use for a guest that does the same in the same places each time, such as one in Unicorn.
What was written into the guest then is written again, and the registers get what they got.

Two things of memory are not compared: what was left out of the recording, and in entries of page
tables the bits which the processor sets by itself (accessed, dirty).
"""

import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Literal, TypeAlias

import msgspec

from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.contract import BridgeContract
from vmibridge.bridge.dispatch import BridgeDispatch
from vmibridge.bridge.guest_exit import GuestExit
from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.response import BridgeResponse
from vmibridge.errors import BackendSpecError, GuestMemoryError
from vmibridge.recording.answers.load import Answer, Loaded, RequestKey, VmAnswers
from vmibridge.recording.messages import MemoryAccess, Reply
from vmibridge.text import counted, printable

__all__ = ["AnsweredFromRecording", "Missing", "RecordedAnswers"]

log: logging.Logger = logging.getLogger(__name__)

Missing: TypeAlias = Literal["fail", "refuse", "native"]
"""What a request gets that is not in the recording: the fallback, and the run fails in the end; the
fallback; or the instruction as if there were no host."""

_MAX_COMPARED = 1000
"""Recorded requests that one of now is compared with."""
_MAX_TOLD = 20
"""Requests that are told one by one."""
_ENTRY_SIZES = (4, 8)
_SET_BY_PROCESSOR = 0x60
"""Accessed and dirty, in an entry of a page table (Intel SDM volume 3, chapter 5)."""


class RecordedAnswers:
    """The answers of one recording, for all VMs of a run: what a server takes as its bridge."""

    def __init__(self, loaded: Loaded, missing: Missing = "fail", *, alone: bool = True) -> None:
        """`alone`: the run has one VM; then it may have another name than the one of the file."""
        self._loaded = loaded
        self._missing: Missing = missing
        self._alone = alone
        self._made: list[AnsweredFromRecording] = []

    def __call__(self, vm: str) -> "AnsweredFromRecording":
        """What answers a VM. Raises `BackendSpecError` where the file has none of this name."""
        vms = self._loaded.vms
        name = next(iter(vms)) if self._alone and len(vms) == 1 and vm not in vms else vm
        if name not in vms:
            there = ", ".join(map(printable, sorted(vms)))
            raise BackendSpecError(
                f"{self._loaded.path}: has no VM {printable(vm)}, but {there}: name the VM so,"
                " as in --backend NAME=SPEC"
            )
        made = AnsweredFromRecording(str(self._loaded.path), vms[name], self._missing)
        self._made.append(made)
        return made

    @property
    def missing(self) -> int:
        """Requests that were not in the recording."""
        return sum(each.missing for each in self._made)

    @property
    def fails(self) -> bool:
        """Whether such a request makes the run fail."""
        return self._missing == "fail"

    def lines(self) -> list[str]:
        """What came of it."""
        path, vms = self._loaded.path, self._loaded.vms.values()
        answered = sum(each.answered for each in self._made)
        unused = sum(vm.count for vm in vms) - answered
        line = (
            f"{path}: {counted(answered, 'request was', 'requests were')} answered from it, and"
            f" {self.missing} not in it; of {answered + unused} that it has, {unused}"
            f" {'was' if unused == 1 else 'were'} not used"
        )
        unusable: dict[str, int] = {}
        for vm in vms:
            for why, count in vm.unusable.items():
                unusable[why] = unusable.get(why, 0) + count
        return [
            line,
            *(
                f"{path}: {counted(count, 'recorded request')} cannot be given"
                f"{'' if count == 1 else ', of each of which the reason is'}: {why}"
                for why, count in unusable.items()
            ),
        ]


class AnsweredFromRecording(BridgeDispatch):
    """Answers one VM. For one run."""

    def __init__(self, path: str, answers: VmAnswers, missing: Missing) -> None:
        self.answered: int = 0
        self.missing: int = 0
        self.ANY_CPUID = answers.any_cpuid  # type: ignore[misc]
        self._path = path
        self._answers = answers
        self._policy: Missing = missing
        self._unused: dict[RequestKey, deque[Answer]] = {}
        # By request, magic and codes alone: to say what is different.
        self._near: dict[tuple[int, int, int], int] = {}
        for _, packet in answers.by_request:
            near = (packet.magic, packet.request, packet.method)
            self._near[near] = self._near.get(near, 0) + 1

    def contracts(self) -> Sequence[BridgeContract]:
        """Those of the recorded handlers, and of what was answered without one."""
        handlers = [each for session in self._answers.sessions for each in session.handlers]
        found = {BridgeContract(each.request, each.magic): None for each in handlers}
        if not handlers:
            for _, packet in self._answers.by_request:
                found[BridgeContract(packet.request, packet.magic)] = None
        return list(found)

    async def dispatch(self, vmi: BridgeContext, packet: BridgePacket) -> Outcome[Any]:
        """The answer of then."""
        key = vmi.vcpu, packet
        several = self._answers.by_request.get(key, ())
        unused = self._unused.get(key)
        if unused is None and several:
            unused = self._unused[key] = deque(several)
        differs: MemoryAccess | None = None
        for answer in list(islice(unused or (), _MAX_COMPARED)):
            found = await _different_read(vmi, answer.reads)
            if found is None:
                assert unused is not None
                unused.remove(answer)
                return await self._give(vmi, packet, answer)
            differs = differs or found
        return self._miss(vmi, packet, len(several), differs)

    async def _give(self, vmi: BridgeContext, packet: BridgePacket, answer: Answer) -> Outcome[Any]:
        for write in answer.writes:
            assert write.data is not None
            await vmi.memory.write_physical(write.address, write.data)
        self.answered += 1
        reply = answer.reply
        if reply.kind is not OutcomeKind.HANDLED or reply.writes is None:
            return Outcome(reply.kind, packet, handler=reply.handler, error=reply.error)
        response: BridgeResponse[Any] = BridgeResponse(*reply.writes.values)
        if reply.output is not None:
            response = response.with_output(_output(reply))
        return Outcome(OutcomeKind.HANDLED, packet, response, reply.handler)

    def _miss(
        self, vmi: BridgeContext, packet: BridgePacket, same: int, differs: MemoryAccess | None
    ) -> Outcome[Any]:
        self.missing += 1
        why = self._why(packet, same, differs)
        if self.missing <= _MAX_TOLD:
            values = ", ".join(f"{value:#x}" for value in packet.values)
            log.warning(
                "vm %s vcpu %d: not in %s: %08x/%04x/%04x (%s): %s%s",
                *(vmi.vm, vmi.vcpu, self._path, packet.magic, packet.request, packet.method),
                values,
                why,
                "; further ones are counted only" if self.missing == _MAX_TOLD else "",
            )
        kind = OutcomeKind.DENIED if self._policy == "native" else OutcomeKind.REJECTED
        return Outcome(kind, packet, error=f"not in {self._path}: {why}")

    def _why(self, packet: BridgePacket, same: int, differs: MemoryAccess | None) -> str:
        if differs is not None:
            return f"guest memory differs at physical {differs.address:#x}"
        if same:
            return f"asked more often than then, which was {counted(same, 'time')}"
        if (packet.magic, packet.request, packet.method) in self._near:
            return "asked with other values, or by another vCPU"
        given = "that can be given " if self._answers.unusable else ""
        return f"nothing {given}was asked of this method"


def _output(reply: Reply) -> object:
    assert reply.output is not None
    # By the name of the ready-made handler: a recording does not say what an output was made of.
    if reply.handler == "exit":
        with suppress(msgspec.MsgspecError, ValueError, TypeError, RecursionError):
            return msgspec.json.decode(reply.output, type=GuestExit)
    with suppress(msgspec.DecodeError, RecursionError):
        return msgspec.json.decode(reply.output)
    return reply.output


async def _different_read(vmi: BridgeContext, reads: Sequence[MemoryAccess]) -> MemoryAccess | None:
    """The first that reads something else now; `None`: all are the same."""
    for read in reads:
        assert read.data is not None
        try:
            data = await vmi.memory.read_physical(read.address, read.size)
        except GuestMemoryError:
            return read
        if data != read.data and not _is_same_entry(data, read.data):
            return read
    return None


def _is_same_entry(one: bytes, other: bytes) -> bool:
    if len(one) not in _ENTRY_SIZES:
        return False
    differing = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    return not differing & ~_SET_BY_PROCESSOR
