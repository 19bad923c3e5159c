"""A typed method: from the words of a request to a call, and from what it gives to an answer.

- The class of a handler compiles each signature that is not `(self, vmi, packet)`, once.
- Everything is checked before the body runs: widths, members, lengths, addresses, encodings, and
  that each room can be written. So a body that ran was asked for something whole.
- value1 of the answer is a status (`bridge/status.py`) whose stage is the low byte of the method
  code; value2 is what the method gave. Of a parameter that is wrong the code is its number, from 1;
  0 is the block of a 32-bit guest.

| status | value2 | when |
|---|---|---|
| success | what the method gave | it returned |
| touch | an address | a page is not present: the guest touches it, and asks again |
| invalid parameters | 0 | a parameter is wrong |
| failed | 0 | the method raised `Failed` |

Where the words are:

| guest | words |
|---|---|
| 64-bit | value1 to value4 |
| 32-bit, a word for each value of the instruction at the most, no `U64` or `I64` | the same |
| 32-bit, else | in a block of memory at value1 |

A block has numbers of 64 bits: one for what the method gives, which the host writes, and then the
words. An x86 VMCALL has two values, and a word of 64 bits fits into no register of 32.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from vmibridge.bridge.context import BridgeContext
from vmibridge.bridge.contract import GuestRead
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.parameters import (
    GuestBytes,
    GuestInt,
    GuestText,
    Parameter,
    Room,
    number_reader,
    word_of,
)
from vmibridge.bridge.registers import form_of
from vmibridge.bridge.response import BridgeResponse
from vmibridge.bridge.status import Status, StatusKind
from vmibridge.errors import Failed, GuestMemoryError, GuestPageFaultError
from vmibridge.text import repr_of
from vmibridge.vm.memory import GuestMemory

_BLOCK = 0
"""The number of the block of a 32-bit guest, where a parameter that is wrong is told."""
_FIXED_FIELDS = 2
"""Of a register form: magic, and request with method."""
_UPPER_HALF = 0xFFFF_FFFF << 32
_MAX_READ = 64 << 10
"""Bytes of a read that travels with a trap."""


class _WrongParameterError(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


class TypedMethod:
    """The compiled signature of one method."""

    __slots__ = (
        "_context_at",
        "_count",
        "_is_for_host",
        "_is_wide",
        "_readers",
        "_stage",
        "_success",
        "parameters",
        "result",
    )

    def __init__(
        self,
        code: int,
        parameters: tuple[Parameter, ...],
        result: Parameter | None,
        context_at: int | None,
        *,
        is_for_host: bool = False,
    ) -> None:
        self.parameters: tuple[Parameter, ...] = parameters
        """In their order, without the context."""
        self.result: Parameter | None = result
        """What it gives the guest; `None`: nothing."""
        self._is_for_host = is_for_host
        self._count = sum(parameter.words for parameter in parameters)
        self._is_wide = any(
            parameter.is_wide for parameter in (*parameters, *([result] if result else []))
        )
        self._context_at = context_at
        # The common case, numbers alone, awaits nothing on its way to the body.
        self._readers = (
            [number_reader(parameter) for parameter in parameters]
            if all(isinstance(parameter.spec, GuestInt) for parameter in parameters)
            else None
        )
        self._stage = code & 0xFF
        self._success = Status(self._stage).encode()

    def reads(self, code: int) -> list[GuestRead]:
        """What it is known to read of a guest, as the method with this code."""
        found: list[GuestRead] = []
        value = 1
        for parameter in self.parameters:
            spec = parameter.spec
            if isinstance(spec, GuestText):
                end = 1 if spec.encoding == "utf-8" else 2
                found.append(GuestRead(value, min(spec.limit + end, _MAX_READ), method=code))
            elif isinstance(spec, GuestBytes):
                size = min(spec.limit, _MAX_READ)
                found.append(GuestRead(value, size, size_in=value + 1, method=code))
            value += parameter.words
        return found

    async def answer(
        self, body: Callable[..., Awaitable[object]], vmi: BridgeContext, packet: BridgePacket
    ) -> BridgeResponse[Any]:
        """Check the request, call the method, and say what it gave.

        Raises what the method raises, but for `Failed`; `TypeError` and `ValueError` when it gives
        something else than it says.
        """
        rooms: dict[int, Room] = {}
        block: int | None = None
        try:
            # Mostly numbers in registers: nothing is awaited on the way to the body.
            if self._readers is not None and vmi.event.width == 64:
                arguments = self._numbers(packet.values)
            else:
                words, block = await self._words_of(vmi, packet)
                arguments = await self._arguments(vmi.memory, words, rooms)
        except _WrongParameterError as wrong:
            return self._told(StatusKind.INVALID_PARAMETERS, wrong.number)
        except GuestMemoryError as error:
            return self._of_memory(error)
        if self._context_at is not None:
            arguments.insert(self._context_at, vmi)
        try:
            given = await body(*arguments)
        except Failed as failed:
            return self._told(StatusKind.FAILED, failed.code, failed.native)
        except GuestMemoryError as error:
            for number, room in rooms.items():
                if room.fault is error:
                    return self._of_memory(error, number)
            raise
        word = 0
        if self.result is not None:
            word = word_of(self.result, given)
            if block is not None:
                await vmi.memory.write(block, word.to_bytes(8, "little"))
        elif given is not None and not self._is_for_host:
            raise TypeError(f"the method gave {repr_of(given)[:80]}, and says that it gives None")
        return BridgeResponse(self._success, word, output=given)

    def _of_memory(self, error: GuestMemoryError, number: int = _BLOCK) -> BridgeResponse[Any]:
        if isinstance(error, GuestPageFaultError):
            return self._told(StatusKind.TOUCH, value2=error.address)
        return self._told(StatusKind.INVALID_PARAMETERS, number)

    def _told(
        self, kind: StatusKind, code: int = 0, native: int = 0, value2: int = 0
    ) -> BridgeResponse[Any]:
        return BridgeResponse(Status(self._stage, kind, code, native).encode(), value2)

    def _numbers(self, words: tuple[int, ...]) -> list[Any]:
        assert self._readers is not None
        try:
            return [read(word) for read, word in zip(self._readers, words, strict=False)]
        except ValueError:
            for number, (read, word) in enumerate(zip(self._readers, words, strict=False), 1):
                try:
                    read(word)
                except ValueError:
                    raise _WrongParameterError(number) from None
            raise

    async def _words_of(
        self, vmi: BridgeContext, packet: BridgePacket
    ) -> tuple[tuple[int, ...], int | None]:
        """The words, and the address of the block that they are in if they are in one."""
        if vmi.event.width == 64:
            return packet.values, None
        form = form_of(vmi.event.reason, vmi.event.width)
        if not self._is_wide and self._count <= len(form.names) - _FIXED_FIELDS:
            return tuple(map(_extended, packet.values, self._signs())), None
        size = 8 + 8 * self._count
        raw = await vmi.memory.read(packet.value1, size)
        await vmi.memory.check_writable(packet.value1, 8)
        words = [int.from_bytes(raw[at : at + 8], "little") for at in range(8, size, 8)]
        return tuple(words), packet.value1

    def _signs(self) -> list[bool]:
        """Which words are of a signed number."""
        signs: list[bool] = []
        for parameter in self.parameters:
            signed = isinstance(parameter.spec, GuestInt) and parameter.spec.signed
            signs += [signed] * parameter.words
        return signs

    async def _arguments(
        self, memory: GuestMemory, words: tuple[int, ...], rooms: dict[int, Room]
    ) -> list[Any]:
        arguments: list[Any] = []
        at = 0
        for number, parameter in enumerate(self.parameters, 1):
            word = words[at]
            size = words[at + 1] if parameter.words == 2 else 0
            at += parameter.words
            try:
                argument = await _argument(parameter, memory, word, size)
            except GuestPageFaultError:
                raise
            except (GuestMemoryError, ValueError):
                # `UnicodeDecodeError` is a ValueError.
                raise _WrongParameterError(number) from None
            if isinstance(argument, Room):
                rooms[number] = argument
            arguments.append(argument)
        return arguments


def _extended(word: int, signed: bool) -> int:
    """A word of 32 bits in 64."""
    return word | _UPPER_HALF if signed and word >> 31 else word


async def _argument(parameter: Parameter, memory: GuestMemory, word: int, size: int) -> object:
    spec = parameter.spec
    if isinstance(spec, GuestInt):
        return number_reader(parameter)(word)
    if parameter.optional and not word:
        return None
    if isinstance(spec, GuestText):
        if spec.encoding == "utf-8":
            return (await memory.read_c_string(word, spec.limit)).decode()
        return (await memory.read_c_utf16(word, spec.limit)).decode("utf-16-le")
    if size > spec.limit:
        raise ValueError("too long")
    if isinstance(spec, GuestBytes):
        return await memory.read(word, size)
    await memory.check_writable(word, size)
    return Room(memory, word, size)
