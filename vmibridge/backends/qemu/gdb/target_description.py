"""The target description that a stub sends: where its registers are.

It comes in XML documents that include others, each in parts as large as a packet. A stub is as
hostile as any peer: the number of documents and their size are bounded.
"""

from collections.abc import Awaitable, Callable

from vmibridge.backends.qemu.gdb import commands
from vmibridge.backends.qemu.gdb.commands import ReplyError
from vmibridge.backends.qemu.gdb.registers import (
    MAX_ANNEXES,
    MAX_DESCRIPTION,
    Description,
    RegisterLayout,
    layout_of,
    parse_description,
)

__all__ = ["read_layout"]

Ask = Callable[[bytes], Awaitable[bytes]]


async def read_layout(ask: Ask, chunk: int) -> RegisterLayout:
    """Read the description in parts of `chunk` bytes, by `ask`, which gives the reply to a command.

    Raises `ReplyError` and `StubError` for one that cannot be used, and what `ask` raises.
    """
    # An include stands for the document that it names, at its place.
    found: list[Description] = []
    waiting, seen, size = ["target.xml"], set[str](), 0
    while waiting:
        annex = waiting.pop(0)
        if annex in seen or len(seen) >= MAX_ANNEXES:
            raise ReplyError(f"a target description with too many parts: {annex!r}")
        seen.add(annex)
        document = await _read_annex(ask, chunk, annex, MAX_DESCRIPTION - size)
        size += len(document)
        found.append(parse_description(document))
        waiting[:0] = found[-1].includes
    return layout_of(found)


async def _read_annex(ask: Ask, chunk: int, annex: str, room: int) -> bytes:
    document, last = bytearray(), False
    while not last:
        command = commands.read_feature(annex, len(document), chunk)
        part, last = commands.parse_part(await ask(command))
        document += part
        if len(document) > room or not (part or last):
            raise ReplyError("a target description that has no end")
    return bytes(document)
