"""Hand named values to the guest: configuration, tokens, variables of the host.

| 0x0001 GET | in | out |
|---|---|---|
| value1 | address of a name: UTF-8, at most 256 bytes, then a NUL | status |
| value2 | address of a buffer for the value | length of the value in bytes |
| value3 | capacity of the buffer in bytes; 0 stands for 256 | |

The value goes into the buffer with a NUL behind it, which its length does not count.

| status | when |
|---|---|
| invalid parameters | a name that is too long, no UTF-8 or not readable |
| | a buffer that is not writable |
| failed, native ENOENT | a name that is not handed out, whether the host has it or not |
| failed, native ERANGE | the buffer is too small: value2 is the capacity that it takes |

The native code is in the upper half of the status, which an x86 guest does not see; it
can tell the two failures by value2, which is 0 for the first.
"""

import errno
import os

import msgspec

from vmibridge import (
    BridgeContext,
    BridgePacket,
    BridgeResponse,
    GuestMemoryError,
    StandardHandler,
    Status,
    StatusKind,
    method,
)

MAX_NAME = 256
"""Bytes of a name, without its NUL."""
DEFAULT_CAPACITY = 256
"""Bytes of a buffer whose capacity is given as 0, as by every x86 VMCALL."""


class Environment(StandardHandler[str]):
    """Hands out the values that its settings list, and no others.

    Its output is the name that was asked for, never the value, which may be a secret;
    there is none when nothing was handed out.
    """

    REQUEST = 0x0022

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """What is handed out. Raises `ValueError` for a name that no guest could ask for."""

        values: dict[str, str] = msgspec.field(default_factory=dict)
        """Values by name."""
        names: list[str] = msgspec.field(default_factory=list)
        """Names that are handed out as they are in the environment of this process, read
        when the handler is made; one that is not set there is as unknown as any other."""

        def __post_init__(self) -> None:
            for name in (*self.values, *self.names):
                _check_name(name)
            for name in self.names:
                if name in self.values:
                    raise ValueError(f"{name!r} is listed both in values and in names")
            for name, value in self.values.items():
                # The value stays out of the message: it may be a secret.
                if "\0" in value:
                    raise ValueError(f"the value of {name!r} holds a NUL")
                if not _is_encodable(value):
                    raise ValueError(f"the value of {name!r} holds a lone surrogate")

    def __init__(self, settings: Settings | None = None) -> None:
        settings = settings or self.Settings()
        self._values = {name: value.encode() for name, value in settings.values.items()}
        for name in settings.names:
            value = os.environ.get(name)
            if value is not None:
                self._values[name] = os.fsencode(value)

    @method(0x0001)
    async def get(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str]:
        """Write the value of a name into a buffer of the guest."""
        stage = packet.method & 0xFF
        invalid = Status(stage, StatusKind.INVALID_PARAMETERS).encode()
        try:
            name = (await vmi.memory.read_c_string(packet.value1, MAX_NAME)).decode()
            value = self._values.get(name)
            if value is None:
                unknown = Status(stage, StatusKind.FAILED, native=errno.ENOENT)
                return BridgeResponse(unknown.encode(), 0)
            if len(value) + 1 > (packet.value3 or DEFAULT_CAPACITY):
                too_small = Status(stage, StatusKind.FAILED, native=errno.ERANGE)
                return BridgeResponse(too_small.encode(), len(value) + 1)
            await vmi.memory.write(packet.value2, value + b"\0")
        except (GuestMemoryError, UnicodeDecodeError):
            return BridgeResponse(invalid, 0)
        return BridgeResponse(Status(stage).encode(), len(value), output=name)


def _check_name(name: str) -> None:
    if not name or "\0" in name or "=" in name:
        raise ValueError(f"a name is not empty and holds neither NUL nor '=', got {name!r}")
    if not _is_encodable(name) or len(name.encode()) > MAX_NAME:
        raise ValueError(f"a name is UTF-8 text of at most {MAX_NAME} bytes, got {name!r}")


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
