"""A policy, and real guests of several rings and address spaces."""

import pytest
from slow_jobs import (
    COMPARE_WITH_NATIVE,
    CPUID,
    PASSED,
    VMCALL,
    Jobs,
    count,
    end_of,
    kinds,
    serve,
    spec_of,
)

from vmibridge import (
    BridgeResponse,
    OutcomeKind,
)
from vmibridge.engine.access_policy import AddressRange, Policy, Quota, Rate

pytestmark = pytest.mark.anyio


# Descriptors for code that goes from ring 0 to ring 3.
GDT = """
align 8
gdt:
    dq 0
    dq 0x00af9b000000ffff               ; 08: 64-bit code
    dq 0x00cf93000000ffff               ; 10: data
    dq 0x00cff3000000ffff               ; 18: data, ring 3
    dq 0x00affb000000ffff               ; 20: 64-bit code, ring 3
gdt_pointer:
    dw $ - gdt - 1
    dq gdt
"""


def guest_of_two_rings(in_ring_3, after_ring_0="BRIDGE_CHECK_STAMPS failed"):
    """A VMCALL and a CPUID in ring 0, with a check after each; then code in ring 3.

    It ends by an undefined instruction, for ring 3 cannot halt. What it leaves in r15 is
    0x600d, or the ring where a check failed, plus 1: 1 or 4.
    """
    return f"""
        %include "bridge.inc"
        %include "paging.inc"
        default rel
        lgdt [gdt_pointer]
        ENABLE_PAGING_4_LEVEL
        mov r15d, 1
        mov r8d, 0x12345678
        BRIDGE_CALL BRIDGE_VMCALL, 0x300, 2
        {after_ring_0}
        mov r8d, 0x12345678
        BRIDGE_CALL BRIDGE_CPUID, 0x300, 2
        {after_ring_0}
        push 0x1b
        push 0x380000
        push 0x23
        lea rax, [ring3]
        push rax
        retfq
    ring3:
        mov r15d, 4
        {in_ring_3}
        mov r15d, {PASSED}
    failed:
        ud2
    {GDT}"""


def guest_of_two_address_spaces(calls):
    """Makes calls with page tables at 0x70000, then with tables at 0x7f000 that map the same.
    Ends with how many of them were answered, in rax and rbx.

    Before each other call it changes bits of CR3 that do not name the tables.
    """
    return f"""
        %include "bridge.inc"
        %include "paging.inc"
        default rel
        ENABLE_PAGING_4_LEVEL
        mov eax, [abs PAGE_TABLES]
        mov [abs 0x7f000], rax
        mov edi, PAGE_TABLES
        call make_calls
        mov r13d, r12d
        mov edi, 0x7f000
        call make_calls
        mov eax, r13d
        mov ebx, r12d
        hlt
    make_calls:
        xor r12d, r12d
        mov r15d, {calls}
    .again:
        mov cr3, rdi
        xor edi, 0x18                   ; PWT and PCD
        mov r8d, 0x12345678
        BRIDGE_CALL BRIDGE_VMCALL, 0x300, 2
        BRIDGE_CHECK_STAMPS .none
        inc r12d
    .none:
        dec r15d
        jnz .again
        ret"""


class TestAPolicy:
    @pytest.mark.parametrize(
        "denied", ["native", "skip", BridgeResponse(value2=0xDE1ED)], ids=["native", "skip", "told"]
    )
    @pytest.mark.parametrize("trap", ["cpuid", "vmcall"])
    async def test_keeps_ring_3_out_and_serves_the_kernel(self, guest_code, trap, denied):
        call = f"""
            mov r8d, 0x12345678
            mov ebx, 0x1234
            BRIDGE_CALL BRIDGE_{trap.upper()}, 0x300, 2"""
        checks = {
            ("cpuid", "native"): COMPARE_WITH_NATIVE,
            ("vmcall", "native"): "",
            ("cpuid", "skip"): "cmp eax, BRIDGE_MAGIC\n jne failed\n cmp ebx, 0x1234",
            ("vmcall", "skip"): "cmp ecx, BRIDGE_MAGIC\n jne failed\n cmp ebx, 0x1234",
            ("cpuid", "told"): "cmp eax, BRIDGE_MAGIC\n jne failed\n cmp ebx, 0xde1ed",
            ("vmcall", "told"): "cmp ecx, BRIDGE_MAGIC\n jne failed\n cmp ebx, 0xde1ed",
        }
        check = checks[trap, denied if isinstance(denied, str) else "told"]
        image = guest_code(guest_of_two_rings(f"{call}\n{check}\n jne failed"))
        policy = Policy(rings=frozenset({0}), denied=denied)
        outcomes, summary = await serve(spec_of(image), Jobs(), policy=policy)
        assert kinds(outcomes) == [OutcomeKind.HANDLED] * 2 + [OutcomeKind.DENIED]
        assert [outcome.event.ring for outcome in outcomes] == [0, 0, 3]
        assert outcomes[-1].error == "ring 3 is not allowed"
        (end,) = summary.guest.vcpus
        if (trap, denied) == ("vmcall", "native"):
            # What the instruction does without a host, and Unicorn has none.
            assert end.registers["r15"] == 4
            assert "vmcall" in end.detail
        else:
            assert end.registers["r15"] == PASSED
            assert "undefined instruction" in end.detail

    async def test_may_let_ring_3_in_and_keep_the_kernel_out(self, guest_code):
        code = guest_of_two_rings(
            """
            mov r8d, 0x12345678
            BRIDGE_CALL BRIDGE_VMCALL, 0x300, 2
            BRIDGE_CHECK_STAMPS failed""",
            after_ring_0="",
        )
        policy = Policy(rings=frozenset({3}), denied="skip")
        outcomes, summary = await serve(spec_of(guest_code(code)), Jobs(), policy=policy)
        assert kinds(outcomes) == [OutcomeKind.DENIED] * 2 + [OutcomeKind.HANDLED]
        assert summary.guest.vcpus[0].registers["r15"] == PASSED

    @pytest.mark.parametrize("how", [CPUID, VMCALL], ids=["cpuid", "vmcall"])
    async def test_names_the_code_that_may_ask_by_its_virtual_address(self, guest_code, how):
        # The same code is at 0x101000 and, by another virtual address, in ALIAS. The policy
        # has a range for each of two instructions of the latter; between them lies a third.
        code = f"""
            %include "bridge.inc"
            %include "paging.inc"
            default rel
            ENABLE_PAGING_4_LEVEL
            xor r12d, r12d              ; the calls that were answered, a bit for each
            mov r13d, 1
            call asks
            mov rax, ALIAS
            lea rcx, [asks]
            add rax, rcx
            call rax
            mov eax, r12d
            hlt
        %macro ASK 0
            mov r8d, 0x12345678
            BRIDGE_CALL {how}, 0x300, 2
            BRIDGE_CHECK_STAMPS %%none
            or r12d, r13d
        %%none:
            shl r13d, 1
        %endmacro
        times 0x101000 - 0x100000 - ($ - $$) db 0x90
        asks:
            ASK
        times 0x101100 - 0x100000 - ($ - $$) db 0x90
            ASK
        times 0x101200 - 0x100000 - ($ - $$) db 0x90
            ASK
            ret"""
        ranges = (
            AddressRange(0x4010_1000, 0x4010_10FF),
            AddressRange(0x4010_1200, 0x4010_12FF),
        )
        policy = Policy(instructions=ranges, denied="skip")
        outcomes, summary = await serve(spec_of(guest_code(code)), Jobs(), policy=policy)
        assert end_of(summary)["rax"] == 0b101_000
        assert [outcome.event.ip >> 8 for outcome in outcomes] == [
            *(0x1010, 0x1011, 0x1012),
            *(0x40_1010, 0x40_1011, 0x40_1012),
        ]
        denied = [outcome for outcome in outcomes if outcome.kind is OutcomeKind.DENIED]
        assert count(summary) == {"handled": 2, "denied": 4}
        assert denied[0].error == f"instruction at {denied[0].event.ip:#x} is not allowed"

    async def test_names_the_address_spaces_that_may_ask_by_their_roots(self, guest_code):
        policy = Policy(address_spaces=frozenset({0x70000}), denied="skip")
        image = guest_code(guest_of_two_address_spaces(calls=2))
        outcomes, summary = await serve(spec_of(image), Jobs(), policy=policy)
        spaces = [(outcome.event.address_space, outcome.kind.value) for outcome in outcomes]
        assert spaces == [(0x70000, "handled")] * 2 + [(0x7F000, "denied")] * 2
        assert (end_of(summary)["rax"], end_of(summary)["rbx"]) == (2, 0)
        # The root is named, not what else is in CR3.
        assert [outcome.event.registers.cr3 for outcome in outcomes[:2]] == [0x70000, 0x70018]

    async def test_gives_each_address_space_a_quota_of_its_own(self, guest_code):
        policy = Policy(address_space=Quota(requests=Rate(burst=10)), denied="skip")
        image = guest_code(guest_of_two_address_spaces(calls=50))
        outcomes, summary = await serve(spec_of(image), Jobs(), policy=policy)
        one_space = [OutcomeKind.HANDLED] * 10 + [OutcomeKind.DENIED] * 40
        assert kinds(outcomes) == 2 * one_space
        assert (end_of(summary)["rax"], end_of(summary)["rbx"]) == (10, 10)
