"""The memory of a QEMU behind its gdbstub: physical for handlers, virtual for code.

The stub has one kind at a time, so what is asked for first switches it. A QEMU that reads
zeros where there is no memory, as 7.2 does, is asked for its regions by its monitor.
"""

from vmibridge.backends.qemu.gdb import commands
from vmibridge.backends.qemu.gdb.client import ClientLostError, GdbClient
from vmibridge.backends.qemu.gdb.commands import ReplyError, StubError
from vmibridge.backends.qemu.gdb.monitor import FLAT_VIEW, Region, parse_regions, within
from vmibridge.backends.qemu.ram import SharedRam
from vmibridge.errors import BackendError, GuestMemoryError

_NOWHERE = (1 << 52) - 4096
"""No machine has memory at the top of the physical addresses."""
_PAGE = 4096
_NO_MEMORY = "the VM has no memory there"


class QemuMemory:
    """Guest memory, while the VM stands still."""

    def __init__(self, client: GdbClient, ram: SharedRam | None = None) -> None:
        self._client = client
        self._ram = ram
        self._is_physical = False
        self._tells = True
        """Whether the stub says so where there is no memory."""
        self._regions: list[Region] = []

    async def open(self) -> None:
        """Find out what the stub can do. Raises `BackendError` for one that is not QEMU's."""
        try:
            commands.check_ok(await self._client.ask(commands.MEMORY_IS_PHYSICAL))
        except StubError as error:
            raise BackendError("the stub has no physical memory: it is not QEMU's") from error
        self._is_physical = True
        reply = await self._client.ask(commands.read_memory(_NOWHERE, 1))
        self._tells = reply[:1] == b"E"
        await self.learn_regions()

    async def learn_regions(self) -> None:
        """Ask for the regions; without a monitor there are none."""
        try:
            self._regions = parse_regions(await self._client.monitor(FLAT_VIEW))
        except (StubError, ReplyError):
            self._regions = []

    async def read_virtual(self, address: int, size: int) -> bytes | None:
        """Through the page tables of the vCPU that was stopped; `None` where nothing is mapped.

        Raises `ClientLostError`.
        """
        if address < 0:
            return None
        try:
            return await self._client.read_memory(address, size, self._switch(physical=False))
        except (StubError, ReplyError):
            return None

    async def read_code(self, address: int, most: int) -> bytes:
        """As many bytes as are mapped. Raises `ClientLostError`."""
        within_page = min(most, _PAGE - address % _PAGE)
        code = await self.read_virtual(address, within_page) or b""
        if code and within_page < most:
            following = (address + within_page) % (1 << 64)
            code += await self.read_virtual(following, most - within_page) or b""
        return code

    async def read_physical(self, address: int, size: int) -> bytes:
        """Raises `GuestMemoryError`."""
        if self._ram is not None and (known := self._ram.read(address, size)) is not None:
            return known
        try:
            if not self._tells:
                await self._check(address, size, write=False)
            return await self._client.read_memory(address, size, self._switch(physical=True))
        except (ClientLostError, StubError, ReplyError) as error:
            raise _memory_error(address, error) from error

    async def write_physical(self, address: int, data: bytes) -> None:
        """Raises `GuestMemoryError`."""
        try:
            if not self._tells or len(data) > self._client.chunk:
                await self._check(address, len(data), write=True)
            await self._client.write_memory(address, data, self._switch(physical=True))
        except (ClientLostError, StubError, ReplyError) as error:
            raise _memory_error(address, error) from error

    def virtual(self) -> list[bytes]:
        """The commands, if any, that make memory virtual, as the next debugger expects it."""
        return self._switch(physical=False)

    def _switch(self, *, physical: bool) -> list[bytes]:
        # Commands are done in the order in which they are sent, so this is so from here on.
        if self._is_physical == physical:
            return []
        self._is_physical = physical
        return [commands.MEMORY_IS_PHYSICAL if physical else commands.MEMORY_IS_VIRTUAL]

    async def _check(self, address: int, size: int, *, write: bool) -> None:
        # The guest may have changed the map since: its firmware does.
        for again in (False, True):
            if again:
                await self.learn_regions()
            if not self._regions or within(self._regions, address, size, write=write):
                return
        raise GuestMemoryError(address, _NO_MEMORY)


def _memory_error(address: int, error: Exception) -> GuestMemoryError:
    if isinstance(error, StubError):
        return GuestMemoryError(address, _NO_MEMORY)
    if isinstance(error, ClientLostError):
        return GuestMemoryError(address, "the VM is gone")
    return GuestMemoryError(address, str(error))
