"""What is accepted of requests that were told to wait, then or now."""

import gc

import anyio
import pytest
from changed_parts import accept, assert_accesses_are_of_open_traps, replay
from determinism_parts import MAGIC, ask, call, record

from vmibridge import Bridge, BridgeHandler, BridgeResponse, method
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import Note, Reply, Step
from vmibridge.recording.replay import accept_messages
from vmibridge.recording.replay.accepted import Accepted
from vmibridge.recording.replay.request import ReplayedRequest
from vmibridge.recording.traps import recorded_traps
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

LOOPS = ["asyncio", "trio"]
FIRST, PATIENT, CUT_OFF = 1, 2, 3
"""Methods: one that has the only place, and two whose guests get WAIT; one of them is cut off when
that takes long."""


class Slow(BridgeHandler[object]):
    """Its first method takes so many milliseconds, which are in each output."""

    MAGIC, REQUEST = MAGIC, 1

    def __init__(self, first):
        self.first = first
        self.count = 0

    def answer(self):
        self.count += 1
        return BridgeResponse(value1=0x100 + self.count).with_output([self.count, self.first])

    @method(FIRST, timeout=600)
    async def has_the_place(self, vmi, packet):
        await anyio.sleep(self.first / 1e3)
        return self.answer()

    @method(PATIENT, soft_timeout=0.007, timeout=600)
    async def is_told_to_wait(self, vmi, packet):
        await anyio.sleep(0.012)
        return self.answer()

    @method(CUT_OFF, soft_timeout=0.007)
    async def is_cut_off(self, vmi, packet):
        return await self.is_told_to_wait(vmi, packet)


def guest(code):
    """A guest that asks for the place, then for this method."""

    async def run(vm):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call, vm, ask(FIRST), 0)
            await anyio.sleep(0.0005)
            await call(vm, ask(code), 1)

    return run


def messages(path):
    with RecordingReader(path) as reader:
        return [message for _, message in reader.messages()]


def accepted(folder, code, then, now, loop):
    """Record with the one handler, accept the answers of the other; the messages of both."""
    first, second, third = (folder / f"{name}.mcap" for name in "abc")
    guests = {"vm": guest(code)}
    record(first, guests, lambda _: Bridge(Slow(then)), loop, virtual=True, in_flight=1)
    accept(first, second, ["vm"], lambda _: Bridge(Slow(now)), loop)
    for other in LOOPS:
        differences = []
        replay(second, ["vm"], lambda _: Bridge(Slow(now)), other, differences=differences)
        assert differences == []
    assert accept(second, third, ["vm"], lambda _: Bridge(Slow(now)), loop)[0] == 0
    assert third.read_bytes() == second.read_bytes()
    return messages(first), messages(second)


def replies(found, code):
    return [each for each in found if isinstance(each, Reply) and each.packet.method == code]


def has_retry(found):
    return any(isinstance(each, Note) and each.kind == "retry" for each in found)


def steps_of(found, seq):
    return [each.kind for each in found if isinstance(each, Step) and each.seq == seq]


@pytest.mark.parametrize("loop", LOOPS)
def test_the_retry_of_a_request_that_has_not_begun_at_its_wait_is_a_new_request(tmp_path, loop):
    """The server forgets it, so the trap that asked again then is that of a new request now."""
    then, now = accepted(tmp_path, PATIENT, 1, 100_000, loop)
    first, last = replies(then, PATIENT)
    assert has_retry(then)
    assert "began" in steps_of(then, first.seq)
    assert not has_retry(now)
    assert [(each.kind, each.retry_of) for each in replies(now, PATIENT)] == [
        (first.kind, None),
        (last.kind, None),
    ]
    assert steps_of(now, first.seq) == ["queued", "parked"]
    assert steps_of(now, last.seq) == ["resumed", "ended"]


@pytest.mark.parametrize("loop", LOOPS)
def test_what_is_cut_off_before_it_was_told_to_wait(tmp_path, loop):
    then, now = accepted(tmp_path, CUT_OFF, 1, 20_000, loop)
    first, _ = replies(then, CUT_OFF)
    assert has_retry(now)
    assert [each.kind.value for each in replies(now, CUT_OFF)] == ["waiting", "timeout"]
    assert steps_of(now, first.seq) == ["queued", "cut off", "parked"]


@pytest.mark.parametrize("loop", LOOPS)
def test_what_was_told_to_wait_before_it_began_and_is_so_now(tmp_path, loop):
    then, now = accepted(tmp_path, PATIENT, 30, 31, loop)
    waits = replies(then, PATIENT)[:-1]
    assert len(waits) > 1
    assert replies(now, PATIENT)[:-1] == waits


class Writes(BridgeHandler[object]):
    """It writes when its guest has asked again."""

    MAGIC, REQUEST = MAGIC, 1

    def __init__(self, data):
        self.data = data

    @method(1, soft_timeout=0.002)
    async def write(self, vmi, packet):
        await vmi.memory.read(0x1000, 4)
        await anyio.sleep(0.01)
        await vmi.memory.write(0x1010, self.data)
        return BridgeResponse(value1=7)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_access_names_the_trap_that_waits_for_its_answer(tmp_path, loop):
    """So `inspect`, an export, a comparison and `run --answers` find it there."""
    first, second = tmp_path / "a.mcap", tmp_path / "b.mcap"
    guests = {"vm": lambda vm: call(vm, ask(1), 0)}
    record(first, guests, lambda _: Bridge(Writes(b"then")), loop, virtual=True)
    assert accept(first, second, ["vm"], lambda _: Bridge(Writes(b"now!")), loop)[0] == 1
    found = []
    for path in (first, second):
        assert_accesses_are_of_open_traps(path)
        with RecordingReader(path) as reader:
            traps = list(recorded_traps(reader.messages()))
        writes = [(trap.event.seq, each.data) for trap in traps for each in trap.accesses]
        found.append([each for each in writes if each[1] in (b"then", b"now!")])
    (then,), (now,) = found
    assert then[0] == now[0] > 1
    assert (then[1], now[1]) == (b"then", b"now!")


def test_what_is_told_to_wait_and_never_asked_for_again_is_forgotten():
    count = 20_000
    accepted = Accepted()
    place = 0
    accepted.journal.join("vm", "vm", lambda: place, int, has_steps=True)
    found = []
    for seq in range(1, count + 1):
        event = TrapEvent(seq, TrapReason.VMCALL, Registers(), "vm")
        accepted.journal.ask(ReplayedRequest(event, 0, strict=False))
        place += 2
        found += [(0, event), (0, Reply("vm", seq, 0, OutcomeKind.WAITING, ask(PATIENT)))]
    known = []
    for number, (_, message) in enumerate(accept_messages.accepted_messages(found, accepted)):
        assert message is found[number][1]
        if message.seq == count:
            known.append(sum(type(each) is accept_messages._Open for each in gc.get_objects()))
    assert len(known) == 2
    assert max(known) < count
