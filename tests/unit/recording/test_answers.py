"""Guests that are answered from a recording: what is given again, to whom, and what is not."""

import anyio
import pytest

from vmibridge import BridgeHandler, BridgePacket, BridgeResponse, BridgeServer, OutcomeKind, method
from vmibridge.errors import BackendSpecError, RecordingReadError
from vmibridge.recording import Recorder
from vmibridge.recording.answers import RecordedAnswers, load_answers
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

MAGIC, NAME, ROOM = 0x1234, 0x1000, 0x2000
MEMORY = {NAME: b"name\0", ROOM: bytes(8)}


class Notes(BridgeHandler[str]):
    """Counts; writes what it reads; is slow, or fails, when it is asked to."""

    MAGIC, REQUEST, VERIFY_VALUE4 = MAGIC, 1, 0x44

    def __init__(self):
        self.count = 0

    @method(1)
    async def add(self, vmi, packet):
        self.count += 1
        return BridgeResponse(value1=self.count).with_output([self.count])

    @method(2)
    async def copy(self, vmi, packet):
        name = await vmi.memory.read(packet.value1, 4)
        await vmi.memory.write(packet.value2, name.upper())
        await vmi.memory.read(packet.value2, 4)
        return BridgeResponse(value1=len(name))

    @method(3, soft_timeout=0.01)
    async def slow(self, vmi, packet):
        await anyio.sleep(0.02)
        return BridgeResponse(value1=7)

    @method(4)
    async def fail(self, vmi, packet):
        raise OSError


def ask(code, *values):
    return BridgePacket(MAGIC, 1, code, *values)


async def add(vm, times=3):
    return [(await vm.call(ask(1, 5))).rax for _ in range(times)]


async def copy(vm):
    return (await vm.call(ask(2, NAME, ROOM))).rax


@pytest.fixture
def record(tmp_path):
    """Records what a guest asks; returns what was read of the file."""

    async def run(guest, in_flight=64, **options):
        path = tmp_path / "run.mcap"
        async with FakeGuest(guest, memory=MEMORY) as backend, Recorder(path, **options) as tap:
            server = BridgeServer(backend, Notes(), taps=[tap], in_flight=in_flight)
            async for _ in server.run():
                pass
        return load_answers(path)

    return run


async def played(loaded, guest, missing="fail", memory=MEMORY, vm="fake"):
    """The outcomes, the answers, and the backend."""
    async with FakeGuest(guest, memory=memory, vm=vm) as backend:
        answers = RecordedAnswers(loaded, missing)
        server = BridgeServer(backend, answers, handshake=False)
        outcomes = [outcome async for outcome in server.run()]
    return outcomes, answers, backend


async def test_requests_that_are_alike_get_the_answers_in_their_order(record):
    loaded = await record(add)
    got = []

    async def again(vm):
        got.extend(await add(vm))

    outcomes, answers, backend = await played(loaded, again)
    assert got == [1, 2, 3]
    assert [outcome.output for outcome in outcomes] == [[1], [2], [3]]
    assert {outcome.handler for outcome in outcomes} == {"notes"}
    assert backend.writes[1].rdx == 0x44
    told = "3 requests were answered from it, and 0 not in it; of 3 that it has, 0 were not used"
    assert answers.lines() == [f"{loaded.path}: {told}"]


async def test_one_that_is_asked_more_often_is_not_in_it(record, caplog):
    loaded = await record(add)
    outcomes, answers, _ = await played(loaded, lambda vm: add(vm, 4))
    assert outcomes[-1].kind is OutcomeKind.REJECTED
    assert answers.missing == 1
    assert answers.fails
    assert "asked more often than then, which was 3 times" in caplog.text


@pytest.mark.parametrize(
    ("packet", "why"),
    [
        (ask(1, 6), "asked with other values, or by another vCPU"),
        (ask(9), "nothing was asked of this method"),
    ],
)
async def test_another_request_is_not_in_it(record, packet, why):
    async def other(vm):
        await vm.call(packet)

    loaded = await record(add)
    outcomes, answers, _ = await played(loaded, other, "refuse")
    assert outcomes[0].error.endswith(why)
    assert not answers.fails
    assert "1 not in it; of 3 that it has, 3 were not used" in answers.lines()[0]


async def test_native_is_as_if_there_were_no_host(record):
    async def other(vm):
        assert await vm.call(ask(1, 6)) is None

    outcomes, _, _ = await played(await record(add), other, "native")
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.DENIED]


async def test_another_vcpu_has_answers_of_its_own(record):
    async def both(vm):
        for vcpu in (0, 1):
            await vm.call(ask(1, 5), vcpu=vcpu)

    async def second(vm):
        assert (await vm.call(ask(1, 5), vcpu=1)).rax == 2

    _, answers, _ = await played(await record(both), second)
    assert answers.missing == 0


async def test_guest_memory_is_compared_and_written(record):
    loaded = await record(copy)
    _, answers, backend = await played(loaded, copy)
    assert (answers.missing, backend.memory[ROOM][:4]) == (0, b"NAME")
    other = {NAME: b"nAme\0", ROOM: bytes(8)}
    outcomes, answers, backend = await played(loaded, copy, memory=other)
    assert (answers.missing, backend.memory[ROOM]) == (1, bytes(8))
    assert "guest memory differs at physical 0x1000" in outcomes[0].error
    gone, _, _ = await played(loaded, copy, memory={ROOM: bytes(8)})
    assert "guest memory differs at physical 0x1000" in gone[0].error


async def test_one_that_was_told_to_wait_gets_its_answer_at_once(record):
    async def waits(vm):
        while (await vm.call(ask(3))).rax == 1:
            await anyio.sleep(0.01)

    async def once(vm):
        assert (await vm.call(ask(3))).rax == 7

    _, answers, _ = await played(await record(waits), once)
    assert answers.missing == 0


async def test_nothing_is_missing_of_one_that_is_forgotten_and_asked_again(record):
    """It was answered WAIT before its handler had begun: the next one is a new request."""

    async def both(vm):
        async def ask_until_answered(vcpu):
            while (await vm.call(ask(3), vcpu=vcpu)).rax == 1:
                await anyio.sleep(0.01)

        async with anyio.create_task_group() as tasks:
            for vcpu in range(2):
                tasks.start_soon(ask_until_answered, vcpu)

    loaded = await record(both, in_flight=1)
    vm = loaded.vms["fake"]
    assert (vm.count, vm.unusable) == (2, {})


async def test_one_that_failed_fails_again(record):
    async def fails(vm):
        await vm.call(ask(4))

    outcomes, answers, _ = await played(await record(fails), fails)
    assert (outcomes[0].kind, outcomes[0].error) == (OutcomeKind.FAILED, "OSError: ")
    assert answers.missing == 0


@pytest.mark.parametrize(
    ("rule", "line"),
    [
        ("value1", "1 recorded request cannot be given: value1 was left out of the recording"),
        ("memory", "cannot be given: what it wrote was left out of the recording"),
    ],
)
async def test_what_was_left_out_is_told_and_not_given(record, rule, line):
    loaded = await record(copy, redact=[rule])
    outcomes, answers, _ = await played(loaded, copy)
    assert "nothing that can be given was asked of this method" in outcomes[0].error
    assert line in "\n".join(answers.lines())


async def test_a_vm_of_another_name_is_the_one_of_the_file_where_both_are_alone(record):
    loaded = await record(add)
    _, answers, _ = await played(loaded, add, vm="other")
    assert answers.missing == 0
    with pytest.raises(BackendSpecError, match="has no VM other, but fake"):
        RecordedAnswers(loaded, alone=False)("other")


async def test_a_file_that_is_cut_answers_what_it_has(record, tmp_path):
    loaded = await record(add)
    cut = tmp_path / "cut.mcap"
    cut.write_bytes(loaded.path.read_bytes()[:-200])
    read = load_answers(cut)
    _, answers, _ = await played(read, add)
    assert answers.missing == 0
    assert "is truncated" in read.problems[-1]


async def test_a_file_without_a_request_is_refused(record):
    async def nothing(vm):
        pass

    with pytest.raises(RecordingReadError, match="there is no request in it"):
        await record(nothing)


async def test_what_is_kept_is_bounded(record, monkeypatch):
    monkeypatch.setattr("vmibridge.recording.answers.load._MAX_REQUESTS", 2)
    with pytest.raises(RecordingReadError, match="has more than 2 requests"):
        await record(add)
