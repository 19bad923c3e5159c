"""The host's end of ivshmem-doorbell, with a guest that is a few lines of Python."""

import os
import socket
from contextlib import asynccontextmanager, suppress

import anyio
import pytest
from base_handlers import EchoHandler, StandardHandler
from fuzzing import fuzzing
from ivshmem_guest import NUMBER, ivshmem_guest
from waiting import until

from vmibridge import Bridge, BridgeResponse, BridgeServer, method, open_backend
from vmibridge.backends.device.ivshmem import GUEST, HOST, greeting
from vmibridge.backends.device.slots import (
    FLAG_INTERRUPT,
    PAYLOAD_AT,
    STATE_ANSWERED,
    STATE_IDLE,
    STATE_TAKEN,
    STATE_UNMATCHED,
    slot_offset,
)
from vmibridge.errors import BackendError, BackendSpecError

SLOTS = 3
REQUEST, SLOW, STRANGE = 0x0100, 0x0101, 0x0199
STAMPS = (0x213353522D494D56, 0x213453522D494D56)


class Slow(StandardHandler):
    """Answers when it is told to."""

    REQUEST = SLOW

    def __init__(self):
        self.entered = self.cancelled = 0
        self.go_on = anyio.Event()

    @method(1)
    async def wait_for_it(self, vmi, packet):
        self.entered += 1
        try:
            await self.go_on.wait()
        except BaseException:
            self.cancelled += 1
            raise
        return BridgeResponse(7)


class Host:
    """A server and what became of its calls."""

    def __init__(self, backend, path):
        self.path, self.slow, self.outcomes = path, Slow(), []
        self.server = BridgeServer(backend, Bridge(EchoHandler(), self.slow), timeout=60)

    async def run(self):
        async for outcome in self.server.run():
            self.outcomes.append(outcome.kind.value)

    @property
    def end(self):
        return [(end.reason, end.detail) for end in self.server.summary.guest.vcpus]


@pytest.fixture
def serving(tmp_path):
    """`async with serving() as host`: at the end of the block it is waited for."""

    @asynccontextmanager
    async def serve(options=""):
        path = tmp_path / "s"
        async with open_backend(f"ivshmem:unix:{path}?slots={SLOTS}{options}") as backend:
            host = Host(backend, path)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(host.run)
                yield host

    return serve


def test_the_greeting_has_each_descriptor_with_the_id_that_it_is_of():
    numbers = [(NUMBER.unpack(data)[0], fd) for data, fd in greeting(9, [1, 2], [3, 4])]
    assert numbers == [
        (0, None), (GUEST, None), (-1, 9), (HOST, 1), (HOST, 2), (GUEST, 3), (GUEST, 4),
    ]  # fmt: skip


@pytest.mark.anyio
async def test_each_slot_calls_and_gets_its_own_answer(serving):
    async with serving() as host, ivshmem_guest(host.path, SLOTS) as guest:
        assert guest.numbers == [0, 0, -1, 1, 1, 1, 0, 0, 0]
        assert guest.header()[:4] == (0x42494D56, 1, SLOTS, 4096)
        for slot in range(SLOTS):
            state, values = await guest.call(slot, REQUEST, values=(slot, 1, 2, 3))
            assert (state, values) == (STATE_ANSWERED, (~slot & (1 << 64) - 1, 6, *STAMPS))
    assert (host.outcomes, host.end) == (
        ["handled"] * SLOTS,
        [("halted", "QEMU has hung up")] * SLOTS,
    )


@pytest.mark.anyio
async def test_calls_of_several_slots_do_not_wait_for_each_other(serving):
    async with serving() as host, ivshmem_guest(host.path, SLOTS) as guest:
        guest.write(0, SLOW)
        guest.ring(0)
        assert await guest.reaches(0, STATE_TAKEN)
        assert (await guest.call(1, REQUEST))[0] == STATE_ANSWERED
        host.slow.go_on.set()
        await guest.reaches(0, STATE_ANSWERED)
        assert guest.call_in(0)[3] == 7


@pytest.mark.anyio
async def test_a_call_that_is_nobodys_is_unmatched_and_its_values_stay(serving):
    async with serving() as host, ivshmem_guest(host.path, SLOTS) as guest:
        state, values = await guest.call(0, STRANGE, values=(1, 2, 3, 4))
        assert (state, values) == (STATE_ANSWERED, (1, 2, 3, 4))
        guest.write(1, REQUEST)
        guest.memory[slot_offset(1)] ^= 1  # another magic, which no handler has
        guest.ring(1)
        assert await guest.reaches(1, STATE_UNMATCHED)
    assert host.outcomes == ["unmatched"]


@pytest.mark.anyio
async def test_the_interrupt_comes_to_those_who_want_it(serving):
    async with serving() as host, ivshmem_guest(host.path, SLOTS) as guest:
        await guest.call(0, REQUEST)
        await guest.call(1, REQUEST, flags=FLAG_INTERRUPT)
        with anyio.fail_after(60):
            await anyio.wait_readable(guest.interrupts[1])
        assert os.eventfd_read(guest.interrupts[1]) == 1
        with pytest.raises(BlockingIOError):
            os.eventfd_read(guest.interrupts[0])


@pytest.mark.anyio
async def test_a_call_is_taken_once_however_often_it_is_rung_for(serving):
    async with serving() as host, ivshmem_guest(host.path, SLOTS) as guest:
        guest.write(0, SLOW)
        for _ in range(5):
            guest.ring(0)
        await guest.reaches(0, STATE_TAKEN)
        guest.ring(0)
        guest.ring(1)  # there is nothing in it
        host.slow.go_on.set()
        await guest.reaches(0, STATE_ANSWERED)
        guest.ring(0)
        assert (await guest.call(2, REQUEST))[0] == STATE_ANSWERED
        assert guest.state(1) == STATE_IDLE
    assert (host.slow.entered, host.outcomes) == (1, ["handled", "handled"])


@pytest.mark.anyio
async def test_a_call_that_is_given_up_is_cancelled_and_frees_its_slot(serving):
    async with serving() as host, ivshmem_guest(host.path, SLOTS) as guest:
        number = guest.write(0, SLOW)
        guest.ring(0)
        await guest.reaches(0, STATE_TAKEN)
        guest.cancel(0, number + 1)  # of another call
        assert (await guest.call(1, REQUEST))[0] == STATE_ANSWERED
        assert guest.state(0) == STATE_TAKEN
        guest.cancel(0, number)
        await guest.reaches(0, STATE_UNMATCHED, STATE_ANSWERED)
        assert (await guest.call(0, REQUEST))[0] == STATE_ANSWERED
    assert (host.slow.cancelled, host.outcomes) == (1, ["handled", "cancelled", "handled"])


@pytest.mark.anyio
async def test_a_handler_reaches_the_payload_and_nothing_else(serving):
    async with serving() as host, ivshmem_guest(host.path, SLOTS) as guest:
        at = slot_offset(1) + PAYLOAD_AT
        guest.memory[at : at + 8] = b"12345678"
        state, _ = await guest.call(1, REQUEST, 2, (PAYLOAD_AT, PAYLOAD_AT + 8, 8, 0))
        assert (state, guest.memory[at + 8 : at + 16]) == (STATE_ANSWERED, b"87654321")
        for address, size in ((PAYLOAD_AT - 1, 8), (4092, 8), (1 << 63, 8), (PAYLOAD_AT, 4096)):
            await guest.call(1, REQUEST, 2, (address, PAYLOAD_AT, size, 0))
            await guest.call(1, REQUEST, 2, (PAYLOAD_AT, address, 8, 0))
        # Without the space of the slot there is no memory at all.
        await guest.call(1, REQUEST, 2, (PAYLOAD_AT, PAYLOAD_AT + 8, 8, 0), space=0)
        await guest.call(1, REQUEST, 2, (PAYLOAD_AT, PAYLOAD_AT + 8, 8, 0), space=0x1000)
    assert host.outcomes[0] == "handled"
    assert set(host.outcomes[1:]) == {"failed", "handled"}
    assert host.outcomes[-2:] == ["failed", "failed"]


@pytest.mark.anyio
async def test_a_guest_that_ends_with_an_open_call_is_lost_and_its_handler_cancelled(serving):
    async with serving() as host, ivshmem_guest(host.path, SLOTS) as guest:
        guest.write(0, SLOW)
        guest.ring(0)
        await guest.reaches(0, STATE_TAKEN)
    assert host.slow.cancelled == 1
    assert host.end == [("lost", "QEMU has hung up, with a call that was not answered")]


@pytest.mark.anyio
async def test_a_host_that_stops_answers_open_calls_and_says_that_it_is_gone(serving):
    async with serving() as host, ivshmem_guest(host.path, SLOTS) as guest:
        guest.write(0, SLOW)
        guest.ring(0)
        await guest.reaches(0, STATE_TAKEN)
        host.server.stop()
        await guest.reaches(0, STATE_ANSWERED, STATE_UNMATCHED)
        assert (await until(lambda: guest.header()[8] == 0)) is None
    assert host.end == [("stopped", "QEMU has hung up")]


@pytest.mark.anyio
async def test_a_second_guest_is_refused_and_the_next_one_starts_over(serving, caplog):
    async with serving("&stay=true") as host:
        async with ivshmem_guest(host.path, SLOTS) as guest:
            with pytest.raises(AssertionError, match="the server has hung up"):
                async with ivshmem_guest(host.path, SLOTS):
                    pass
            assert "turned away another QEMU" in caplog.text
            await guest.call(0, REQUEST)
            generation = guest.header()[8]
        await anyio.sleep(0)
        async with next_guest(host.path) as guest:
            assert guest.state(0) == STATE_IDLE
            assert guest.header()[8] != generation
            assert (await guest.call(0, REQUEST))[0] == STATE_ANSWERED
        host.server.stop()
    assert host.outcomes == ["handled", "handled"]


@pytest.mark.anyio
async def test_who_only_connects_does_not_end_the_run(serving):
    async with serving() as host:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(str(host.path))
        async with next_guest(host.path) as guest:
            assert (await guest.call(0, REQUEST))[0] == STATE_ANSWERED
    assert host.end == [("halted", "QEMU has hung up")]


@asynccontextmanager
async def next_guest(path):
    """A guest as soon as the one before is forgotten."""
    while True:
        try:
            async with ivshmem_guest(path, SLOTS) as guest:
                yield guest
            return
        except AssertionError as error:
            if "hung up" not in str(error):
                raise
        await anyio.sleep(0.001)


def touch_at_random(random, guest):
    """Mutate one thing of a guest's memory, its doorbells or its interrupts."""
    slot = random.randrange(SLOTS)
    match random.randrange(8):
        case 0:
            guest.memory[random.randrange(len(guest.memory))] = random.randrange(256)
        case 1:
            guest.memory[8 * random.randrange(1024)] ^= 1 << random.randrange(8)
        case 2 | 3:
            at = slot_offset(slot) + random.randrange(64)
            guest.memory[at : at + 8] = random.randbytes(8)
        case 4:
            guest.write(slot, REQUEST, random.randrange(4), flags=random.randrange(256))
        case 5:
            guest.cancel(slot, random.choice((0, 1, random.getrandbits(32))))
        case 6:
            os.eventfd_write(guest.doorbells[slot], random.randrange(1, 1000))
        case _:
            with suppress(BlockingIOError):
                # What the host signals with is the guest's as well.
                os.eventfd_write(guest.interrupts[slot], (1 << 63) - 1)
            guest.ring(slot)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "rounds", [300, pytest.param(1_000_000, marks=[pytest.mark.slow, pytest.mark.no_cover])]
)
async def test_what_guests_write_into_their_slots_raises_nothing(serving, rounds):
    """Random bytes in slots and doorbells, with rings in between; then it serves as before."""
    async with serving() as host, ivshmem_guest(host.path, SLOTS) as guest:
        host.slow.go_on.set()
        with fuzzing() as random:
            for _ in range(rounds):
                touch_at_random(random, guest)
                if random.random() < 0.25:
                    await anyio.sleep(0)
        for slot in range(SLOTS):
            guest.write(slot, REQUEST)
            guest.ring(slot)
        await until(lambda: all(guest.state(each) not in (1, 3) for each in range(SLOTS)))
        for slot in range(SLOTS):
            # By chance the number of the first may be that of the last random one.
            await guest.call(slot, REQUEST)
            assert (await guest.call(slot, REQUEST))[0] == STATE_ANSWERED
    assert host.outcomes.count("handled") >= SLOTS


@pytest.mark.anyio
@pytest.mark.parametrize("guests", [20, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_who_talks_or_goes_in_the_greeting_does_no_harm(serving, guests):
    """The device says nothing; what does say something gets the slots, and no more. A hundred
    mutations each: bytes, and how much of the greeting is read before the end."""
    async with serving("&stay=true") as host:
        with fuzzing() as random:
            for _ in range(guests):
                with socket.socket(socket.AF_UNIX) as stranger:
                    stranger.connect(str(host.path))
                    stranger.setblocking(False)
                    for _ in range(random.randrange(1 + 2 + 2 * SLOTS)):
                        await anyio.wait_readable(stranger)
                        data, passed, _, _ = socket.recv_fds(stranger, NUMBER.size, 1)
                        for each in passed:
                            os.close(each)
                        if not data:
                            break
                    with suppress(ConnectionError):
                        stranger.send(random.randbytes(100))
        async with next_guest(host.path) as guest:
            assert (await guest.call(0, REQUEST))[0] == STATE_ANSWERED
        host.server.stop()
    assert host.outcomes == ["handled"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ivshmem:", "ivshmem: needs the path of a socket, as in ivshmem:unix:/run/vmibridge.sock"),
        ("ivshmem:tcp:h:1", "ivshmem: needs the path of a socket"),
        ("ivshmem:unix:s?slots=0", "slots=0 is not a whole number, 1 to 256"),
        ("ivshmem:unix:s?slots=257", "slots=257 is not a whole number, 1 to 256"),
        ("ivshmem:unix:s?slots=few", "slots=few is not a number"),
        ("ivshmem:unix:s?mode=600", "mode=600 is not the mode of a file"),
        ("ivshmem:unix:s?hold=2ms", "no option 'hold'"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(spec, message):
    with pytest.raises(BackendSpecError, match=message.replace("?", r"\?")):
        open_backend(spec)


@pytest.mark.anyio
async def test_a_memory_file_that_cannot_be_made_is_said_before_a_guest_comes(tmp_path):
    memory = tmp_path / "none/m"
    with pytest.raises(BackendError, match=r"memory=.*/none/m: there is no folder .*/none$"):
        async with open_backend(f"ivshmem:unix:{tmp_path / 's'}?memory={memory}"):
            pass
    (tmp_path / "none").mkdir()
    async with open_backend(f"ivshmem:unix:{tmp_path / 's'}?memory={memory}"):
        assert not memory.exists(), "QEMU makes it"


@pytest.mark.anyio
async def test_a_socket_that_cannot_be_had_is_said(tmp_path):
    (tmp_path / "s").write_text("")
    with pytest.raises(BackendError, match=r"ivshmem:unix:.*/s: exists, and is not a socket"):
        async with open_backend(f"ivshmem:unix:{tmp_path / 's'}"):
            pass
