"""Guests of vmi-rs, as far as a host sees them: which registers they load, in which order, and what
they make of an answer. Written after the protocol (docs/protocol.md), on a `FakeGuest`."""

from collections.abc import Iterable, Mapping

import anyio

from vmibridge import (
    STANDARD_MAGIC,
    STANDARD_VERIFY_VALUE3,
    STANDARD_VERIFY_VALUE4,
    BridgePacket,
    Gate,
    RegisterWrites,
    Status,
    StatusKind,
)
from vmibridge.testing import FakeGuest

DEPLOY, FILE_TRANSFER = 0x0011, 0x0012
DOWNLOAD, EXECUTE, EXIT = 1, 2, 0xFFFF
BEGIN, SET_BUFFER, CHUNK, CLOSE = 1, 2, 3, 4
NAME, BUFFER = 0x1_0000, 0x10_0000
CHUNK_SIZE = 64 << 10
MEMORY = {NAME: bytes(4096), BUFFER: bytes(CHUNK_SIZE)}


def stamped(answer: RegisterWrites | None) -> bool:
    """Whether somebody has answered who knows the contract."""
    stamps = (STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4)
    return answer is not None and (answer.rcx, answer.rdx) == stamps


class DeployGuest:
    """Downloads with these HRESULTs, the last of which succeeds, and executes.

    Its state is its own, so it may be asked by one host after another: `patience` polls of each.
    """

    def __init__(self, downloads: Iterable[int] = (0,)) -> None:
        self.downloads = list(downloads)
        self.asked: list[tuple[int, ...]] = []
        self.polls = 0
        self.patience: int | None = None
        self.attempt, self.hresult = 0, 0
        self.stage = "download"
        self.done: Status | None = None

    async def run(self, vm: FakeGuest) -> None:
        """Go on from where it is; returns when it is done, or when this host has had its polls."""
        polls = 0
        while self.done is None:
            gate = await self.ask(vm)
            if gate == Gate.CONTINUE:
                self.pass_gate()
            elif gate == Gate.ABORT:
                self.done = Status(1, StatusKind.ABORTED)
            else:
                polls += 1
                self.polls += 1
                if polls == self.patience:
                    return
                await anyio.sleep(0)
        values = (self.done.encode(), 0)
        answer = await vm.call(BridgePacket(STANDARD_MAGIC, DEPLOY, EXIT, *values))
        assert stamped(answer)
        assert (answer.rax, answer.rbx) == (None, None)

    async def ask(self, vm: FakeGuest) -> int | None:
        values = (self.attempt, self.hresult) if self.stage == "download" else ()
        method = DOWNLOAD if self.stage == "download" else EXECUTE
        self.asked.append((method, *values))
        answer = await vm.call(BridgePacket(STANDARD_MAGIC, DEPLOY, method, *values))
        return answer.rax if stamped(answer) else None

    def pass_gate(self) -> None:
        if self.stage == "execute":
            self.done = Status(5)
            return
        self.hresult = self.downloads[self.attempt]
        if self.hresult:
            self.attempt += 1
        else:
            self.stage = "execute"


class FileTransferGuest:
    """Sends files, by name, from a guest that is in `space`."""

    def __init__(self, files: Mapping[str, bytes], space: int = 0x1000) -> None:
        self.files = files
        self.space = space
        self.sent: dict[str, bool] = {}
        """Whether the host has taken a file, by name."""
        self.handles: list[int] = []

    async def call(self, vm: FakeGuest, method: int, *values: int) -> int:
        packet = BridgePacket(STANDARD_MAGIC, FILE_TRANSFER, method, *values)
        answer = await vm.call(packet, address_space=self.space)
        assert stamped(answer)
        return answer.rax

    async def run(self, vm: FakeGuest) -> None:
        for number, (name, data) in enumerate(self.files.items()):
            self.sent[name] = await self.send(vm, number, name, data)
        packet = BridgePacket(STANDARD_MAGIC, FILE_TRANSFER, EXIT, Status(3).encode(), 0)
        answer = await vm.call(packet, address_space=self.space)
        assert stamped(answer)
        assert (answer.rax, answer.rbx) == (None, None)

    async def send(self, vm: FakeGuest, number: int, name: str, data: bytes) -> bool:
        raw = name.encode("utf-16-le", "surrogatepass")
        vm.memory.regions[NAME][: len(raw)] = raw
        begun = await self.call(vm, BEGIN, 0x40 + number, len(data), NAME, len(raw))
        chunk_size, handle = begun >> 12, begun & 0xFFF
        if not handle:
            return False
        assert chunk_size == CHUNK_SIZE
        self.handles.append(handle)
        if await self.call(vm, SET_BUFFER, handle, BUFFER) != Gate.CONTINUE:
            return await self.give_up(vm, handle)
        for at in range(0, len(data), chunk_size):
            piece = data[at : at + chunk_size]
            vm.memory.regions[BUFFER][: len(piece)] = piece
            if await self.call(vm, CHUNK, handle, len(piece)) != Gate.CONTINUE:
                return await self.give_up(vm, handle)
        return await self.call(vm, CLOSE, handle, 0) == Gate.CONTINUE

    async def give_up(self, vm: FakeGuest, handle: int) -> bool:
        await self.call(vm, CLOSE, handle, 0xFF)
        return False
