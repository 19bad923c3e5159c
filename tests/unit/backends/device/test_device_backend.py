"""The backend against a QEMU that is played: who answers an access, when, and what never goes."""

import fcntl
import os
import struct
import threading
import time

import anyio
import pytest
from served_device import beside, called, serving
from vfio_client import dma_map, dma_unmap, message, read, set_irqs
from waiting import until

from vmibridge.backends.device import slots, vfio_user
from vmibridge.backends.device.memory import read_piece
from vmibridge.errors import BackendError, GuestMemoryError

pytestmark = pytest.mark.anyio


async def test_the_answer_is_in_the_slot_when_its_access_is_answered(tmp_path):
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            client.ring(3, 9)
            event = await called(served)
            assert (event.reason.value, event.vcpu, event.ring, event.ip, event.length) == (
                *("device", 3, 3, 0, 0),
            )
            registers = event.registers
            assert (registers.rcx, registers.rdx, registers.r8, registers.r11) == (
                *(0x42494D56, 0x20007, 11, 14),
            )
            assert client.state(3) == slots.STATE_CALLED
            await served.answer(5, None, 6)
            assert (await beside(client.receive)).number == 100
            assert client.state(3) == slots.STATE_ANSWERED
            at = slots.slot_offset(3)
            assert struct.unpack_from("<4Q", client.memory, at + 8) == (5, 12, 6, 14)


async def test_an_access_is_held_no_longer_than_hold_and_the_answer_is_announced(tmp_path):
    async with serving(tmp_path, "hold=1ms") as served:
        with await served.connect() as client:
            event = os.eventfd(0)
            await beside(client.ask, set_irqs(1, 0x24, 0, 1), [event])
            client.ring(flags=slots.FLAG_INTERRUPT)
            await called(served)
            assert (await beside(client.receive)).number == 100
            assert client.state() == slots.STATE_TAKEN
            assert served.connection.released == 1
            await served.answer(1)
            assert client.state() == slots.STATE_ANSWERED
            assert os.eventfd_read(event) == 1
            os.close(event)


async def test_a_loop_that_stands_still_holds_no_access(tmp_path):
    async with serving(tmp_path, "hold=1ms") as served:
        with await served.connect() as client:

            def guest():
                for slot in range(3):
                    client.ring(slot)
                    client.receive()
                client.ask(vfio_write(slots.doorbell_offset(1) + slots.DOORBELL_CANCEL, 1))
                client.ask(read(0, 4, 7))

            thread = threading.Thread(target=guest)
            thread.start()
            thread.join(20)
            assert not thread.is_alive(), "answered while nothing here was awaited"
            assert [client.state(slot) for slot in range(3)] == [slots.STATE_TAKEN] * 3
            assert not served.sink.events
            await until(lambda: len(served.sink.events) == 3)
            assert [event.vcpu for event in served.sink.abandoned] == [1]
            for event in served.sink.events:
                await served.answer(1, event=event)
            assert [client.state(slot) for slot in range(3)] == [slots.STATE_ANSWERED] * 3


async def test_a_reply_that_may_come_too_late_is_never_sent(tmp_path):
    # A second: so is the reply to the greeting never sent, on a machine that stands still so long.
    async with serving(tmp_path, "hold=1ms&timeout=1s") as served:
        with await served.connect() as client:
            # As if this process had been stopped: neither the loop nor the thread goes on.
            with served.connection.lock:
                client.ring()
                client.send(read(0, 4, 7, number=8))
                time.sleep(1.1)
            await called(served)
            assert client.state() == slots.STATE_TAKEN
            # QEMU goes on to ask, and is answered.
            assert (await beside(client.ask, read(0, 4, 7, number=9))).number == 9
            await served.answer(1)
            assert client.state() == slots.STATE_ANSWERED
            assert (await beside(client.ask, read(0, 4, 7, number=10))).number == 10


async def test_a_reset_abandons_what_is_open_and_its_answer_goes_nowhere(tmp_path):
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            generation = client.generation
            client.ring()
            event = await called(served)
            client.send(message(vfio_user.RESET, number=7))
            numbers = {(await beside(client.receive)).number for _ in range(2)}
            assert numbers == {100, 7}
            assert served.sink.abandoned == [event]
            assert client.generation != generation
            await served.answer(1)
            assert client.state() == slots.STATE_IDLE
            client.ring(0, 1, message_number=101)
            await called(served)


async def test_a_cancel_abandons_the_call_that_it_names_and_no_other(tmp_path):
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            client.ring(0, 5)
            event = await called(served)
            for number in (4, 5, 5):
                at = slots.doorbell_offset(0) + slots.DOORBELL_CANCEL
                await beside(client.ask, vfio_write(at, number))
            assert served.sink.abandoned == [event]
            await served.answer(1)
            assert (await beside(client.receive)).number == 100


def vfio_write(at, number):
    body = vfio_user.ACCESS.pack(at, 0, 4) + number.to_bytes(4, "little")
    return message(vfio_user.WRITE, body)


async def test_a_stop_leaves_state_4_and_no_generation(tmp_path):
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            client.ring(1)
            await called(served)
            # Not rung for yet.
            client.fill(2)
            served.backend.stop()
            assert (await beside(client.receive)).number == 100
            with pytest.raises(EOFError):
                await beside(client.receive)
            assert [client.state(1), client.state(2)] == [slots.STATE_UNMATCHED] * 2
            assert client.generation == 0
            with pytest.raises(BackendError):
                await served.answer(1)
    assert [(each.vcpu, each.reason) for each in served.end.vcpus] == [(1, "stopped")]


async def test_what_is_unread_at_the_end_does_not_reset_the_connection(tmp_path):
    """QEMU 11.1.3 aborts when its connection is reset."""
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            reading, writing = os.pipe()
            with served.connection.lock:
                client.send(read(0, 4, 7) * 300)
                client.send(dma_map(0, 0x1000), [writing])
                client.send(read(0, 4, 7))
                os.close(writing)
            served.backend.stop()
            await until(lambda: served.end is not None)
            with pytest.raises(EOFError):
                while True:
                    await beside(client.receive)
            assert os.read(reading, 1) == b"", "its descriptors are closed, too"
            os.close(reading)


async def test_what_is_not_ours_is_not_taken(tmp_path):
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            client.ring(magic=0x1234)
            await beside(client.receive)
            assert client.state() == slots.STATE_UNMATCHED
            assert not served.sink.events


async def test_a_full_queue_holds_its_caller_and_a_closed_one_lets_it_go(tmp_path):
    async with serving(tmp_path, "hold=1ms") as served:
        with await served.connect() as client:
            served.sink.has_room = False
            client.ring(0)
            client.ring(1, message_number=101)
            assert {(await beside(client.receive)).number for _ in range(2)} == {100, 101}
            assert not served.sink.events
            served.sink.has_room = True
            await until(lambda: len(served.sink.events) == 2)
            served.sink.is_closed = True
            client.ring(2, message_number=102)
            await beside(client.receive)
            assert client.state(2) == slots.STATE_UNMATCHED


async def test_of_a_full_queue_only_calls_that_are_open_wait(tmp_path):
    async with serving(tmp_path, "hold=1ms&slots=1") as served:
        with await served.connect() as client:
            served.sink.has_room = False
            for number in range(1, 50):
                client.ring(0, number)
                await beside(client.receive)
                await beside(client.ask, message(vfio_user.RESET))
            assert len(served.backend._full) <= 1
            assert len(served.backend._pending) <= 2


async def test_memory_is_asked_of_qemu_only_when_no_access_is_held(tmp_path):
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            await beside(client.ask, dma_map(0, 0x1000))
            client.ring(0)
            event = await called(served)
            found = []

            async def look():
                found.append(await served.backend.read_physical(event, 0x10, 4))

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(look)
                assert (await beside(client.receive)).number == 100, "first the access"
                asked = await beside(client.receive)
                assert asked.command == vfio_user.DMA_READ
                # Another vCPU calls meanwhile: it is not held, or QEMU could not answer.
                client.ring(1, message_number=101)
                assert (await beside(client.receive)).number == 101
                client.send(
                    message(asked.command, asked.body + b"abcd", number=asked.number, flags=1)
                )
            assert found == [b"abcd"]


async def test_memory_that_is_shared_is_read_without_waiting(tmp_path):
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            ram = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
            os.ftruncate(ram, 0x4000)
            fcntl.fcntl(ram, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            # One page of 1 GiB, whose root is at 0x1000.
            os.pwrite(ram, (0x2007).to_bytes(8, "little"), 0x1000)
            os.pwrite(ram, (0x87).to_bytes(8, "little"), 0x2000)
            os.pwrite(ram, b"abcd", 0x3FFC)
            await beside(client.ask, dma_map(0, 0x4000), [ram])
            os.close(ram)
            reads = served.backend.read_now
            client.ring(0, space=0x1000)
            event = await called(served)
            assert reads(event, 0x3FFC, 4) is None, "QEMU has not said that it is the memory"
            ranges = served.connection.ranges
            piece = next(ranges.pieces(0x1000, 8))
            ranges.compare(piece, read_piece(piece))
            assert reads(event, 0x3FFC, 4) == b"abcd"
            assert reads(event, 0x3FFC, 5) is None, "over the end"
            for slot, space in ((1, slots.SPACE_SLOT), (3, 0x1000)):
                client.ring(slot, space=space, message_number=101 + slot)
                other = await called(served)
                assert reads(other, 0x3FFC, 4) is None, "payload, or a space that nobody believes"
            client.send(dma_unmap(0, 0x4000))
            await until(lambda: not ranges)
            assert reads(event, 0x3FFC, 4) is None
            await served.answer(event=event)
            assert reads(event, 0x3FFC, 4) is None


async def test_whoever_waits_for_memory_is_let_go_when_qemu_ends(tmp_path):
    async with serving(tmp_path, "kernel=1&stay=true") as served:
        client = await served.connect()
        with client:
            await beside(client.ask, dma_map(0, 0x1000))
            client.ring(0)
            event = await called(served)
            failed = []

            async def look():
                with pytest.raises(GuestMemoryError):
                    await served.backend.read_physical(event, 0x10, 4)
                failed.append(True)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(look)
                tasks.start_soon(look)
                await beside(client.receive)
                client.socket.close()
            assert failed == [True, True]
            await until(lambda: served.sink.abandoned == [event])


@pytest.mark.parametrize(
    "wrong",
    [b"\xff" * 64, message(99, flags=3), message(1, bytes(8))],
    ids=["no header", "no type", "a second version"],
)
async def test_a_qemu_that_breaks_the_protocol_is_cut_off_and_the_next_is_served(tmp_path, wrong):
    async with serving(tmp_path, "stay=true&hold=1s&timeout=10s") as served:
        with await served.connect() as client:
            client.ring(4)
            event = await called(served)
            client.send(wrong)
            await until(lambda: served.connection is None)
            assert served.sink.abandoned == [event]
            assert client.state(4) == slots.STATE_UNMATCHED
        with await served.connect() as client:
            client.ring(4)
            await called(served)
            await served.answer(1)
            await beside(client.receive)


async def test_a_qemu_that_makes_up_calls_and_resets_is_cut_off(tmp_path):
    async with serving(tmp_path, "stay=true&slots=1&hold=1ms") as served:
        with await served.connect() as client:
            flood = b"".join(
                vfio_write(slots.doorbell_offset(0), 1) + message(vfio_user.RESET) for _ in range(4)
            )
            gone = threading.Event()

            def guest():
                try:
                    for number in range(10_000):
                        client.fill(0, number + 1)
                        client.send(flood)
                except OSError:
                    gone.set()

            thread = threading.Thread(target=guest)
            thread.start()
            thread.join(30)
            assert gone.is_set()
        await until(lambda: served.connection is None)
        assert len(served.sink.events) <= 2 * 1 + 16


async def test_what_is_no_eventfd_is_never_written_to(tmp_path):
    async with serving(tmp_path, "hold=0s") as served:
        with await served.connect() as client:
            reading, writing = os.pipe()
            await beside(client.ask, set_irqs(1, 0x24, 0, 1), [writing])
            client.ring(flags=slots.FLAG_INTERRUPT)
            await called(served)
            await served.answer(1)
            os.close(writing)
            assert os.read(reading, 8) == b""
            os.close(reading)


@pytest.mark.parametrize("kernel", [0, 2])
async def test_addresses_of_a_program_are_no_offsets_in_its_slot(tmp_path, kernel):
    async with serving(tmp_path, f"kernel={kernel}&hold=1s&timeout=10s") as served:
        with await served.connect() as client:
            client.ring(0, space=slots.SPACE_SLOT)
            event = await called(served)
            for access in (
                served.backend.read_physical(event, 0x7FFE_1000, 20),
                served.backend.write_physical(event, 0x7FFE_1000, bytes(20)),
            ):
                with pytest.raises(GuestMemoryError) as raised:
                    await access
                told = str(raised.value)
                assert told.count("0x7ffe1000") == 1
                assert "20 bytes are not in the payload of a slot" in told
                named = "is not the kernel's, and has no address space" in told
                assert named is (kernel == 0)
                assert ("docs/device-guests.md" in told) is (kernel == 0)
            await served.answer(1)
            await beside(client.receive)


@pytest.mark.parametrize("goes_on", [True, False])
async def test_it_logs_how_the_device_works_again_for_a_qemu_that_goes_on(
    tmp_path, caplog, goes_on
):
    with caplog.at_level("INFO"):
        async with serving(tmp_path) as served:
            served.backend.qemu_goes_on = goes_on
            with await served.connect():
                served.backend.stop()
    assert ("unplug and plug the device" in caplog.text) is goes_on
