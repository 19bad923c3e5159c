"""The device side of vfio-user: what each message gets, and that none does harm."""

import errno
import struct

import pytest
from fuzzing import fuzzing
from hypothesis import given, settings
from hypothesis import strategies as st
from vfio_client import (
    Reply,
    dma_map,
    dma_unmap,
    irq_info,
    message,
    read,
    region_info,
    set_irqs,
    version,
    write,
)

from vmibridge.backends.device import vfio_user as protocol
from vmibridge.backends.device.pci import ConfigSpace
from vmibridge.backends.device.vfio_user import Bar, DmaMap, VfioUser

BAR = Bar(1 << 16, 99, ((0, 0x2000), (0x3000, 0x1000)))


class Device:
    """A host that writes down what it is asked."""

    def __init__(self, vectors=2):
        self.accesses, self.maps, self.log, self.interrupts = [], [], [], {}
        self.given = []
        self.transfers = []
        self.why = 0
        self.protocol = VfioUser(self, BAR, vectors)

    def access(self, access):
        self.accesses.append(access)

    def map(self, mapping, descriptor):
        self.maps.append((mapping, descriptor))
        self.given += [] if descriptor is None else [descriptor]
        return self.why

    def unmap(self, address, size):
        self.log.append(("unmap", address, size))
        return self.why

    def unmap_all(self):
        self.log.append("unmap all")

    def set_interrupts(self, first, count, descriptors):
        self.log.append(("interrupts", first, count, list(descriptors)))
        self.given += descriptors

    def reset(self):
        self.log.append("reset")

    def transferred(self, transfer, data):
        self.transfers.append((transfer, data))

    def drop(self, descriptors):
        self.given += descriptors

    def receive(self, data, descriptors=()):
        """The replies to what is received."""
        self.protocol.receive(data, descriptors)
        return self.replies()

    def replies(self):
        out = [(Reply(data), descriptors) for data, descriptors in self.protocol.out]
        self.protocol.out.clear()
        return out

    def ask(self, data, descriptors=()):
        """The one reply, without its descriptors."""
        ((reply, _),) = self.receive(data, descriptors)
        return reply


@pytest.fixture
def device():
    made = Device()
    made.receive(version())
    return made


def test_the_version_is_answered_with_the_limits():
    reply = Device().ask(version(number=7))
    assert (reply.number, reply.command, reply.flags) == (7, protocol.VERSION, protocol.REPLY)
    assert reply.body[:4] == bytes(4)
    assert reply.body[4:] == b'{"capabilities":{"max_msg_fds":8,"max_data_xfer_size":65536}}\0'


@pytest.mark.parametrize(
    "wrong",
    [
        read(0, 4),
        version(major=1),
        version(b"{"),
        version(b'{"capabilities":{"max_data_xfer_size":0}}'),
        version(b'{"capabilities":[]}'),
        version(b"[" * 4000),
        version(b" " * 5000 + b"{}"),
        message(protocol.VERSION, b"", size=15),
        message(protocol.VERSION, b"", size=1 << 31),
        message(protocol.VERSION, flags=2),
        message(protocol.DMA_READ, bytes(16), flags=protocol.REPLY),
    ],
)
def test_what_is_no_beginning_ends_the_connection(wrong):
    with pytest.raises(ValueError, match=r".+"):
        Device().receive(wrong)


def test_the_version_is_said_once(device):
    with pytest.raises(ValueError, match="once more"):
        device.receive(version())


def test_a_message_may_come_in_any_pieces(device):
    stream = write(0x2000, b"\1\0\0\0", number=1) + read(0, 4, 7, number=2) + irq_info(1, number=3)
    for cut in range(1, len(stream)):
        device.accesses.clear()
        replies = device.receive(stream[:cut]) + device.receive(stream[cut:])
        assert [reply.number for reply, _ in replies] == [2, 3]
        assert [access.number for access in device.accesses] == [1]


def test_the_device_is_one_sparse_bar_config_space_and_msi(device):
    info = device.ask(message(protocol.GET_INFO, struct.pack("<4I", 16, 0, 0, 0)))
    assert struct.unpack("<4I", info.body) == (16, 3, 9, 5)
    ((bar, descriptors),) = device.receive(region_info(0))
    assert struct.unpack_from("<4I2Q", bar.body) == (80, 15, 0, 32, 1 << 16, 0)
    assert struct.unpack_from("<HHIII", bar.body, 32) == (1, 1, 0, 2, 0)
    assert struct.unpack_from("<4Q", bar.body, 48) == (0, 0x2000, 0x3000, 0x1000)
    assert descriptors == (99,)
    ((small, descriptors),) = device.receive(region_info(0, argsz=32))
    assert (struct.unpack("<4I2Q", small.body)[0], descriptors) == (80, ()), "it asks again"
    assert struct.unpack("<4I2Q", device.ask(region_info(7)).body)[4] == 256
    assert [struct.unpack("<4I2Q", device.ask(region_info(n)).body)[4] for n in (1, 6, 8)] == [
        0
    ] * 3
    assert device.ask(region_info(9)).error == errno.EINVAL
    assert struct.unpack("<4I", device.ask(irq_info(1)).body) == (16, 9, 1, 2)
    assert [device.ask(irq_info(kind)).error for kind in (0, 2, 3, 4)] == [errno.EINVAL] * 4


def test_config_space_is_read_and_its_writable_bits_are_written(device):
    assert device.ask(read(0, 4, 7)).body[16:] == bytes.fromhex("34124d56")
    device.ask(write(4, b"\xff\xff", 7))
    assert device.ask(read(4, 2, 7)).body[16:] == b"\x07\x04"
    device.ask(write(0, b"\xff\xff\xff\xff", 7))
    assert device.ask(read(0, 4, 7)).body[16:] == bytes.fromhex("34124d56")
    device.ask(message(protocol.RESET))
    assert device.ask(read(4, 2, 7)).body[16:] == bytes(2)
    assert device.log == ["reset"]


def test_the_capability_of_msi_is_the_only_one():
    config = ConfigSpace(8)
    at = config.read(0x34, 1)[0]
    assert config.read(at, 4) == struct.pack("<BBH", 5, 0, 0x86)
    with pytest.raises(ValueError, match="3 interrupts"):
        ConfigSpace(3)


@pytest.mark.parametrize(
    "wrong",
    [
        read(0, 9),
        read(0, 0),
        read((1 << 16) - 3, 4),
        read(1 << 63, 8),
        read(0, 4, 1),
        read(0, 4, 9),
        read(253, 4, 7),
        read(0, (1 << 16) + 1, 7),
        write(0x2000, b"\1" * 9),
        message(protocol.WRITE, struct.pack("<QII", 0x2000, 0, 8) + b"\1" * 4),
        message(protocol.READ, bytes(15)),
        message(protocol.MAP, bytes(31)),
        message(protocol.UNMAP, bytes(23)),
        message(protocol.GET_REGION, bytes(31)),
        message(protocol.SET_IRQS, bytes(19)),
        dma_map(0, 0),
        dma_map((1 << 64) - 0x1000, 0x2000),
        dma_map(0, 0x1000, offset=1 << 63),
        set_irqs(1, 0x24, 0, 3),
        set_irqs(1, 0x24, 0xFFFFFFFF, 0xFFFFFFFF),
        set_irqs(0, 0x24, 0, 1),
        set_irqs(1, 0x0A, 0, 1),
    ],
)
def test_what_there_is_not_gets_an_error_and_changes_nothing(device, wrong):
    reply = device.ask(wrong)
    assert (reply.error, reply.flags, reply.body) == (
        errno.EINVAL,
        protocol.REPLY | protocol.ERROR,
        b"",
    )
    assert (device.accesses, device.maps, device.log) == ([], [], [])


@pytest.mark.parametrize("command", [protocol.GET_IO_FDS, 15, 16, 17, 0xFFFF, 0])
def test_a_command_that_is_not_known_is_not_supported(device, command):
    assert device.ask(message(command, bytes(64))).error == errno.ENOTSUP


def test_an_access_is_answered_by_reply_and_its_region_is_said(device):
    assert device.receive(write(0x2000, b"\1\0\0\0", number=5) + read(0x2000, 4, number=6)) == []
    writing, reading = device.accesses
    assert (writing.data, reading.data) == (b"\1\0\0\0", None)
    device.protocol.reply(reading, b"\2\0\0\0")
    device.protocol.reply(writing)
    (first, _), (second, _) = device.replies()
    assert (first.number, first.body) == (6, struct.pack("<QII", 0x2000, 0, 4) + b"\2\0\0\0")
    assert (second.number, second.body) == (5, struct.pack("<QII", 0x2000, 0, 4))


def test_who_wants_no_reply_gets_none(device):
    assert device.receive(write(0x2000, b"\1", flags=protocol.NO_REPLY)) == []
    device.protocol.reply(device.accesses[0])
    assert device.receive(write(4, b"\7\0", 7, flags=protocol.NO_REPLY)) == []
    assert device.replies() == []


def test_nothing_is_said_while_it_is_mute(device):
    device.protocol.is_mute = True
    assert device.receive(read(0, 4, 7) + message(protocol.RESET) + read(0x2000, 4)) == []
    device.protocol.reply(device.accesses[0], bytes(4))
    assert device.replies() == []
    assert device.log == ["reset"], "it is done all the same"


def test_memory_is_mapped_with_its_descriptor(device):
    assert device.ask(dma_map(0x10_0000, 0x2000, 0x40_0000), [7]).error == 0
    assert device.maps == [(DmaMap(0x10_0000, 0x2000, 0x40_0000, True, True), 7)]
    device.ask(dma_map(0, 0x1000, flags=1))
    assert device.maps[1] == (DmaMap(0, 0x1000, 0, True, False), None)
    unmapped = device.ask(dma_unmap(0, 0x1000))
    assert unmapped.body == struct.pack("<IIQQ", 24, 0, 0, 0x1000)
    device.ask(dma_unmap(0, 0, flags=2))
    assert device.log == [("unmap", 0, 0x1000), "unmap all"]
    device.why = errno.EEXIST
    assert device.ask(dma_map(0, 0x1000)).error == errno.EEXIST


def test_descriptors_are_of_the_last_message_and_wait_for_its_end(device):
    first, second = dma_map(0, 0x1000, number=1), dma_map(0x1000, 0x1000, number=2)
    device.receive(first + second[:20], [5])
    device.receive(second[20:])
    assert [descriptor for _, descriptor in device.maps] == [None, 5]


def test_descriptors_that_nothing_is_done_with_are_dropped(device):
    device.receive(read(0, 4, 7), [3])
    device.receive(message(17), [4])
    device.receive(dma_map(0, 0), [5])
    device.receive(dma_map(0, 0x1000), [6, 7])
    device.receive(set_irqs(1, 0x24, 0, 1), [8, 9])
    device.receive(read(0, 4)[:20], [10])
    device.protocol.close()
    assert device.given == [3, 4, 5, 6, 7, 8, 9, 10]
    with pytest.raises(ValueError, match="9 descriptors"):
        device.receive(b"", list(range(9)))
    device.protocol.close()
    assert device.given[8:] == list(range(9))


def test_interrupts_are_set_and_taken_away(device):
    assert device.ask(set_irqs(1, 0x24, 0, 2), [5, 6]).error == 0
    device.ask(set_irqs(1, 0x24, 1, 1))
    device.ask(set_irqs(1, 0x21, 0, 0))
    assert device.ask(set_irqs(2, 0x21, 0, 0)).error == 0
    assert device.log == [
        ("interrupts", 0, 2, [5, 6]),
        ("interrupts", 1, 1, []),
        ("interrupts", 0, 2, []),
    ]


def test_memory_is_asked_of_qemu(device):
    number = device.protocol.read_memory(0x1000, 4)
    ((asked, _),) = device.replies()
    assert (asked.command, asked.flags) == (protocol.DMA_READ, 0)
    assert asked.body == struct.pack("<QQ", 0x1000, 4)
    device.receive(message(protocol.DMA_READ, asked.body + b"abcd", number=number, flags=1))
    failing = device.protocol.write_memory(0x2000, b"xy")
    ((asked, _),) = device.replies()
    assert asked.body == struct.pack("<QQ", 0x2000, 2) + b"xy"
    device.receive(message(protocol.DMA_WRITE, number=failing, flags=0x21, error=14))
    assert device.transfers == [(number, b"abcd"), (failing, None)]
    assert device.protocol.transfers == 0


@pytest.mark.parametrize(
    "given",
    [
        {"number": 9},
        {"command": protocol.DMA_WRITE},
        {"body": bytes(16) + b"abc"},
        {"body": bytes(16) + b"abcde"},
        {"body": b""},
    ],
)
def test_a_reply_that_does_not_fit_ends_the_connection(device, given):
    number = device.protocol.read_memory(0x1000, 4)
    right = {"command": protocol.DMA_READ, "body": bytes(16) + b"abcd", "number": number}
    with pytest.raises(ValueError, match=r"instead of|not asked"):
        device.receive(message(flags=protocol.REPLY, **{**right, **given}))


def test_only_so_much_is_asked_at_a_time(device):
    numbers = {device.protocol.read_memory(0, 1) for _ in range(protocol.MAX_TRANSFERS)}
    assert len(numbers) == protocol.MAX_TRANSFERS
    with pytest.raises(BufferError):
        device.protocol.read_memory(0, 1)


# --- a hostile QEMU -------------------------------------------------------------------------


SESSION = (
    region_info(0)
    + irq_info(1)
    + dma_map(0, 0xA0000)
    + set_irqs(1, 0x24, 0, 2)
    + read(0, 4, 7)
    + write(0x2000, b"\1\0\0\0")
    + read(0x2000, 4)
    + dma_unmap(0, 0xA0000)
    + message(protocol.RESET)
)


def play(data, cuts, descriptors):
    """A session of these bytes in pieces. Each descriptor is given back, whatever they are."""
    device = Device()
    sent = []
    try:
        device.receive(version())
        for number in (device.protocol.read_memory(0, 8), device.protocol.write_memory(0, b"x")):
            assert number
        before = 0
        for cut in [*sorted(cuts), len(data)]:
            passed = [1000 + len(sent)] * (descriptors and cut % 3 == 0)
            sent += passed
            device.receive(data[before:cut], passed)
            before = cut
            assert len(device.protocol.out) <= 1 + len(data) // 16
            device.protocol.out.clear()
    except ValueError:
        pass
    finally:
        device.protocol.close()
    assert sorted(device.given) == sorted(sent)
    for access in device.accesses:
        assert 1 <= access.size <= 8
        assert access.offset + access.size <= BAR.size


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_bytes_do_harm(data):
    session = bytearray(SESSION)
    for at, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(session) - 1), st.integers(0, 255)), max_size=8)
    ):
        session[at] = value
    cuts = data.draw(st.lists(st.integers(0, len(session)), max_size=4))
    play(bytes(session), cuts, data.draw(st.booleans()))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300))
def test_no_capabilities_do_harm(text):
    play(version(text), [], False)


@pytest.mark.parametrize("mutations", [2000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_mutations_do_no_harm(mutations):
    pieces = [SESSION[at : at + 4] for at in range(0, len(SESSION), 4)]
    with fuzzing() as random:
        for _ in range(mutations // 4):
            session = bytearray(SESSION)
            for _ in range(4):
                at = random.randrange(len(session))
                match random.randrange(4):
                    case 0:
                        session[at] ^= 1 << random.randrange(8)
                    case 1:
                        session[at : at + 4] = random.choice(pieces)
                    case 2:
                        del session[at : at + random.randrange(1, 20)]
                    case _:
                        session[at:at] = random.randbytes(random.randrange(1, 20))
            play(bytes(session), [random.randrange(len(session) + 1)], random.random() < 0.5)
