"""A guest in stock QEMU, with the plugin, against the whole engine. The guest checks the answers.

`make qemu` brings a QEMU. In CI it is brought here; elsewhere the tests are skipped without one.
"""

import signal
from functools import partial

import anyio
import pytest
from children import opened, run, run_beside
from micro_guest import (
    ALL,
    ALL_RIGHT,
    CPUID,
    ENDLESS,
    HOLD,
    NOT_ANSWERED,
    REVERSE,
    VMCALL,
    OfAnother,
    Work,
)
from needs import needs
from patience import HUNG

from vmibridge.backends.qemu.plugin.build import build_plugin
from vmibridge.errors import BackendError

pytestmark = pytest.mark.anyio


async def test_each_instruction_is_answered(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with machine.host(work):
            assert await machine.run(HOW=ALL, COUNT=900) == ALL_RIGHT, machine.done.stderr
    assert machine.outcomes == {"handled": 900}
    assert machine.ends == [(0, "halted")]
    assert work.where == {("cpuid", 3, 64, 0), ("vmcall", 4, 64, 0), ("vmmcall", 4, 64, 0)}


async def test_a_handler_reads_and_writes_the_memory_of_the_guest(machine):
    with anyio.fail_after(HUNG):
        async with machine.host(Work()):
            assert await machine.run(METHOD=REVERSE, COUNT=200) == ALL_RIGHT
    assert machine.outcomes == {"handled": 200}


@pytest.mark.no_cover
@pytest.mark.parametrize("count", [2000, pytest.param(20_000, marks=pytest.mark.slow)])
async def test_many_thousand_traps(machine, count):
    with anyio.fail_after(HUNG):
        async with machine.host(Work()):
            assert await machine.run(HOW=VMCALL, COUNT=count) == ALL_RIGHT
    assert machine.outcomes == {"handled": count}


async def test_the_host_may_start_last(machine):
    statuses = []

    async def run():
        statuses.append(await machine.run(",absent=wait,verbose=on", COUNT=50))

    with anyio.fail_after(HUNG):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await anyio.sleep(1)
            assert not statuses
            async with machine.host(Work()):
                pass
    assert (statuses, machine.outcomes) == ([ALL_RIGHT], {"handled": 50})
    assert machine.done.stderr == b"vmibridge plugin: vCPU 0 has a host\n"


@pytest.mark.parametrize("arguments", ["", ",absent=wait,patience=0.3"])
async def test_without_a_host_the_guest_goes_on_natively(machine, arguments):
    with anyio.fail_after(HUNG):
        assert await machine.run(arguments, HOW=CPUID) == NOT_ANSWERED


async def test_a_host_that_stops_lets_the_guest_go_on_natively(machine):
    work, statuses = Work(), []

    async def run():
        statuses.append(await machine.run(HOW=CPUID, COUNT=ENDLESS))

    with anyio.fail_after(HUNG):
        async with anyio.create_task_group() as tasks, machine.host(work) as server:
            tasks.start_soon(run)
            await work.begun.wait()
            server.stop()
    assert (statuses, machine.ends) == ([NOT_ANSWERED], [(0, "stopped")])
    assert machine.outcomes["handled"] >= 100


async def test_a_qemu_that_is_killed_in_a_trap_is_lost(machine):
    work = Work()
    with anyio.fail_after(HUNG):
        async with (
            machine.host(work),
            opened(machine.command(METHOD=HOLD)) as process,
        ):
            await work.begun.wait()
            process.send_signal(signal.SIGKILL)
            await process.wait()
    assert machine.ends == [(0, "lost")]


async def test_what_is_not_ours_is_not_trapped(machine):
    with anyio.fail_after(HUNG):
        async with machine.host(OfAnother()) as server:
            assert await machine.run(HOW=CPUID) == NOT_ANSWERED
    assert not machine.outcomes
    assert (server.summary.native, machine.ends) == (0, [(0, "halted")])


@pytest.mark.parametrize(
    "wrong",
    ["magic=x", "patience=soon", "absent=maybe", "cpuid=perhaps", "compat=", "what=1"],
)
async def test_a_wrong_argument_is_named(machine, wrong):
    with anyio.fail_after(HUNG):
        assert await machine.run(f",{wrong}") == 1
    assert f"vmibridge plugin: wrong argument: {wrong}" in machine.done.stderr.decode()


async def test_a_socket_is_needed(machine):
    command = [part.partition(",socket=")[0] for part in machine.command()]
    with anyio.fail_after(HUNG):
        done = await run_beside(command)
    assert done.returncode == 1
    assert b"needs socket=PATH" in done.stderr


def test_a_compiler_that_is_missing_or_fails_is_told(tmp_path):
    build = partial(build_plugin, tmp_path / "plugin.so")
    with pytest.raises(BackendError, match="no C compiler 'none': install gcc"):
        build("none")
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'a: note' >&2\necho 'a: error: bad' >&2\nexit 1\n")
    compiler.chmod(0o700)
    with pytest.raises(BackendError, match=r"failed: a: error: bad$"):
        build(str(compiler))
    assert not (tmp_path / "plugin.so").exists()


OLD_QEMU = """
#include <dlfcn.h>
#include <stdbool.h>
#include <stdint.h>
struct info { const char *target; struct { int min, cur; } version; bool system; int vcpus[2]; };
int main(int count, char **arguments)
{
    void *plugin = dlopen(arguments[1], RTLD_LAZY);
    int (*install)(uint64_t, struct info *, int, char **) = dlsym(plugin, "qemu_plugin_install");
    struct info info = {"x86_64", {0, 4}, true, {1, 1}};
    return install(1, &info, count - 2, arguments + 2);
}
"""


def test_a_qemu_of_another_plugin_api_is_told_both_versions(plugin, tmp_path):
    (tmp_path / "old.c").write_text(OLD_QEMU)
    run([needs("cc"), "-o", tmp_path / "old", tmp_path / "old.c", "-ldl"], check=True)
    done = run([tmp_path / "old", plugin, "socket=s"])
    assert done.returncode == 1
    assert done.stderr == (
        "vmibridge plugin: this QEMU has plugin API 0 to 4, and the plugin needs 7"
        " (QEMU 11.1 or later)\n"
    )


@pytest.mark.parametrize("wrong", ["verbose=maybe", "ram=/none"])
async def test_an_argument_that_makes_no_sense_ends_qemu(machine, wrong):
    with anyio.fail_after(HUNG):
        assert await machine.run(f",{wrong}") == 1
    assert b"vmibridge plugin: " in machine.done.stderr
