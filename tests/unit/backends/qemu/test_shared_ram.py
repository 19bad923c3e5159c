"""Guest memory that is read from the file in which QEMU keeps it."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmibridge.backends.qemu.ram import SharedRam

SIZE = 2 << 20


@pytest.fixture(scope="module")
def ram(tmp_path_factory):
    path = tmp_path_factory.mktemp("ram") / "ram"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    with SharedRam(os.open(path, os.O_RDONLY)) as ram:
        yield ram


@pytest.mark.parametrize(
    ("address", "size", "there"),
    [
        (0, 16, True),
        (0x9_FFFF, 1, True),
        (0x9_FFFF, 2, False),
        (0xA_0000, 1, False),
        (0xF_FFFF, 1, False),
        (0xF_FFFF, 2, False),
        (0x10_0000, 1, True),
        (SIZE - 1, 1, True),
        (SIZE - 1, 2, False),
        (SIZE, 1, False),
        (1 << 32, 1, False),
        (0, SIZE, False),
    ],
)
def test_what_is_not_for_sure_memory_is_for_qemu_to_say(ram, address, size, there):
    data = bytes((address + at) % 256 for at in range(size)) if there else None
    assert ram.read(address, size) == data


@given(st.integers(0, (1 << 64) - 1), st.integers(1, 1 << 16))
def test_any_read_has_all_of_its_bytes_or_none(ram, address, size):
    data = ram.read(address, size)
    assert data is None or len(data) == size


def test_a_file_that_is_cut_short_is_for_qemu_to_say(tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(bytes(SIZE))
    with SharedRam(os.open(path, os.O_RDONLY)) as ram:
        os.truncate(path, 0x1000)
        assert ram.read(0x800, 0x1000) is None
        assert ram.read(0, 0x1000) == bytes(0x1000)


def test_memory_from_2_gib_on_is_elsewhere_in_the_file(tmp_path):
    path = tmp_path / "ram"
    path.touch()
    os.truncate(path, 3 << 30)
    with SharedRam(os.open(path, os.O_RDONLY)) as ram:
        assert ram.read((2 << 30) - 8, 8) == bytes(8)
        assert ram.read((2 << 30) - 8, 9) is None
        assert ram.read(2 << 30, 1) is None


def test_what_is_no_file_is_refused_and_closed(tmp_path):
    empty = tmp_path / "ram"
    empty.touch()
    for descriptor in (os.open(tmp_path, os.O_RDONLY), os.open(empty, os.O_RDONLY)):
        with pytest.raises(ValueError, match="not a regular file with bytes in it"):
            SharedRam(descriptor)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
    read, write = os.pipe()
    with pytest.raises(ValueError, match="not a regular file"):
        SharedRam(read)
    os.close(write)
