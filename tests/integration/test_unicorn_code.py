"""Code that changes under a Unicorn vCPU: mapped elsewhere, or written by a handler."""

import pytest
from base_handlers import StandardHandler
from unicorn_parts import final, serve

from vmibridge import BridgeResponse, OutcomeKind, TrapReason, method
from vmibridge.bridge.contract import STANDARD_MAGIC

pytestmark = pytest.mark.anyio

PASSED = 0x600D
PAGE_A, PAGE_B, WINDOW = 0x30_0000, 0x30_1000, 0x60_0000

PAGED = f"""
%include "paging.inc"
    ENABLE_PAGING_4_LEVEL
    mov rax, 0x7a007                    ; one page at WINDOW, by a table of its own
    mov [abs PAGE_TABLES + 0x2000 + 3 * 8], rax
    MAP {PAGE_A}
"""
MACROS = f"""
%macro MAP 1
    mov rax, %1 | 7
    mov [abs 0x7a000], rax
    mov rax, cr3
    mov cr3, rax
%endmacro
%macro COPY 2                           ; from a label, to a physical address
    lea rsi, [%1]
    mov edi, %2
    mov ecx, 32
    rep movsb
%endmacro
%macro RUN 0
    mov edx, 0x10100
    mov ecx, {STANDARD_MAGIC}
    mov eax, {WINDOW}
    call rax
%endmacro
%macro WRITE 2                          ; the handler writes a byte at a virtual address
    mov r8d, %1
    mov r9d, %2
    mov edx, 0x20100
    mov ecx, {STANDARD_MAGIC}
    vmcall
%endmacro
%macro MUST_BE 1
    cmp ebx, %1
    jne failed
%endmacro
    default rel
"""
END = f"""
    mov r15d, {PASSED}
    hlt
failed:
    ud2
"""


class Writes(StandardHandler):
    """Writes a byte of value2 at value1."""

    @method(1)
    async def nothing(self, vmi, packet):
        return BridgeResponse()

    @method(2)
    async def write(self, vmi, packet):
        await vmi.memory.write(packet.value1, bytes([packet.value2 & 0xFF]))
        return BridgeResponse()


async def run(guest_code, source):
    image = guest_code(MACROS + source)
    outcomes, summary, _ = await serve(f"unicorn:{image}", Writes())
    return outcomes, summary


class TestRemapped:
    async def test_a_shorter_trap_where_a_longer_one_was_has_its_own_length(self, guest_code):
        outcomes, summary = await run(
            guest_code,
            f"""{PAGED}
            COPY longer, {PAGE_A}
            COPY shorter, {PAGE_B}
            RUN
            MAP {PAGE_B}
            RUN
            {END}
        longer: db 0x66, 0x0f, 0x01, 0xc1, 0xc3
            times 32 db 0x90
        shorter: db 0x0f, 0x01, 0xc1, 0xc3, 0x0f, 0x0b
            times 32 db 0x90""",
        )
        assert [o.event.length for o in outcomes] == [4, 3]
        assert final(summary)["r15"] == PASSED

    async def test_another_kind_of_trap_is_reported_as_what_it_is(self, guest_code):
        outcomes, summary = await run(
            guest_code,
            f"""{PAGED}
            COPY first, {PAGE_A}
            COPY second, {PAGE_B}
            RUN
            MAP {PAGE_B}
            RUN
            {END}
        first: db 0x0f, 0x01, 0xc1, 0xc3
            times 32 db 0x90
        second: db 0x0f, 0x01, 0xd9, 0xc3
            times 32 db 0x90""",
        )
        assert [o.event.reason for o in outcomes] == [TrapReason.VMCALL, TrapReason.VMMCALL]
        assert final(summary)["r15"] == PASSED

    async def test_a_handler_writes_into_the_page_that_is_mapped_now(self, guest_code):
        _, summary = await run(
            guest_code,
            f"""{PAGED}
            COPY code, {PAGE_A}
            COPY code, {PAGE_B}
            RUN
            MAP {PAGE_B}
            RUN
            MUST_BE 1
            WRITE {WINDOW + 1}, 2
            RUN
            MUST_BE 2
            MAP {PAGE_A}
            RUN
            MUST_BE 1
            {END}
        code: db 0xbb, 1, 0, 0, 0, 0xc3
            times 32 db 0x90""",
        )
        assert final(summary)["r15"] == PASSED

    async def test_a_handler_writes_into_a_page_that_is_mapped_again_later(self, guest_code):
        _, summary = await run(
            guest_code,
            f"""{PAGED}
            COPY code, {PAGE_A}
            COPY code, {PAGE_B}
            RUN
            MAP {PAGE_B}
            WRITE {PAGE_A + 1}, 2
            RUN
            MUST_BE 1
            MAP {PAGE_A}
            RUN
            MUST_BE 2
            {END}
        code: db 0xbb, 1, 0, 0, 0, 0xc3
            times 32 db 0x90""",
        )
        assert final(summary)["r15"] == PASSED


class TestWrittenByAHandler:
    @pytest.mark.parametrize("flag", ["stc", "clc"])
    async def test_what_is_right_behind_a_cpuid_is_seen_at_once(self, guest_code, flag):
        # One block: Unicorn has translated all of it when the CPUID traps. What it does to
        # memory and registers on its way to the block's end must be undone, too.
        outcomes, summary = await run(
            guest_code,
            f"""
            mov dword [abs 0x200000], 7
            lea r8, [changed + 1]
            mov r9d, 2
            mov ecx, 0x20100
            mov eax, {STANDARD_MAGIC}
            {flag}
            cpuid
            setc r12b
        changed:
            mov ebx, 1
            mov [abs 0x200000 + rbx * 4], ebx
            add r14d, ebx
            cmp r14d, 2
            jne failed
            cmp dword [abs 0x200004], 0
            jne failed
            cmp dword [abs 0x200008], 2
            jne failed
            {END}""",
        )
        assert [o.kind for o in outcomes] == [OutcomeKind.HANDLED]
        assert final(summary)["r15"] == PASSED
        assert final(summary)["r12"] == (flag == "stc")

    async def test_data_beside_code_costs_no_translation(self, guest_code):
        _, summary = await run(
            guest_code,
            f"""
            mov r13d, 100
        again:
            lea r8, [data]
            mov r9d, r13d
            mov edx, 0x20100
            mov ecx, {STANDARD_MAGIC}
            vmcall
            cmp [data], r13b
            jne failed
            dec r13d
            jnz again
            {END}
        data: db 0""",
        )
        assert final(summary)["r15"] == PASSED


class TestLocked:
    @pytest.mark.parametrize("magic", [STANDARD_MAGIC, 0], ids=["ours", "others"])
    @pytest.mark.parametrize("prefixes", ["0xf0", "0x66, 0xf0, 0x48", "0xf0, 0x2e"])
    async def test_a_locked_cpuid_is_an_undefined_instruction(self, guest_code, magic, prefixes):
        outcomes, summary = await run(
            guest_code,
            f"""
            mov eax, {magic}
            mov ecx, 0x10100
            mov ebx, 5
        trap:
            db {prefixes}, 0x0f, 0xa2
            mov ebx, 6
            hlt""",
        )
        (end,) = summary.guest.vcpus
        assert outcomes == []
        assert end.reason == "crashed"
        assert "undefined instruction at 0x10000f (" in end.detail
        assert (end.registers["rip"], end.registers["rbx"]) == (0x10_000F, 5)


class TestSegments:
    async def test_the_first_entry_of_an_ldt_is_a_code_segment(self, guest_code):
        outcomes, summary = await run(
            guest_code,
            f"""
            lgdt [gdt_pointer]
            mov ax, 0x18
            lldt ax
            push 4
            push narrow
            retfq
        bits 32
        narrow:
            mov ebp, {STANDARD_MAGIC}
            mov edx, 0x10100
            vmcall
            hlt
        align 8
        ldt: dq 0x00cf9b000000ffff
        gdt: dq 0, 0x00af9b000000ffff, 0x00cf93000000ffff
            dw 7, (ldt - $$ + 0x100000) & 0xffff
            db (ldt - $$ + 0x100000) >> 16, 0x82
            dq 0
            dd 0
        gdt_pointer: dw $ - gdt - 1
            dq gdt""",
        )
        assert [(o.kind, o.event.width) for o in outcomes] == [(OutcomeKind.HANDLED, 32)]
        final(summary)


class TestSingleStep:
    @pytest.mark.parametrize("trap", ["cpuid", "vmcall"])
    @pytest.mark.parametrize("code", [1, 2], ids=["reads", "writes-code"])
    async def test_the_exception_comes_right_behind_the_trap(self, guest_code, trap, code):
        # Unicorn delivers none: the vCPU ends there, and nothing behind has run.
        outcomes, summary = await run(
            guest_code,
            f"""
            lea r8, [behind + 1]
            mov r9d, 6
            mov ecx, {code << 16 | 0x100}
            mov edx, ecx
            mov eax, {STANDARD_MAGIC}
            {"mov ecx, eax" if trap == "vmcall" else ""}
            pushfq
            or qword [rsp], 1 << 8
            popfq
            {trap}
        behind:
            mov esi, 5
            mov esi, 7
            hlt""",
        )
        (end,) = summary.guest.vcpus
        assert [o.kind for o in outcomes] == [OutcomeKind.HANDLED]
        assert "exception 1 (#DB)" in end.detail
        event = outcomes[0].event
        assert (end.registers["rip"], end.registers["rsi"]) == (event.ip + event.length, 0)
