; A hypercall behind a comparison whose operand has all bits, in a block that began with flags which
; POPFQ set. "over" is said when the flags that are not of arithmetic are behind it as they were.
%ifndef KIND
%define KIND 2
%endif
%include "long_mode.inc"
KEPT equ 0x3FF72A                       ; all but CF PF AF ZF SF OF

main:
    mov ebp, 4
.again:
    mov esi, 0x7FFFFFFF
    push 2
    popfq
    cmp esi, -1
    mov ecx, 0x42494D56
    mov edx, 0x0100
%if KIND = 2
    vmcall
%else
    vmmcall
%endif
    pushfq
    pop rax
    and eax, KEPT
    mov ebx, 2
    call verdict
    dec ebp
    jnz .again
    SAY {"over", 10}
    ret
