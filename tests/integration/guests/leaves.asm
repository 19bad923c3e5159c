; Executes 10,000 CPUIDs over many leaves and subleaves, basic, extended and none of
; either, and stores every answer at ANSWERS: eax, ebx, ecx, edx of each. No leaf is
; the magic of a handler. Ends with eax = the number of CPUIDs.

ANSWERS equ 0x200000

bits 64
org 0x100000
    mov edi, ANSWERS
    xor r15d, r15d
again:
    mov eax, r15d
    and eax, 0x1f                       ; basic leaves 0 to 31
    test r15d, 0x20
    jz .basic
    or eax, 0x80000000                  ; extended leaves
.basic:
    test r15d, 0x400
    jz .known
    imul eax, r15d, 0x9e3779b1          ; anything at all
.known:
    mov ecx, r15d
    shr ecx, 6
    and ecx, 7                          ; subleaves 0 to 7
    cpuid
    mov [rdi], eax
    mov [rdi + 4], ebx
    mov [rdi + 8], ecx
    mov [rdi + 12], edx
    add rdi, 16
    inc r15d
    cmp r15d, 10000
    jb again
    mov eax, r15d
    hlt
