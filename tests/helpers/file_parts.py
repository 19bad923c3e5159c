"""Handlers of files, asked as a guest asks them: by words, with texts and buffers in its memory."""

import hashlib
import itertools
import os
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from vmibridge import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
    Bridge,
    BridgeContext,
    BridgeHandler,
    BridgePacket,
    Outcome,
    OutcomeKind,
    Registers,
    Status,
    StatusKind,
    TrapEvent,
    TrapReason,
)
from vmibridge.handlers._file_names import RESERVED
from vmibridge.handlers.files import MAX_PIECE, Files, Mode
from vmibridge.testing import FakeBackend

BEGIN, PUT, GET, END, ABORT, STAT, LIST, LENGTH = range(1, 9)
NAME, AFTER, BYTES, DIGEST, ROOM = 0x1_0000, 0x2_0000, 0x10_0000, 0x3_0000, 0x40_0000
PROGRAM = 0x1000
"""An address space."""


class Answer(NamedTuple):
    """What a guest is told."""

    status: Status
    value: int

    @property
    def error(self) -> int:
        """The errno of a failure; 0: it went well. -1 for a parameter that is wrong."""
        if self.status.kind == StatusKind.INVALID_PARAMETERS:
            return -1
        if self.status.kind == StatusKind.FAILED:
            assert self.status.code == min(self.status.native, 0xFF), self.status
            return self.status.native
        assert self.status.kind == StatusKind.SUCCESS, self.status
        return 0


class FilesGuest:
    """A program of a guest, which an address space stands for. Another one is `program(SPACE)`."""

    def __init__(self, handler: BridgeHandler, space: int = PROGRAM, ring: int = 3) -> None:
        self.handler = handler
        self.bridge = Bridge(handler)
        self.space, self.ring = space, ring
        self.backend = FakeBackend()
        self.numbers = itertools.count(1)

    def program(self, space: int, ring: int = 3) -> "FilesGuest":
        """Another program of the same guest."""
        other = FilesGuest(self.handler, space, ring)
        other.numbers = self.numbers
        return other

    async def send(self, method: int, *values: int) -> Outcome:
        # Without paging, so an address is where the bytes are.
        registers = Registers(cr3=self.space)
        seq = next(self.numbers)
        event = TrapEvent(seq, TrapReason.VMCALL, registers, length=3, ring=self.ring)
        packet = BridgePacket(STANDARD_MAGIC, self.handler.REQUEST, method, *values)
        return await self.bridge.dispatch(BridgeContext(event, self.backend), packet)

    async def ask(self, method: int, *values: int) -> Answer:
        outcome = await self.send(method, *values)
        assert outcome.kind is OutcomeKind.HANDLED, outcome
        value1, value2, *stamps = outcome.response.values
        assert stamps == [STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4]
        return Answer(Status.decode(value1), value2)

    def place(self, address: int, data: bytes) -> int:
        self.backend.memory.regions[address] = bytearray(data)
        return address

    def text(self, text: str | bytes, address: int = NAME) -> int:
        raw = text if isinstance(text, bytes) else text.encode()
        return self.place(address, raw + b"\0\0")

    async def begin(self, name: str | bytes, size: int, mode: Mode = Mode.CREATE) -> Answer:
        return await self.ask(BEGIN, self.text(name), size, mode)

    async def put(self, handle: int, offset: int, data: bytes) -> Answer:
        return await self.ask(PUT, handle, offset, self.place(BYTES, data), len(data))

    async def get(self, handle: int, offset: int, size: int) -> tuple[Answer, bytes]:
        self.place(ROOM, bytes(size))
        answer = await self.ask(GET, handle, offset, ROOM, size)
        return answer, self.backend.memory[ROOM][: answer.value]

    async def end(self, handle: int, digest: bytes | None = None) -> Answer:
        if digest is None:
            return await self.ask(END, handle, 0, 0)
        return await self.ask(END, handle, self.place(DIGEST, digest), len(digest))

    async def length(self, handle: int) -> int:
        answer = await self.ask(LENGTH, handle)
        assert answer.error == 0
        return answer.value

    async def put_file(
        self, name: str, data: bytes, mode: Mode = Mode.CREATE, piece: int = MAX_PIECE
    ) -> int:
        """Put a whole file, from where it stands; returns its errno."""
        answer = await self.begin(name, len(data), mode)
        if answer.error:
            return answer.error
        handle = answer.value
        for at in range(await self.length(handle), len(data), piece):
            answer = await self.put(handle, at, data[at : at + piece])
            if answer.error:
                return answer.error
        return (await self.end(handle, sha256(data))).error

    async def get_file(self, name: str, piece: int = MAX_PIECE) -> bytes:
        """Get a whole file."""
        answer = await self.begin(name, 0, Mode.READ)
        assert answer.error == 0, answer
        found = b""
        while True:
            got, data = await self.get(answer.value, len(found), piece)
            assert got.error == 0
            if not data:
                break
            found += data
        assert (await self.end(answer.value, sha256(found))).error == 0
        return found


@asynccontextmanager
async def files_guest(folder: Path, **settings: object):
    """A guest with the handler `Files` on this folder."""
    async with Files(Files.Settings(folder=str(folder), sync=False, **settings)) as files:
        yield FilesGuest(files)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder, by path: bytes, or `None` for a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def leftovers(folder: Path) -> list[str]:
    """Temporary files."""
    return [path.name for path in folder.rglob(f"{RESERVED}*")]


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that repeat nowhere nearby."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(size)


def open_files() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - it is no folder of files


def pieces(size: int, piece: int) -> Iterator[tuple[int, int]]:
    """Offsets and lengths."""
    return ((at, min(piece, size - at)) for at in range(0, size, piece))
