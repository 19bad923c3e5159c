"""Generated programs leave behind on each backend what a processor leaves behind.

A failure prints the seed and the shrunk program. By hand, with figures:
`cd tests && python -m transparency.run --backend plugin --seed 0 --count 1000`.
"""

import os
from dataclasses import replace
from functools import partial

import pytest
from needs import needs

from transparency.gdb_machine import GdbMachine
from transparency.generator import generate
from transparency.kvm_machine import DEVICE as KVM
from transparency.kvm_machine import KvmMachine, af_of_shifts
from transparency.profiles import (
    BY_BREAKPOINTS,
    BY_BREAKPOINTS_OF_7_2,
    BY_KVM,
    BY_PLUGIN_API_ALONE,
    EVERYTHING,
    NO_EXCEPTIONS,
)
from transparency.qemu_machine import PluginMachine
from transparency.search import find
from transparency.unicorn_machine import UnicornMachine
from vmibridge.backends.qemu.plugin.build import build_plugin

pytestmark = pytest.mark.anyio
LONG = [pytest.param(at, marks=pytest.mark.slow) for at in range(100_000, 200_000, 20_000)]


@pytest.fixture
def anyio_backend():
    """What is tested are backends, not loops."""
    return "asyncio"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    return build_plugin(tmp_path_factory.mktemp("plugin") / "plugin.so")


async def hold(machine, profile, first, count):
    """The programs of `count` seeds show no difference."""
    found = await find(machine, profile, range(first, first + count), until=3)
    assert not found.reports, "\n\n".join(found.reports.values())
    assert found.programs == count


class TestUnicorn:
    async def test_programs(self):
        await hold(UnicornMachine, NO_EXCEPTIONS, 0, 250)

    @pytest.mark.parametrize("first", LONG)
    async def test_many_programs(self, first):
        await hold(UnicornMachine, NO_EXCEPTIONS, first, 20_000)


class TestPlugin:
    async def test_programs(self, qemu, plugin):
        await hold(partial(PluginMachine, qemu, plugin), EVERYTHING, 0, 400)

    async def test_programs_by_the_plugin_api_alone(self, qemu, plugin):
        machine = partial(PluginMachine, qemu, plugin, ",inside=off")
        await hold(machine, BY_PLUGIN_API_ALONE, 0, 150)

    @pytest.mark.parametrize("first", LONG)
    async def test_many_programs(self, qemu, plugin, first):
        await hold(partial(PluginMachine, qemu, plugin), EVERYTHING, first, 20_000)


class TestGdb:
    async def test_programs(self, qemu):
        await hold(partial(GdbMachine, qemu), BY_BREAKPOINTS, 0, 40)

    async def test_programs_on_the_qemu_of_the_system(self):
        system = needs("qemu-system-x86_64")
        await hold(partial(GdbMachine, system), BY_BREAKPOINTS_OF_7_2, 1000, 40)

    @pytest.mark.parametrize("first", LONG[:1])
    async def test_many_programs(self, qemu, first):
        await hold(partial(GdbMachine, qemu), BY_BREAKPOINTS, first, 5_000)


class TestReference:
    @pytest.mark.skipif(not os.access(KVM, os.R_OK | os.W_OK), reason=f"no {KVM}")
    async def test_a_processor_does_as_the_reference_says(self):
        machine = KvmMachine()
        profile = replace(BY_KVM, af_of_shifts=af_of_shifts())
        await hold(lambda: machine, profile, 0, 150)
        assert machine.compared > 70


class TestPrograms:
    def test_a_seed_is_always_the_same_program(self):
        first, second = generate(7), generate(7)
        assert first.listing() == second.listing()
        assert first.expected == second.expected

    def test_what_has_to_be_there_is_there(self):
        """A generator that makes only simple programs would find nothing, and pass."""
        seen = set()
        for seed in range(400):
            linked = generate(seed)
            program, end = linked.program, linked.expected
            seen |= {f"width {program.width}", f"ring {program.ring}"}
            seen |= {f"vector {logged.vector}" for logged in end.log}
            seen |= {shown.reason for shown in end.shown}
            seen |= {"LDT"} if program.selector & 4 else set()
            seen |= {"base"} if program.base else set()
            seen |= {"patch"} if linked.has_patches else set()
            seen |= {"handler patches"} if any(a.writes for a in linked.answers) else set()
            seen |= {type(step).__name__ for step in program.main}
            pages = {shown.ip & 0xFFF for shown in end.shown if shown.width == 64}
            seen |= {"page end"} if any(at > 0xFF0 for at in pages) else set()
        assert seen >= {
            *("width 64", "width 32", "width 16", "ring 0", "ring 3", "cpuid", "vmcall", "vmmcall"),
            *("vector 1", "vector 6", "vector 13", "vector 80", "LDT", "base", "patch"),
            *("handler patches", "Remap", "Switch", "Patch", "Call", "Branch", "page end"),
        }
