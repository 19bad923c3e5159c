"""Real machine code in Unicorn, through the whole engine. The guests check the answers."""

import anyio
import pytest

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgeResponse,
    BridgeServer,
    GuestMemoryError,
    OutcomeKind,
    TrapReason,
    method,
    open_backend,
)
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.errors import BackendError, BackendSpecError

pytestmark = pytest.mark.anyio

CPUID, VMCALL, VMMCALL = 1, 2, 3
HOWS = [
    pytest.param(CPUID, id="cpuid"),
    pytest.param(VMCALL, id="vmcall"),
    pytest.param(VMMCALL, id="vmmcall"),
]
PASSED = 0x600D
MASK64 = (1 << 64) - 1


class Echo(BridgeHandler[int]):
    """What the guests of `calls.asm` and `rings.asm` expect."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4

    @method(1)
    async def invert(self, vmi, packet):
        total = packet.value2 + packet.value3 + packet.value4 & MASK64
        return BridgeResponse(value1=~packet.value1 & MASK64, value2=total)

    @method(2)
    async def reverse(self, vmi, packet):
        data = await vmi.memory.read(packet.value1, packet.value3 or 8)
        await vmi.memory.write(packet.value2, data[::-1])
        return BridgeResponse()

    @method(3)
    async def ring(self, vmi, packet):
        await anyio.sleep(0)
        return BridgeResponse(value1=packet.value1 << 8 | vmi.event.ring).with_output(
            vmi.event.width
        )


class Misbehaves(BridgeHandler[None]):
    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0200
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3

    @method(1, timeout=0.05)
    async def hang(self, vmi, packet):
        await anyio.sleep_forever()

    @method(2)
    async def fail(self, vmi, packet):
        raise RuntimeError("as it was told to")

    @method(3, timeout=0.05)
    async def cancelled_in_mid_write(self, vmi, packet):
        await vmi.memory.write(0x200000, b"first")
        await anyio.sleep_forever()
        await vmi.memory.write(0x200000, b"never")

    @method(4)
    async def read_unmapped(self, vmi, packet):
        await vmi.memory.read(packet.value1, 4096)

    @method(5, timeout=0.05)
    async def block_in_a_thread(self, vmi, packet):
        await anyio.to_thread.run_sync(self.released.wait)

    def __init__(self):
        import threading

        self.released = threading.Event()


async def serve(spec, *handlers, **options):
    """Run a guest to its end: the outcomes, the summary, and the bytes at 2 MiB."""
    outcomes = []
    async with open_backend(spec) as backend:
        server = BridgeServer(backend, Bridge(*handlers), **options)
        async for outcome in server.run():
            outcomes.append(outcome)
        memory = bytes(backend._ram[0x200000:0x400000])
    return outcomes, server.summary, memory


def final(summary, vcpu=0):
    end = summary.guest.vcpus[vcpu]
    assert end.reason == "halted", end.detail
    return end.registers


class TestCalls:
    @pytest.mark.parametrize("how", HOWS)
    @pytest.mark.parametrize("paging", [0, 1], ids=["unpaged", "4-level"])
    async def test_x64_code_gets_every_register_right(self, build_guest, how, paging):
        image = build_guest("calls", WIDTH=64, HOW=how, PAGING=paging, COUNT=50)
        outcomes, summary, _ = await serve(f"unicorn:{image}", Echo())
        assert final(summary)["rax"] == PASSED
        assert [o.kind for o in outcomes] == [OutcomeKind.HANDLED] * 51
        assert {o.event.width for o in outcomes} == {64}

    @pytest.mark.parametrize("how", HOWS)
    @pytest.mark.parametrize("paging", [0, 1, 2], ids=["unpaged", "32-bit", "pae"])
    async def test_x86_code_gets_every_register_right(self, build_guest, how, paging):
        image = build_guest("calls", WIDTH=32, HOW=how, PAGING=paging, COUNT=50)
        outcomes, summary, _ = await serve(f"unicorn:{image}?width=32", Echo())
        assert final(summary)["rax"] == PASSED
        assert [o.kind for o in outcomes] == [OutcomeKind.HANDLED] * 51
        assert {o.event.width for o in outcomes} == {32}

    @pytest.mark.parametrize("how", HOWS)
    async def test_two_vcpus_share_memory_and_keep_their_order(self, build_guest, how):
        image = build_guest("calls", WIDTH=64, HOW=how, PAGING=1, COUNT=300)
        outcomes, summary, _ = await serve(f"unicorn:{image}?vcpus=2", Echo())
        assert final(summary, 0)["rax"] == final(summary, 1)["rax"] == PASSED
        for vcpu in (0, 1):
            seqs = [o.event.seq for o in outcomes if o.event.vcpu == vcpu]
            assert len(seqs) == 301
            assert seqs == sorted(seqs)
        assert sorted(o.event.seq for o in outcomes) == list(range(1, 603))

    async def test_a_full_queue_holds_the_vcpus_and_loses_nothing(self, build_guest):
        class Slow(Echo):
            @method(1)
            async def invert(self, vmi, packet):
                await anyio.sleep(0.001)
                return await super().invert(vmi, packet)

        image = build_guest("calls", WIDTH=64, HOW=CPUID, PAGING=1, COUNT=40)
        outcomes, summary, _ = await serve(f"unicorn:{image}?vcpus=4", Slow(), queue=1)
        assert [final(summary, vcpu)["rax"] for vcpu in range(4)] == [PASSED] * 4
        assert len(outcomes) == 4 * 41

    async def test_width_and_ring_come_from_the_code_segment(self, build_guest):
        outcomes, summary, _ = await serve(f"unicorn:{build_guest('rings')}", Echo())
        seen = [(o.event.reason, o.event.width, o.event.ring, o.writes.rax) for o in outcomes]
        assert seen == [
            (TrapReason.VMCALL, 64, 0, 0x100),
            (TrapReason.VMCALL, 64, 3, 0x203),
            (TrapReason.VMCALL, 32, 3, 0x303),
            (TrapReason.CPUID, 32, 3, 0x403),
        ]
        assert summary.guest.failed  # it ends by ud2, for ring 3 cannot halt

    @pytest.mark.parametrize("trap", ["vmcall", "cpuid"])
    async def test_a_code_segment_may_have_a_base(self, guest_code, trap):
        # 32-bit code of a 64-bit guest: eip counts from 0x100000, not from 0.
        code = f"""
            default rel
            lgdt [gdt_pointer]
            push 0x18
            push based - 0x100000
            retfq
        bits 32
        based:
            mov eax, {STANDARD_MAGIC}
            mov ebp, eax
            mov ecx, 0x30100
            mov edx, 0x30100
            {trap}
            hlt
        align 8
        gdt: dq 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b100000ffff
        gdt_pointer: dw $ - gdt - 1
            dq gdt"""
        outcomes, summary, _ = await serve(f"unicorn:{guest_code(code)}", Echo())
        assert [(o.kind, o.event.width) for o in outcomes] == [(OutcomeKind.HANDLED, 32)]
        assert outcomes[0].event.length == (2 if trap == "cpuid" else 3)
        final(summary)


class TestNotOurs:
    async def test_10_000_cpuids_give_the_same_answers_with_and_without_a_bridge(self, build_guest):
        image = build_guest("leaves")
        _, bare, without = await serve(f"unicorn:{image}")
        outcomes, summary, with_bridge = await serve(f"unicorn:{image}", Echo())
        assert final(bare)["rax"] == final(summary)["rax"] == 10_000
        assert outcomes == []
        assert with_bridge == without
        assert any(without)

    async def test_a_vmcall_of_others_ends_the_run_with_a_diagnosis(self, guest_code):
        image = guest_code("mov ecx, 0x12345678\n vmcall\n hlt")
        outcomes, summary, _ = await serve(f"unicorn:{image}", Echo())
        assert outcomes == []
        (end,) = summary.guest.vcpus
        assert end.reason == "crashed"
        assert "vmcall that no handler claims (magic 0x12345678) at 0x100005" in end.detail

    @pytest.mark.parametrize(
        ("code", "told"),
        [
            ("ud2", "undefined instruction at 0x100000 (0f 0b"),
            ("db 0xf0, 0x0f, 0x01, 0xc1", "undefined instruction"),
            ("int3", "exception 3 (#BP)"),
            ("int 0x80", "interrupt 0x80"),
            ("xor ecx, ecx\n div ecx", "exception 0 (#DE)"),
            ("mov rax, [0x70000000]", "read of 0x70000000"),
            ("mov [0x70000000], rax", "write to 0x70000000"),
            ("mov eax, 0x70000000\n jmp rax", "jump to 0x70000000"),
        ],
    )
    async def test_what_would_raise_an_exception_ends_the_run(self, guest_code, code, told):
        _, summary, _ = await serve(f"unicorn:{guest_code(code)}", Echo())
        (end,) = summary.guest.vcpus
        assert end.reason == "crashed"
        assert told in end.detail

    async def test_ours_without_a_handler_for_the_request_moves_on(self, build_guest):
        image = build_guest("one_call", HOW=VMCALL, REQUEST=0x7777, METHOD=1, VALUE=5)
        outcomes, summary, _ = await serve(f"unicorn:{image}", Echo())
        assert [o.kind for o in outcomes] == [OutcomeKind.UNMATCHED]
        assert final(summary)["rbx"] == 0x1234
        assert final(summary)["r15"] == PASSED


class TestPrefixes:
    @pytest.mark.parametrize(
        ("code", "length"),
        [
            ("db 0x66, 0x0f, 0x01, 0xc1", 4),
            ("db 0x2e, 0x48, 0x0f, 0x01, 0xd9", 5),
            ("db 0x3e, 0x0f, 0xa2", 3),
        ],
    )
    async def test_a_prefixed_trap_resumes_behind_all_of_it(self, guest_code, code, length):
        source = f"""
            mov eax, {STANDARD_MAGIC}
            mov ecx, eax
            mov edx, 0x10100
            cmp byte [rel trap + {length - 1}], 0xa2
            jne trap
            mov ecx, 0x10100
        trap: {code}
            mov r15d, {PASSED}
            hlt"""
        outcomes, summary, _ = await serve(f"unicorn:{guest_code(source)}", Echo())
        assert [o.event.length for o in outcomes] == [length]
        assert final(summary)["r15"] == PASSED


class Test16Bit:
    @pytest.mark.parametrize("base", [0x7C00, 0x10_0000])
    @pytest.mark.parametrize("trap", ["cpuid", "vmcall"])
    async def test_a_16_bit_guest_gets_an_error_outcome_and_goes_on(self, guest_code, base, trap):
        source = f"""
            mov eax, {STANDARD_MAGIC}
            mov ebp, eax
            mov ecx, 0x100
            mov edx, 0x10100
            {trap}
            call down
            hlt
        down:
            mov bx, 0x600d
            ret"""
        image = guest_code(source, width=16, org=base if base < 0x10000 else 0x10)
        outcomes, summary, _ = await serve(f"unicorn:{image}?width=16&base={base:#x}", Echo())
        assert [(o.kind, o.event.width) for o in outcomes] == [(OutcomeKind.FAILED, 16)]
        assert "16-bit" in outcomes[0].error
        assert final(summary)["rbx"] == PASSED
        assert final(summary)["rax"] == STANDARD_MAGIC


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


class TestSpecs:
    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ("width=48", "width"),
            ("width=wide", "width=wide is not a number of bits"),
            ("memory=5", "whole pages"),
            ("memory=0", "whole pages"),
            ("memory=lots", "memory=lots is not a size"),
            ("base=0x10000000", "outside"),
            ("base=-1", "outside"),
            ("vcpus=0", "1 to 64"),
            ("vcpus=65", "1 to 64"),
            ("vcpus=2&memory=64KiB&base=0", "no room"),
            ("width=16&base=0x200000", "reach"),
            ("colour=red", "no option 'colour'"),
            ("width=64&width=32", "given twice"),
            ("width", "OPTION=VALUE"),
        ],
    )
    async def test_a_wrong_option_is_named(self, build_guest, options, told):
        with pytest.raises(BackendSpecError, match=told):
            open_backend(f"unicorn:{build_guest('leaves')}?{options}")

    @pytest.mark.parametrize("spec", ["", "unicorn", "nothing:here", "unicorn:"])
    async def test_a_spec_that_names_no_vm_is_refused(self, spec):
        with pytest.raises(BackendSpecError):
            open_backend(spec)

    async def test_an_image_that_is_not_there_or_does_not_fit_is_told(self, tmp_path):
        with pytest.raises(BackendSpecError, match="no such file"):
            async with open_backend(f"unicorn:{tmp_path}/nothing.bin"):
                pass
        for size in (0, 8192):
            (tmp_path / "image.bin").write_bytes(bytes(size))
            with pytest.raises(BackendError, match="do not fit"):
                async with open_backend(
                    f"unicorn:{tmp_path}/image.bin?base=0&memory=64KiB"
                    if size == 0
                    else f"unicorn:{tmp_path}/image.bin?base=0xf000&memory=64KiB"
                ):
                    pass

    async def test_what_the_block_raises_is_raised_as_it_is(self, build_guest):
        with pytest.raises(KeyError):
            async with open_backend(f"unicorn:{build_guest('leaves')}"):
                raise KeyError("mine")
