"""Programs on the Unicorn backend: one VM each, which ends with the first exception."""

import tempfile
from pathlib import Path
from typing import Self

import anyio

from transparency import layout
from transparency.host import (
    GENERAL,
    NOTHING,
    Sink,
    compare_end,
    compare_memory,
    compare_trap,
    writes_of,
)
from transparency.processor import STRING_ORDER
from transparency.program import Linked
from vmibridge.backends.unicorn.backend import UnicornBackend, UnicornOptions
from vmibridge.vm.trap import TrapFilter

_NAMES = {
    6: ("undefined instruction", "VMCALL", "vmcall", "vmmcall"),
    13: ("#GP",),
    3: ("#BP",),
    1: ("#DB",),
}
_TIMEOUT = 60.0
"""Seconds."""


class UnicornMachine:
    """Runs programs one after the other."""

    def __init__(self) -> None:
        self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115 - closed on exit
        self._head, _ = layout.loader()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._file.close()

    async def run(self, linked: Linked) -> list[str]:
        """What is different from the reference."""
        image = self._head[: layout.TABLE_A - layout.IMAGE] + bytes(linked.ram)
        Path(self._file.name).write_bytes(image)
        backend = UnicornBackend(Path(self._file.name), UnicornOptions(memory=4 << 20))
        expected, sink = linked.expected, Sink()
        differences: list[str] = []

        async def answer() -> None:
            number = 0
            async for event in sink.events:
                shown = expected.shown[number] if number < len(expected.shown) else None
                differences.extend(compare_trap(number, event, shown))
                plan = linked.answers[number] if number < len(linked.answers) else NOTHING
                number += 1
                for address, data in plan.writes:
                    await backend.write_physical(event, address, data)
                await backend.resume(event, writes_of(event, plan))

        async with backend:
            with anyio.move_on_after(_TIMEOUT) as scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(answer)
                    end = await backend.run(TrapFilter(frozenset({layout.MAGIC})), sink)
                    tasks.cancel_scope.cancel()
            sink.close()
            if scope.cancelled_caught:
                return [*differences, "it does not end"]
            vcpu = end.vcpus[0]
            names = _NAMES.get(expected.vector, (f"interrupt {expected.vector:#x}",))
            if not any(name in vcpu.detail for name in names):
                differences.append(f"end: {vcpu.detail or vcpu.reason}, must be {names[0]}")
            registers = [0] * 16
            for name, at in zip(GENERAL, STRING_ORDER, strict=True):
                registers[at] = vcpu.registers[name]
            differences += compare_end(
                expected,
                registers=registers,
                rip=vcpu.registers["rip"],
                rflags=vcpu.registers["rflags"],
            )
            for address, last in (
                (layout.DATA, layout.STATE_END),
                (layout.CODE, layout.MEMORY_END),
            ):
                data = bytes(await backend.read_physical(None, address, last - address))
                differences += compare_memory(linked, address, data)
        return differences
