; A program of Linux that calls by CPUID, with buffers whose pages were never touched. Ends with 0
; when what came back is right; 64-bit and 32-bit.
%ifidn __?OUTPUT_FORMAT?__, elf64
    bits 64
%else
    bits 32
%endif
%include "called.inc"

%define ROOM 20000

section .text
global _start
_start:
    BRIDGE_CALLED_FILL BRIDGE_CPUID, 0x5a, theirs + 5, ROOM
    jnz failed
    cmp ebx, ROOM
    jne failed
    cmp byte [abs theirs + 5 + ROOM - 1], 0x5a
    jne failed
    cmp byte [abs theirs + 5 + ROOM], 0
    jne failed
    BRIDGE_CALLED_TOTAL BRIDGE_CPUID, 5, ours + 5, ROOM
    jnz failed
    cmp ebx, 5
    jne failed
    BRIDGE_CALLED_TEXTS BRIDGE_CPUID, none, more, 0
    jnz failed
    cmp ebx, 0xff0000
    jne failed
    xor edi, edi
    jmp end
failed:
    mov edi, 1
end:
%if __?BITS?__ == 64
    mov eax, 231
    syscall
%else
    mov ebx, edi
    mov eax, 252
    int 0x80
%endif

section .bss
alignb 4096
ours:   resb ROOM + 4096
alignb 4096
theirs: resb ROOM + 4096
alignb 4096
none:   resb 4096
more:   resb 4096
