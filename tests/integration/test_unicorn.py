"""Real machine code in Unicorn, through the whole server: calls, and what is not ours."""

import anyio
import pytest
from unicorn_parts import CPUID, HOWS, PASSED, VMCALL, Echo, final, serve

from vmibridge import (
    OutcomeKind,
    TrapReason,
    method,
    open_backend,
)
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.errors import BackendError, BackendSpecError

pytestmark = pytest.mark.anyio


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
            ("mov rax, [abs 0x70000000]", "read of 0x70000000"),
            ("mov [abs 0x70000000], rax", "write to 0x70000000"),
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
        for size, why in ((0, "is empty, and no image"), (8192, "8192 bytes do not fit at base")):
            (tmp_path / "image.bin").write_bytes(bytes(size))
            with pytest.raises(BackendError, match=why):
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
