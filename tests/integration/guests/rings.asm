; One VMCALL each from: 64-bit ring 0, 64-bit ring 3, 32-bit code of a 64-bit guest in
; ring 3 (compatibility mode: the x86 form). value1 of each is 1, 2, 3. The last one
; also runs a CPUID. Ends by an undefined instruction, for ring 3 cannot HLT: the
; guest's answers are at ANSWERS, 8 bytes each.

%include "bridge.inc"
%include "paging.inc"

REQUEST equ 0x0100
ANSWERS equ 0x300000

bits 64
org 0x100000
    default rel
    lgdt [gdt_pointer]
    ENABLE_PAGING_4_LEVEL
    mov r8d, 1
    BRIDGE_CALL BRIDGE_VMCALL, REQUEST, 3
    mov [abs ANSWERS], rax
    push 0x23                           ; ss: data, ring 3
    push 0x380000
    push 0x2b                           ; cs: 64-bit code, ring 3
    lea rax, [ring3]
    push rax
    retfq
ring3:
    mov r8d, 2
    BRIDGE_CALL BRIDGE_VMCALL, REQUEST, 3
    mov [abs ANSWERS + 8], rax
    push 0x33                           ; cs: 32-bit code, ring 3
    lea rax, [compatibility]
    push rax
    retfq
bits 32
compatibility:
    mov esi, 3
    BRIDGE_CALL BRIDGE_VMCALL, REQUEST, 3
    mov [ANSWERS + 16], eax
    mov ebx, 4
    BRIDGE_CALL BRIDGE_CPUID, REQUEST, 3
    mov [ANSWERS + 24], eax
    ud2

align 8
gdt:
    dq 0
    dq 0x00af9b000000ffff               ; 08: 64-bit code
    dq 0x00cf93000000ffff               ; 10: data
    dq 0x00cf9b000000ffff               ; 18: 32-bit code
    dq 0x00cff3000000ffff               ; 20: data, ring 3
    dq 0x00affb000000ffff               ; 28: 64-bit code, ring 3
    dq 0x00cffb000000ffff               ; 30: 32-bit code, ring 3
gdt_pointer:
    dw $ - gdt - 1
    dq gdt
