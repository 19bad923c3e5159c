; A multiboot guest in 32-bit protected mode: COUNT calls by HOW, the low half of each answer and
; both stamps checked. Ends as micro.asm does.
%include "bridge.inc"
%ifndef COUNT
%define COUNT 100
%endif
%ifndef HOW
%define HOW BRIDGE_VMCALL
%endif
BASE equ 0x100000
bits 32
org BASE
header:
    dd 0x1BADB002, 0x00010003, -(0x1BADB002 + 0x00010003)
    dd BASE, BASE, 0, 0, start
start:
    cli
    mov esp, 0x90000
    xor edi, edi
.next:
    push edi
%if HOW = BRIDGE_CPUID
    mov ebx, edi
    xor edx, edx
%else
    mov esi, edi
%endif
    BRIDGE_CALL HOW, 0x0100, 1
    pop edi
    BRIDGE_CHECK_STAMPS wrong
    not eax
    cmp eax, edi
    jne wrong
    inc edi
    cmp edi, COUNT
    jb .next
    mov al, 0x10
    jmp leave_qemu
wrong:
    mov al, 0x11
leave_qemu:
    out 0xf4, al
.halt:
    hlt
    jmp .halt
