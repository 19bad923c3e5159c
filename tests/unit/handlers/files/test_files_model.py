"""Any sequence of calls, by two programs of a guest, does what a model of a few lines does."""

import errno
import tempfile
from pathlib import Path

import anyio
import pytest
from file_parts import ABORT, FilesGuest, leftovers, sha256, tree
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmibridge.handlers.files import Files, Mode

NAMES = st.sampled_from(["a", "b", "sub/c", "../d"])
PROGRAMS = st.sampled_from([0x1000, 0x2000])
MAX_SIZE = 8


class Expected:
    """What the model knows of a file under way."""

    def __init__(self, owner: int, name: str, size: int, mode: Mode) -> None:
        self.owner, self.name, self.size, self.mode = owner, name, size, mode
        self.bytes: list[int | None] = [None] * size

    @property
    def content(self) -> bytes | None:
        return None if None in self.bytes else bytes(self.bytes)

    @property
    def first(self) -> int:
        return self.bytes.index(None) if None in self.bytes else self.size


class FilesAgainstModel(RuleBasedStateMachine):
    """The handler in a loop of its own, and beside it dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self.temporary.name)
        self.portal_of = anyio.from_thread.start_blocking_portal("asyncio")
        self.portal = self.portal_of.__enter__()
        options = Files.Settings(str(self.folder), sync=False, replace=True, max_open=3)
        self.files = Files(options)
        self.portal.call(self.files.__aenter__)
        guest = FilesGuest(self.files)
        self.programs = {0x1000: guest, 0x2000: guest.program(0x2000)}
        self.under_way: dict[int, Expected] = {}
        self.there: dict[str, bytes] = {}
        self.ended: dict[int, tuple[int, bytes | None, int]] = {}
        """By handle: owner, hash, and what the first END was told."""
        self.taken: dict[int, int] = {}
        self.last: tuple | None = None

    def teardown(self) -> None:
        self.portal.call(self.files.__aexit__, None, None, None)
        assert leftovers(self.folder) == []
        self.portal_of.__exit__(None, None, None)
        self.temporary.cleanup()

    def ask(self, name: str, owner: int, *arguments: object):
        """Call it, and remember how to call it again."""
        self.last = (name, owner, arguments)
        method = getattr(self.programs[owner], name)
        self.answer = self.portal.call(method, *arguments)
        return self.answer

    def expect(self, handle: int, owner: int) -> Expected | int:
        """The file of a handle, or the error."""
        expected = self.under_way.get(handle)
        if expected is not None and expected.owner == owner:
            return expected
        return errno.ESTALE if self.taken.get(handle) == owner else errno.EBADF

    def some_handle(self, data: st.DataObject) -> int:
        known = [0, *self.under_way, *list(self.ended)[-2:], *list(self.taken)[-2:]]
        return data.draw(st.sampled_from(known), label="handle")

    @rule(
        owner=PROGRAMS,
        name=NAMES,
        size=st.integers(0, MAX_SIZE),
        mode=st.sampled_from([Mode.CREATE, Mode.REPLACE]),
        hashes=st.sampled_from([Mode(0), Mode.HASH]),
    )
    def begin(self, owner, name, size, mode, hashes):
        self.begin_one(owner, name, size, mode, hashes)

    @precondition(lambda self: self.under_way)
    @rule(owner=PROGRAMS, data=st.data(), hashes=st.sampled_from([Mode(0), Mode.HASH]))
    def begin_what_is_under_way(self, owner, data, hashes):
        """Again by the same program, or by another one, which takes it over."""
        known = self.under_way[data.draw(st.sampled_from(list(self.under_way)))]
        self.begin_one(owner, known.name, known.size, known.mode, hashes)

    def begin_one(self, owner, name, size, mode, hashes):
        told = self.ask("begin", owner, name, size, mode | hashes)
        if name.startswith(".."):
            assert told.error == errno.EINVAL
            return
        for handle, expected in self.under_way.items():
            if (expected.name, expected.size, expected.mode) == (name, size, mode):
                assert told.error == 0
                if expected.owner == owner:
                    assert told.value == handle
                else:
                    assert told.value not in {*self.under_way, *self.ended, *self.taken}
                    self.taken[handle] = expected.owner
                    expected.owner = owner
                    self.under_way[told.value] = self.under_way.pop(handle)
                return
        if len(self.under_way) == 3:
            assert told.error == errno.EMFILE
        elif name in self.there and mode is Mode.CREATE:
            assert told.error == errno.EEXIST
        else:
            assert told.error == 0
            assert told.value not in {0, *self.under_way, *self.ended, *self.taken}
            self.under_way[told.value] = Expected(owner, name, size, mode)

    @rule(
        owner=PROGRAMS,
        data=st.data(),
        offset=st.integers(0, MAX_SIZE),
        raw=st.binary(max_size=MAX_SIZE),
    )
    def put(self, owner, data, offset, raw):
        handle = self.some_handle(data)
        told = self.ask("put", owner, handle, offset, raw)
        expected = self.expect(handle, owner)
        if not isinstance(expected, Expected):
            assert told.error == expected
        elif offset + len(raw) > expected.size:
            assert told.error == errno.EFBIG
        else:
            assert (told.error, told.value) == (0, len(raw))
            expected.bytes[offset : offset + len(raw)] = raw

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def put_all(self, data):
        handle = data.draw(st.sampled_from(list(self.under_way)))
        expected = self.under_way[handle]
        raw = data.draw(st.binary(min_size=expected.size, max_size=expected.size))
        assert self.ask("put", expected.owner, handle, 0, raw).error == 0
        expected.bytes = list(raw)

    @rule(owner=PROGRAMS, data=st.data(), hashed=st.sampled_from(["right", "wrong", None]))
    def end(self, owner, data, hashed):
        handle = self.some_handle(data)
        expected = self.expect(handle, owner)
        content = expected.content if isinstance(expected, Expected) else None
        digest = {"right": sha256(content or b""), "wrong": bytes(32), None: None}[hashed]
        told = self.ask("end", owner, handle, digest)
        if not isinstance(expected, Expected):
            before = self.ended.get(handle)
            if before is not None and before[:2] == (owner, digest):
                assert told.error == before[2]
            else:
                assert told.error == expected
            return
        if content is None:
            assert told.error == errno.ENODATA
            return
        del self.under_way[handle]
        error = 0
        if hashed == "wrong":
            error = errno.EBADMSG
        elif expected.mode is Mode.CREATE and expected.name in self.there:
            error = errno.EEXIST
        else:
            self.there[expected.name] = content
        assert told.error == error
        self.ended[handle] = (owner, digest, error)

    @rule(owner=PROGRAMS, data=st.data())
    def abort(self, owner, data):
        handle = self.some_handle(data)
        told = self.ask("ask", owner, ABORT, handle)
        expected = self.expect(handle, owner)
        if isinstance(expected, Expected):
            assert told.error == 0
            del self.under_way[handle]
        elif told.error:
            assert told.error == expected

    @rule(owner=PROGRAMS, data=st.data())
    def length(self, owner, data):
        handle = self.some_handle(data)
        expected = self.expect(handle, owner)
        if isinstance(expected, Expected):
            assert self.portal.call(self.programs[owner].length, handle) == expected.first

    @rule(owner=PROGRAMS, name=NAMES, piece=st.integers(1, MAX_SIZE + 1))
    def get(self, owner, name, piece):
        if name in self.there and len(self.under_way) < 3:
            self.last = None
            got = self.portal.call(self.programs[owner].get_file, name, piece)
            assert got == self.there[name]

    @precondition(lambda self: self.last is not None)
    @rule()
    def repeat(self):
        """The same call again, as by a guest whose answer was lost."""
        name, owner, arguments = self.last
        assert self.portal.call(getattr(self.programs[owner], name), *arguments) == self.answer

    @invariant()
    def the_folder_has_what_was_ended_and_nothing_else(self):
        assert len(leftovers(self.folder)) == len(self.under_way)
        found = {
            name: data
            for name, data in tree(self.folder).items()
            if data is not None and not name.startswith(".vmibridge-")
        }
        assert found == self.there


class TestFilesAgainstModel(FilesAgainstModel.TestCase):
    """A short form."""

    settings = settings(max_examples=12, stateful_step_count=25)
    pytestmark = [pytest.mark.no_cover]  # noqa: RUF012 - as pytest has it


class TestFilesAgainstModelForLong(FilesAgainstModel.TestCase):
    """The same for a while."""

    settings = settings(max_examples=1000, stateful_step_count=50)
    pytestmark = [pytest.mark.slow, pytest.mark.no_cover]  # noqa: RUF012
