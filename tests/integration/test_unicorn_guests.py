"""Real machine code in Unicorn: handlers that misbehave, guests that never end, guest memory."""

import anyio
import pytest
from unicorn_parts import HOWS, PASSED, VMCALL, Echo, Misbehaves, final, serve

from vmibridge import (
    Bridge,
    BridgeResponse,
    BridgeServer,
    GuestMemoryError,
    OutcomeKind,
    method,
    open_backend,
)
from vmibridge.bridge.contract import STANDARD_MAGIC

pytestmark = pytest.mark.anyio


class TestMisbehavingHandlers:
    @pytest.mark.parametrize("how", HOWS)
    @pytest.mark.parametrize(
        ("method_code", "kind"),
        [
            (1, OutcomeKind.TIMEOUT),
            (2, OutcomeKind.FAILED),
            (3, OutcomeKind.TIMEOUT),
            (4, OutcomeKind.FAILED),
            (9, OutcomeKind.REJECTED),
        ],
        ids=["hangs", "raises", "cancelled-in-mid-write", "unmapped", "unknown-method"],
    )
    async def test_the_guest_goes_on_with_its_registers_unchanged(
        self, build_guest, how, method_code, kind
    ):
        image = build_guest(
            "one_call", HOW=how, REQUEST=0x200, METHOD=method_code, VALUE=0x7000_0000
        )
        outcomes, summary, memory = await serve(f"unicorn:{image}", Misbehaves())
        assert [o.kind for o in outcomes] == [kind]
        assert final(summary)["rbx"] == 0x1234
        assert final(summary)["r15"] == PASSED
        assert b"never" not in memory
        if method_code == 3:
            assert memory.startswith(b"first")

    async def test_a_configured_fallback_reaches_the_guest(self, build_guest):
        image = build_guest("one_call", HOW=VMCALL, REQUEST=0x200, METHOD=1, VALUE=0)
        fallback = BridgeResponse(value2=0xBAD)
        _, summary, _ = await serve(f"unicorn:{image}", Misbehaves(), fallback=fallback)
        assert final(summary)["rbx"] == 0xBAD
        assert final(summary)["rcx"] == STANDARD_MAGIC  # no stamp without an answer

    async def test_a_handler_that_blocks_a_thread_does_not_hold_its_vcpu(self, build_guest):
        image = build_guest("one_call", HOW=VMCALL, REQUEST=0x200, METHOD=5, VALUE=0)
        handler = Misbehaves()
        async with open_backend(f"unicorn:{image}") as backend:
            server = BridgeServer(backend, Bridge(handler))
            run = server.run()
            outcome = await anext(run)
            assert outcome.kind is OutcomeKind.TIMEOUT
            assert not handler.released.is_set()
            handler.released.set()
            assert [o async for o in run] == []
        assert final(server.summary)["r15"] == PASSED


class TestEndlessGuests:
    @pytest.mark.parametrize(
        "code",
        [
            "jmp $",
            "again: inc rax\n jmp again",
            "again: mov esi, 0x1000\n mov ecx, esi\n rep lodsb\n jmp again",
        ],
    )
    async def test_one_is_stopped_when_its_block_is_left(self, guest_code, code):
        async with open_backend(f"unicorn:{guest_code(code)}") as backend:
            server = BridgeServer(backend, Bridge(Echo()))
            with anyio.move_on_after(0.1) as scope:
                async for _ in server.run():
                    pytest.fail("it makes no traps")
        assert scope.cancelled_caught

    async def test_one_does_not_hold_up_another_guest_or_its_handlers(
        self, guest_code, build_guest
    ):
        busy = f"unicorn:{guest_code('jmp $')}"
        image = build_guest("calls", WIDTH=64, HOW=VMCALL, PAGING=0, COUNT=200)
        async with open_backend(busy, vm="busy") as endless, anyio.create_task_group() as tasks:
            endless_server = BridgeServer(endless, Bridge(Echo()))

            async def spin():
                async for _ in endless_server.run():
                    pytest.fail("it makes no traps")

            tasks.start_soon(spin)
            outcomes, summary, _ = await serve(f"unicorn:{image}", Echo())
            assert final(summary)["rax"] == PASSED
            assert len(outcomes) == 201
            endless_server.stop()
        assert [end.reason for end in endless_server.summary.guest.vcpus] == ["stopped"]

    async def test_one_that_traps_for_ever_is_stopped_too(self, guest_code):
        code = f"again: mov ecx, {STANDARD_MAGIC}\n mov edx, 0x10100\n vmcall\n jmp again"
        async with open_backend(f"unicorn:{guest_code(code)}?vcpus=2") as backend:
            server = BridgeServer(backend, Bridge(Echo()))
            seen = 0
            async with server.run() as outcomes:
                async for _ in outcomes:
                    seen += 1
                    if seen == 100:
                        break
        assert server.summary.total >= 100
        assert [end.reason for end in server.summary.guest.vcpus] == ["stopped", "stopped"]

    async def test_a_vcpu_that_waits_for_a_handler_is_let_go_on_shutdown(self, build_guest):
        image = build_guest("one_call", HOW=VMCALL, REQUEST=0x200, METHOD=1, VALUE=0)

        class Hangs(Misbehaves):
            @method(1, timeout=3600)
            async def hang(self, vmi, packet):
                waiting.set()
                await anyio.sleep_forever()

        waiting = anyio.Event()
        outcomes = []
        async with open_backend(f"unicorn:{image}") as backend, anyio.create_task_group() as tasks:
            server = BridgeServer(backend, Bridge(Hangs()))

            async def stop():
                await waiting.wait()
                server.stop()

            tasks.start_soon(stop)
            outcomes = [outcome async for outcome in server.run()]
        assert [o.kind for o in outcomes] == [OutcomeKind.CANCELLED]


class TestGuestMemory:
    @pytest.mark.parametrize("trap", ["cpuid", "vmcall"])
    @pytest.mark.parametrize("paging", [False, True], ids=["unpaged", "paged"])
    @pytest.mark.parametrize("aliases", [64, 0], ids=["tracked", "too-many-aliases"])
    async def test_code_that_a_handler_writes_is_what_the_guest_runs_next(
        self, guest_code, trap, paging, aliases, monkeypatch
    ):
        monkeypatch.setattr("vmibridge.backends.unicorn.code._MAX_ALIASES", aliases)

        class Patches(Echo):
            @method(4)
            async def patch(self, vmi, packet):
                await vmi.memory.write(
                    packet.value1, b"\x41\xbf\x0d\x60\x00\x00"
                )  # mov r15d, 0x600d
                return BridgeResponse()

        code = f"""
            %include "paging.inc"
            {"ENABLE_PAGING_4_LEVEL" if paging else ""}
            lea rbx, [rel again]
            {"add rbx, ALIAS" if paging else ""}
            mov r14d, 3
            jmp rbx
        again:
            jmp patched
        patched: mov r15d, 0x0bad
            cmp r14d, 2
            jne on
            lea r8, [rel patched]
            mov eax, {STANDARD_MAGIC}
            mov ecx, {"eax" if trap == "vmcall" else 0x40100}
            mov edx, 0x40100
            {trap}
        on: dec r14d
            jnz again
            hlt"""
        outcomes, summary, _ = await serve(f"unicorn:{guest_code(code)}", Patches())
        assert [o.kind for o in outcomes] == [OutcomeKind.HANDLED]
        assert final(summary)["r15"] == PASSED

    async def test_code_at_any_number_of_virtual_addresses_takes_bounded_memory(self, guest_code):
        # One page of code, at 512 virtual pages: each alias runs a jump to the next.
        code = f"""
            %include "paging.inc"
            ENABLE_PAGING_4_LEVEL
            mov dword [abs PAGE_TABLES + 0x2008], PAGE_TABLES + 0x3007
            mov edi, PAGE_TABLES + 0x3000
            mov ecx, 512
            lea rax, [rel aliased]
            or rax, 7
        fill: mov [rdi], rax
            add rdi, 8
            dec ecx
            jnz fill
            mov ebx, 0x200000
            mov ecx, 512
            lea rdx, [rel done]
            mov rax, cr3
            mov cr3, rax
            jmp rbx
        done:
            mov eax, {STANDARD_MAGIC}
            mov ecx, 0x10100
            cpuid
            mov r15d, {PASSED}
            hlt
        align 4096
        aliased:
            add rbx, 4096
            dec ecx
            jz out
            jmp rbx
        out: jmp rdx"""
        async with open_backend(f"unicorn:{guest_code(code)}") as backend:
            server = BridgeServer(backend, Bridge(Echo()))
            kinds = [outcome.kind async for outcome in server.run()]
            (vcpu,) = backend._vcpus
            assert sum(len(page.aliases) for page in vcpu.code._pages.values()) < 100
        assert kinds == [OutcomeKind.HANDLED]
        assert final(server.summary)["r15"] == PASSED

    async def test_ring_3_cannot_have_the_host_read_what_it_could_not_read_itself(self, guest_code):
        # The page at 2 MiB is the kernel's: its entry lacks the user bit.
        code = """
            %include "bridge.inc"
            %include "paging.inc"
            default rel
            lgdt [gdt_pointer]
            ENABLE_PAGING_4_LEVEL
            mov dword [abs PAGE_TABLES + 0x2008], 0x200083
            mov rax, cr3
            mov cr3, rax
            push 0x1b
            push 0x400000
            push 0x23
            lea rax, [ring3]
            push rax
            retfq
        ring3:
            mov r8d, 0x200000
            mov r9d, 0x300000
            mov r10d, 8
            BRIDGE_CALL BRIDGE_VMCALL, 0x100, 2
            ud2
        align 8
        gdt: dq 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff
        gdt_pointer: dw $ - gdt - 1
            dq gdt"""
        outcomes, _, _ = await serve(f"unicorn:{guest_code(code)}", Echo())
        assert [o.kind for o in outcomes] == [OutcomeKind.FAILED]
        assert "0x200000: a supervisor page" in outcomes[0].error

    async def test_memory_is_out_of_reach_once_the_trap_is_answered(self, build_guest):
        kept = []

        class Keeps(Echo):
            @method(5)
            async def keep(self, vmi, packet):
                kept.append(vmi)
                return BridgeResponse()

        image = build_guest("one_call", HOW=VMCALL, REQUEST=0x100, METHOD=5, VALUE=0)
        async with open_backend(f"unicorn:{image}") as backend:
            async for _ in BridgeServer(backend, Bridge(Keeps())).run():
                with pytest.raises(GuestMemoryError, match="runs again"):
                    await kept[0].memory.read(0x100000, 1)
