"""Guest memory by the descriptors of DMA_MAP."""

import errno
import fcntl
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmibridge.backends.device.memory import MAX_RANGES, GuestRanges, read_piece, write_piece
from vmibridge.backends.device.memory_file import FileRanges
from vmibridge.backends.device.vfio_user import DmaMap
from vmibridge.errors import GuestMemoryError

PAGE = 4096


def memfd(pages=4, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL):
    descriptor = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, pages * PAGE)
    for page in range(pages):
        os.pwrite(descriptor, bytes([65 + page]) * PAGE, page * PAGE)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def is_open(descriptor):
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def ram(address, size, offset=0, readable=True, writable=True):
    return DmaMap(address, size, offset, readable, writable)


@pytest.fixture
def ranges():
    made = GuestRanges()
    yield made
    made.clear()


def know(ranges, address):
    """As if QEMU had said the same as the file has."""
    piece = next(ranges.pieces(address, 1))
    ranges.compare(piece, read_piece(piece))


def test_a_file_is_read_once_qemu_has_said_the_same(ranges):
    ranges.map(ram(0x10_0000, 2 * PAGE, offset=PAGE), memfd())
    assert ranges.read(0x10_0000, 2) is None, "nobody has said that it is the memory"
    piece = next(ranges.pieces(0x10_0000, 2))
    ranges.compare(piece, b"BB")
    assert ranges.read(0x10_0000 + PAGE - 1, 2) == b"BC"
    assert ranges.read(0x10_0000 + 2 * PAGE - 1, 2) is None, "over the end"
    assert ranges.read(0xF_FFFF, 2) is None
    (piece,) = ranges.pieces(0x10_0000, 3, write=True)
    assert write_piece(piece, b"xyz")
    assert ranges.read(0x10_0000, 4) == b"xyzB"


def test_a_range_that_has_gone_is_not_read_any_more(ranges):
    for remove in (lambda: ranges.unmap(PAGE, PAGE), ranges.clear):
        ranges.map(ram(PAGE, PAGE), memfd())
        know(ranges, PAGE)
        assert ranges.read(PAGE, 2) == b"AA"
        remove()
        # What is open now may have the number that the file had.
        other = memfd(pages=1)
        assert ranges.read(PAGE, 2) is None
        os.close(other)
    ranges.map(ram(PAGE, PAGE, offset=PAGE), memfd())
    know(ranges, PAGE)
    assert ranges.read(PAGE, 2) == b"BB"


def test_each_range_is_read_from_its_own_place(ranges):
    descriptor = memfd()
    for number in range(4):
        offset = (3 - number) * PAGE
        ranges.map(ram(number * PAGE, PAGE, offset, readable=number != 2), os.dup(descriptor))
    os.close(descriptor)
    know(ranges, 0)
    for number in (0, 1, 3, 0, 2, 1):
        expected = None if number == 2 else bytes([68 - number]) * 2
        assert ranges.read(number * PAGE, 2) == expected
        assert ranges.read((number + 1) * PAGE - 1, 2) is None, "over the end"


def test_a_file_that_the_user_names_is_believed_where_each_machine_has_it(tmp_path):
    file = tmp_path / "ram"
    file.write_bytes(b"low" + bytes((1 << 20) - 3) + b"high" + bytes(PAGE - 4))
    ranges = FileRanges(str(file))
    assert ranges.read(0, 3) == b"low"
    assert ranges.read(1 << 20, 4) == b"high"
    (piece,) = ranges.pieces((1 << 20) + 4, 2, write=True)
    assert write_piece(piece, b"er")
    assert file.read_bytes()[1 << 20 :].startswith(b"higher")
    for hole in (0xA_0000, 0xF_FFFF, (1 << 20) + PAGE):
        assert ranges.read(hole, 1) is None
        with pytest.raises(GuestMemoryError):
            list(ranges.pieces(hole, 1))
    ranges.clear()
    assert len(ranges) == 0


def test_what_is_no_file_with_bytes_is_not_memory(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    for name in ("fifo", "empty"):
        with pytest.raises(ValueError, match="is not a regular file"):
            FileRanges(str(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        FileRanges(str(tmp_path / "none"))


def test_a_file_that_has_not_what_qemu_says_is_never_read(ranges):
    ranges.map(ram(0, 4 * PAGE), memfd())
    said = [ranges.compare(next(ranges.pieces(0, 2)), b"no") for _ in range(20)]
    assert said.count(True) == 1, "it is logged once"
    ranges.compare(next(ranges.pieces(0, 2)), b"AA")
    assert ranges.read(0, 2) is None


def test_zeros_prove_nothing(ranges):
    descriptor = memfd()
    os.pwrite(descriptor, bytes(PAGE), 0)
    ranges.map(ram(0, 4 * PAGE), descriptor)
    ranges.compare(next(ranges.pieces(0, 8)), bytes(8))
    assert ranges.read(0, 8) is None


def test_what_is_known_of_a_file_stays_when_it_is_mapped_again(ranges):
    descriptor = memfd()
    ranges.map(ram(0, PAGE), os.dup(descriptor))
    know(ranges, 0)
    assert ranges.unmap(0, PAGE) == 0
    ranges.map(ram(PAGE, PAGE, offset=PAGE), descriptor)
    assert ranges.read(PAGE, 1) == b"B"


@pytest.mark.parametrize("seals", [0, fcntl.F_SEAL_GROW, fcntl.F_SEAL_WRITE])
def test_a_file_that_can_be_cut_short_is_not_kept(ranges, seals):
    descriptor = memfd(seals=seals)
    assert ranges.map(ram(0, PAGE), descriptor) == 0
    assert (ranges.refused, is_open(descriptor)) == (1, False)
    (piece,) = ranges.pieces(0, 1)
    assert piece.descriptor is None


def test_what_is_no_memfd_is_not_kept(ranges, tmp_path):
    (tmp_path / "ram").write_bytes(bytes(PAGE))
    reading, writing = os.pipe()
    for number, descriptor in enumerate(
        [os.open(tmp_path / "ram", os.O_RDWR), os.open("/dev/zero", os.O_RDWR), reading, writing]
    ):
        assert ranges.map(ram(number * PAGE, PAGE), descriptor) == 0
        assert not is_open(descriptor)
    assert ranges.refused == 4


def test_a_range_beyond_the_end_of_its_file_is_not_kept(ranges):
    descriptor = memfd(1)
    ranges.map(ram(0, PAGE, offset=1), descriptor)
    assert not is_open(descriptor)


def test_ranges_do_not_overlap_and_go_as_they_came(ranges):
    first = memfd()
    assert ranges.map(ram(PAGE, 2 * PAGE), first) == 0
    for address, size in ((0, 2 * PAGE), (PAGE, PAGE), (2 * PAGE, PAGE), (0, 9 * PAGE)):
        descriptor = memfd()
        assert ranges.map(ram(address, size), descriptor) == errno.EEXIST
        assert not is_open(descriptor)
    assert ranges.unmap(PAGE, PAGE) == errno.ENOENT
    assert ranges.unmap(0, PAGE) == errno.ENOENT
    assert is_open(first)
    assert ranges.unmap(PAGE, 2 * PAGE) == 0
    assert not is_open(first)
    assert len(ranges) == 0


def test_there_are_only_so_many_ranges(ranges):
    for number in range(MAX_RANGES):
        assert ranges.map(ram(number * PAGE, PAGE), None) == 0
    descriptor = memfd()
    assert ranges.map(ram(MAX_RANGES * PAGE, PAGE), descriptor) == errno.ENOSPC
    assert not is_open(descriptor)


def test_an_access_is_in_pieces_where_its_memory_is(ranges):
    ranges.map(ram(0, PAGE), None)
    ranges.map(ram(PAGE, PAGE, writable=False), None)
    ranges.map(ram(3 * PAGE, PAGE), None)
    assert [piece[:2] for piece in ranges.pieces(PAGE - 1, 3)] == [(PAGE - 1, 1), (PAGE, 2)]
    with pytest.raises(GuestMemoryError, match="no memory there"):
        list(ranges.pieces(2 * PAGE - 1, 2))
    with pytest.raises(GuestMemoryError, match="read-only"):
        list(ranges.pieces(PAGE - 1, 2, write=True))
    for address in (-1, (1 << 64) - 1, 1 << 64):
        with pytest.raises(GuestMemoryError, match="beyond"):
            list(ranges.pieces(address, 2))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 20), st.integers(1, 6), st.booleans()), max_size=30
    )
)
def test_whatever_is_mapped_and_unmapped_the_ranges_are_those_of_a_table(steps):
    ranges, table = GuestRanges(), {}
    for is_map, start, size, writable in steps:
        if is_map:
            wanted = range(start, start + size)
            overlaps = any(page in wanted for pages, _ in table.values() for page in pages)
            why = ranges.map(ram(start * PAGE, size * PAGE, writable=writable), None)
            assert why == (errno.EEXIST if overlaps else 0)
            if not why:
                table[start] = wanted, writable
        else:
            known = start in table and len(table[start][0]) == size
            assert (ranges.unmap(start * PAGE, size * PAGE) == 0) == known
            if known:
                del table[start]
    pages = {page: writable for wanted, writable in table.values() for page in wanted}
    for page in range(27):
        for write in (False, True):
            try:
                list(ranges.pieces(page * PAGE, PAGE, write=write))
            except GuestMemoryError:
                assert page not in pages or (write and not pages[page])
            else:
                assert page in pages
                assert pages[page] or not write
