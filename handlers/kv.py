"""Keep named values for the guest, in a file that outlives it.

    [handlers.kv]
    path = "values.sqlite"

| method | takes | value2 out |
|---|---|---|
| 0x0001 GET | name, buffer | length of the value; what does not fit is left out |
| 0x0002 PUT | name, value | the version that the entry has now |
| 0x0003 DELETE | name | 1 if there was an entry, else 0 |
| 0x0004 NEXT | name, buffer | length of the name that follows in the order of bytes; 0: none |
| 0x0005 VERSION | name | the version of the entry; 0: there is none |
| 0x0006 PUT_IF | name, version, value | as PUT, if it has this version; 0: if there is none |

A name is the address of UTF-8 that ends with a NUL; values and buffers are an address and a length.
NEXT begins with an empty name, and writes no NUL. To change a value that others change, too, ask
for its version *first*, then for the value, and PUT_IF the new one: it was not touched in between.

| status | when |
|---|---|
| failed, code 1 | there is no such entry |
| failed, code 2 | the entry has another version |
| failed, code 3 | a name that is empty or longer than `max_name`, a value longer than `max_value` |
| failed, code 4 | no room for it: `max_entries`, `max_bytes`, or the disk |
| failed, code 5 | others hold the file locked, for longer than `patience` |
| failed, code 6 | the file cannot be opened or read, or is none of these |

The file is asked by `vmi.outside`: a replay gives the recorded answers, and opens no file.
"""

from functools import partial
from types import TracebackType
from typing import Annotated, Self

import msgspec

from vmibridge import (
    U32,
    U64,
    BridgeContext,
    Failed,
    GuestBytes,
    GuestRoom,
    GuestText,
    Room,
    StandardHandler,
    method,
)
from vmibridge.errors import MissingExtraError, ServerStateError
from vmibridge.handlers._kv_store import (
    Limits,
    Problem,
    Reply,
    Store,
    Work,
    apsw,
    delete_entry,
    get_value,
    next_name,
    put_value,
    version_of,
)

MAX_NAME = 256
"""Bytes of a name, without its NUL."""
MAX_VALUE = 1 << 20
"""Bytes of a value."""

Name = Annotated[str, GuestText(MAX_NAME)]
Value = Annotated[bytes, GuestBytes(MAX_VALUE)]
Buffer = Annotated[Room, GuestRoom(MAX_VALUE)]


class Kv(StandardHandler[int]):
    """Keeps values by name. Raises `MissingExtraError` without APSW."""

    REQUEST = 0x0112

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """Where and how much. Raises `ValueError` if a value is out of range."""

        path: str = ""
        """The file; several VMs and servers may have the same. Without one, values are kept in
        memory, and end with the handler."""
        common: bool = False
        """Whether all VMs see the same entries; else each sees those of VMs of its name."""
        max_name: int = 256
        """Bytes of a name, at most."""
        max_value: int = 65536
        """Bytes of a value, at most."""
        max_entries: int = 4096
        """Entries of a VM, at most; with `common`, of all. So is the next one."""
        max_bytes: int = 16 << 20
        """Bytes of all names and values, at most."""
        patience: float = 1.0
        """Seconds to wait for others that hold the file locked."""

        def __post_init__(self) -> None:
            for name, most in (
                ("max_name", MAX_NAME),
                ("max_value", MAX_VALUE),
                ("max_entries", 1 << 32),
                ("max_bytes", 1 << 40),
            ):
                if not 1 <= getattr(self, name) <= most:
                    raise ValueError(f"{name} is 1 to {most}, got {getattr(self, name)!r}")
            if not 0 <= self.patience <= 10:
                raise ValueError(f"patience is 0 to 10 seconds, got {self.patience!r}")
            if "\0" in self.path:
                raise ValueError("path holds a NUL")

    def __init__(self, settings: Settings | None = None) -> None:
        if apsw is None:
            raise MissingExtraError("the kv handler", "kv")
        self._settings = settings or self.Settings()
        self._limits = Limits(self._settings.max_entries, self._settings.max_bytes)
        self._store: Store | None = None

    async def __aenter__(self) -> Self:
        """Make the connection, which opens its file when a guest asks."""
        self._store = Store(self._settings.path, self._settings.patience)
        await self._store.look()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close it, also while being cancelled."""
        opened, self._store = self._store, None
        if opened is not None:
            await opened.aclose()

    @method(0x0001)
    async def get(self, vmi: BridgeContext, name: Name, into: Buffer) -> U32:
        """Fill a buffer with a value; gives the length of the value in bytes."""
        value = (await self._ask(vmi, "get", get_value(self._scope(vmi), name))).data
        await into.fill(value[: into.capacity])
        return len(value)

    @method(0x0002)
    async def put(self, vmi: BridgeContext, name: Name, value: Value) -> U64:
        """Keep a value; gives its version."""
        return await self._put(vmi, name, value, None)

    @method(0x0003)
    async def delete(self, vmi: BridgeContext, name: Name) -> bool:
        """Take an entry away; gives whether there was one."""
        return bool((await self._ask(vmi, "delete", delete_entry(self._scope(vmi), name))).number)

    @method(0x0004)
    async def next(self, vmi: BridgeContext, name: Name, into: Buffer) -> U32:
        """Fill a buffer with the name that follows; gives its length in bytes, 0 at the end."""
        found = (await self._ask(vmi, "next", next_name(self._scope(vmi), name))).data
        await into.fill(found[: into.capacity])
        return len(found)

    @method(0x0005)
    async def version(self, vmi: BridgeContext, name: Name) -> U64:
        """The version of an entry; 0 where there is none."""
        return (await self._ask(vmi, "version", version_of(self._scope(vmi), name))).number

    @method(0x0006)
    async def put_if(self, vmi: BridgeContext, name: Name, version: U64, value: Value) -> U64:
        """Keep a value where the entry still has this version; gives its new one."""
        return await self._put(vmi, name, value, version)

    async def _put(self, vmi: BridgeContext, name: str, value: bytes, version: int | None) -> int:
        settings = self._settings
        if not 0 < len(name.encode()) <= settings.max_name or len(value) > settings.max_value:
            raise Failed(Problem.WRONG_SIZE)
        work = put_value(self._scope(vmi), name, value, self._limits, version)
        return (await self._ask(vmi, "put", work)).number

    def _scope(self, vmi: BridgeContext) -> str:
        return "" if self._settings.common else f"vm {vmi.vm}"

    async def _ask(self, vmi: BridgeContext, what: str, work: Work) -> Reply:
        if self._store is None:
            raise ServerStateError("the kv handler answers between __aenter__ and __aexit__")
        reply = await vmi.outside(f"kv {what}", partial(self._store.ask, work), type=Reply)
        if reply.problem:
            raise Failed(reply.problem)
        return reply
