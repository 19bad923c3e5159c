; Traps in odd states of the CPU; KIND 1 CPUID, 2 VMCALL, 3 VMMCALL. Each says where it stands in
; value1, and the guest says by name whether all is as the hardware leaves it behind the instruction.
%ifndef KIND
%define KIND 2
%endif
%include "long_mode.inc"
VECTOR equ 0x40
ARITHMETIC equ 0xCD5                    ; CF PF AF ZF SF DF OF

; TRAP {bytes before the opcode}: value1 is its address. Only MOV and LEA before it: flags stay.
%macro TRAP 0-1+
%if KIND = 1
    mov eax, 0x42494D56
    mov ecx, 0x0100
%else
    mov ecx, 0x42494D56
    mov edx, 0x0100
%endif
    lea r8, [%%here]
%%here:
%if %0
    db %1
%endif
    OPCODE
%endmacro
%macro OPCODE 0
%if KIND = 1
    db 0x0F, 0xA2
%elif KIND = 2
    db 0x0F, 0x01, 0xC1
%else
    db 0x0F, 0x01, 0xD9
%endif
%endmacro

; FLAGS name, code: the flags that the code sets are there behind a trap in the same block.
%macro FLAGS 2+
    SAY {%1, ": "}
    FROM_THE_START
    %2
    pushfq
    pop r14
    jmp %%again
%%again:
    FROM_THE_START
    %2
    TRAP
    pushfq
    pop rax
    cld
    and eax, ARITHMETIC
    mov rbx, r14
    and ebx, ARITHMETIC
    call verdict
%endmacro
%macro FROM_THE_START 0
    mov edi, 1
    mov esi, 0x7FFFFFFF
    cmp edi, edi
    stc
%endmacro

main:
    GATE 1, on_debug
    GATE 6, on_undefined
    GATE VECTOR, on_interrupt
    GATE 3, on_breakpoint
    GATE 0x30, on_compatible
    GATE 0x31, on_with_base
    GATE 0x32, on_short
    FLAGS "carry", stc
    FLAGS "no carry", clc
    FLAGS "direction", std
    FLAGS "zero", xor edi, edi
    FLAGS "less", cmp edi, 2
    FLAGS "overflow", cmp esi, -1
    FLAGS "decrement keeps carry", dec edi
    FLAGS "shift", shl edi, 31

    ; An answer is all that changes: the rest of the registers is as it was.
    SAY "answer: "
    mov rbp, 0x1122334455667788
    mov r15, 0x99AABBCCDDEEFF00
    TRAP
    not rax
    mov rbx, r8
    xor rax, rbp
    xor rbx, rbp
    call verdict
    SAY "the others: "
    mov rax, 0x99AABBCCDDEEFF00
    mov rbx, r15
    call verdict

    ; Single steps: behind each instruction one, behind the trap, too.
    SAY "steps: "
    lea r12, [steps]
    mov r13, r12
    pushfq
    or dword [rsp], 0x100
    popfq
    nop
step1:
    nop
step2:
%if KIND = 1
    mov eax, 0x42494D56
step3:
    mov ecx, 0x0100
step4:
%else
    mov ecx, 0x42494D56
step3:
    mov edx, 0x0100
step4:
%endif
    lea r8, [step5]
step5:
    OPCODE
step6:
    nop
step7:
    pushfq
step8:
    and dword [rsp], ~0x100
step9:
    popfq
    nop
    mov rax, [r13 + 5 * 8]
    lea rbx, [step6]
    call verdict
    SAY "their number: "
    mov rax, r12
    sub rax, r13
    shr rax, 3
    mov ebx, 10                         ; behind POPFQ, too, whose TF was set when it began
    call verdict
    SAY "step in DR6: "
    mov rax, [first_dr6]
    and eax, 0x4000
    mov ebx, 0x4000
    call verdict

    ; MOV SS shields the trap from the step behind MOV SS; behind the trap there is one.
    SAY "step behind mov ss: "
    lea r12, [steps]
%if KIND = 1
    mov eax, 0x42494D56
    mov ecx, 0x0100
%else
    mov ecx, 0x42494D56
    mov edx, 0x0100
%endif
    mov edi, DATA
    lea r8, [shielded]
    pushfq
    or dword [rsp], 0x100
    popfq
    mov ss, edi
shielded:
    OPCODE
behind_shielded:
    pushfq
    and dword [rsp], ~0x100
    popfq
    mov rax, [steps]
    lea rbx, [behind_shielded]
    call verdict

    ; An interrupt that is pending comes behind the instruction behind STI, and not later.
    SAY "interrupt behind sti: "
    mov rdi, APIC
    mov dword [rdi + 0x300], 0x44000 | VECTOR
    mov qword [interrupted], 0
%if KIND = 1
    mov eax, 0x42494D56
    mov ecx, 0x0100
%else
    mov ecx, 0x42494D56
    mov edx, 0x0100
%endif
    lea r8, [enabled]
    sti
enabled:
    OPCODE
behind_enabled:
    nop
    nop
    cli
    mov rax, [interrupted]
    lea rbx, [behind_enabled]
    call verdict

    ; RF holds for one instruction: the breakpoint on the next one is met.
    SAY "RF: "
    lea rax, [behind_resumed]
    mov dr0, rax
    mov eax, 0x401
    mov dr7, rax
    lea r12, [steps]
    mov qword [steps], 0
%if KIND = 1
    mov eax, 0x42494D56
    mov ecx, 0x0100
%else
    mov ecx, 0x42494D56
    mov edx, 0x0100
%endif
    lea r8, [resumed]
    mov rdi, rsp
    push DATA
    push rdi
    push 0x10002
    push CODE64
    push r8
    iretq
resumed:
    OPCODE
behind_resumed:
    nop
    xor eax, eax
    mov dr7, rax
    mov rax, [steps]
    lea rbx, [behind_resumed]
    call verdict

    ; Prefixes: REX before another prefix does not count; LOCK is refused by the processor.
    SAY "rex before a prefix: "
    TRAP 0x48, 0x3E
    not rax
    mov rbx, r8
    call verdict
    SAY "rex twice: "
    TRAP 0x48, 0x41
    not rax
    mov rbx, r8
    call verdict
    SAY "lock: "
    mov qword [undefined], 0
    TRAP 0xF0
    mov rax, [undefined]
    mov rbx, r8
    call verdict

    ; The same page at another address, before and after.
    SAY "alias: "
    mov r14d, 3
.alias:
    lea rax, [aliased]
    call rax
    lea rax, [aliased]
    mov ebx, 0x40000000
    add rax, rbx
    call rax
    dec r14d
    jnz .alias
    mov rax, [sum]
    mov ebx, 3 * 0x40000000
    call verdict

    ; The end of a page, and across it.
    SAY "end of a page: "
%if KIND = 1
    mov eax, 0x42494D56
    mov ecx, 0x0100
%else
    mov ecx, 0x42494D56
    mov edx, 0x0100
%endif
    jmp at_end
align 4096
    times 4096 - 12 - 2 - (KIND > 1) db 0x90
at_end:
    lea r8, [last]
    stc
    jmp short last
    nop
    nop
last:
    OPCODE
    setc dil
    not rax
    mov rbx, r8
    call verdict
    SAY "its flags: "
    movzx eax, dil
    mov ebx, 1
    call verdict
    SAY "across pages: "
%if KIND = 1
    mov eax, 0x42494D56
    mov ecx, 0x0100
%else
    mov ecx, 0x42494D56
    mov edx, 0x0100
%endif
    jmp near_end
align 4096
    times 4096 - 1 - 8 db 0x90
near_end:
    lea r8, [across]
    stc
across:
    OPCODE
    setc dil
    not rax
    mov rbx, r8
    call verdict
    SAY "its flags: "
    movzx eax, dil
    mov ebx, 1
    call verdict

    ; Hundreds in one block: what has no magic runs natively.
    SAY "many in a block: "
    mov r15d, 0
%if KIND = 1
    xor eax, eax
%endif
%rep 600
%if KIND = 1
    stc
    mov eax, 1
    cpuid
    adc r15d, 0
%else
    stc
    TRAP
    adc r15d, 0
%endif
%endrep
    mov eax, r15d
    mov ebx, 600
    call verdict

    ; Ring 3, 64 bits; then 32 bits under odd selectors, with a base; then 16 bits.
    push USERSS
    push STACK3
    push 2
    push USER64
    lea rax, [ring3]
    push rax
    iretq
ring3:
    TRAP
    mov r14, rax
    not r14
    mov r15, r8
    int3
    ud2

on_breakpoint:
    SAY "ring 3: "
    mov rax, r14
    mov rbx, r15
    call verdict
    push USERSS
    push STACK3
    push 2
    push ODD32
    lea rax, [compatible]
    push rax
    iretq
bits 32
%macro TRAP32 1
%if KIND = 1
    mov eax, 0x42494D56
    mov ecx, 0x0100
    mov ebx, %1
    mov esi, %1
%else
    mov ebp, 0x42494D56
    mov edx, 0x0100
    mov esi, %1
%endif
%endmacro
compatible:
    TRAP32 .here
.here:
    OPCODE
    not eax
    mov edi, eax
    int 0x30
on_compatible:
bits 64
    SAY "32 bits: "
    mov eax, edi
    mov ebx, esi
    call verdict
    push USERSS
    push STACK3
    push 2
    push BASE32
    lea rax, [with_base]
    sub rax, 0x10000
    push rax
    iretq
bits 32
with_base:
    TRAP32 (.here - 0x10000)
.here:
    OPCODE
    not eax
    mov edi, eax
    int 0x31
on_with_base:
bits 64
    SAY "32 bits with a base: "
    mov eax, edi
    mov ebx, esi
    call verdict
    push USERSS
    push STACK3
    push 2
    push CODE16
    lea rax, [short_code]
    sub rax, 0x100000
    push rax
    iretq
bits 16
short_code:
    TRAP32 (.here - 0x100000)
.here:
    OPCODE
    not eax
    mov edi, eax
    int 0x32
on_short:
bits 64
    SAY {"16 bits: over", 10}
    jmp leave_qemu

aliased:
    TRAP
    mov rax, r8
    lea rbx, [aliased.end]
.end:
    lea rcx, [aliased]
    add rax, 0
    mov rbx, 0x40000000
    and rbx, rcx
    add [abs sum], rbx
    ret

on_debug:
    mov [first_dr6], rax
    mov rax, dr6
    xchg rax, [first_dr6]
    push rax
    mov rax, [rsp + 8]
    mov [r12], rax
    add r12, 8
    xor eax, eax
    mov dr6, rax
    or dword [rsp + 24], 0x10000
    pop rax
    iretq
on_undefined:
    push rax
    mov rax, [rsp + 8]
    mov [undefined], rax
    add rax, 3 + (KIND > 1)
    mov [rsp + 8], rax
    pop rax
    iretq
on_interrupt:
    push rax
    mov rax, [rsp + 8]
    mov [interrupted], rax
    mov rax, APIC
    mov dword [rax + 0xB0], 0
    pop rax
    iretq
align 8
sum: dq 0
undefined: dq 0
interrupted: dq 0
first_dr6: dq 0
steps: times 32 dq 0
