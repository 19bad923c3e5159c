; Calls again and again, by HOW (1 CPUID, 2 VMCALL), and writes a letter: b when it begins, and then when
; what comes of a call changes:
; a answered, u undefined, s skipped (all registers as they were), n run natively.
%ifndef HOW
%define HOW 2
%endif
%include "long_mode.inc"
main:
    GATE 6, on_undefined
    mov al, 'b'
    mov dx, 0x3F8
    out dx, al
    xor r15d, r15d
poll:
    xor r14d, r14d
    mov r8d, 41
%if HOW = 1
    mov eax, 0x42494D56
    mov ebx, 0x5EED
    mov ecx, 0x00010100
    mov edx, 0x5EED
    cpuid
    cmp ebx, 0x5EED
    sete r13b
    cmp edx, ebx
    sete r12b
    and r13b, r12b
%else
    mov eax, 0x5EED
    mov ebx, 0x5EED
    mov ecx, 0x42494D56
    mov edx, 0x00010100
    vmcall
    cmp eax, 0x5EED
    sete r13b
%endif
    mov rdi, 0x213353522D494D56
    mov al, 'a'
    cmp rcx, rdi
    je .known
    mov al, 'u'
    test r14, r14
    jnz .known
    mov al, 's'
    test r13b, r13b
    jnz .known
    mov al, 'n'
.known:
    cmp al, r15b
    je poll
    mov r15b, al
    mov dx, 0x3F8
    out dx, al
    jmp poll
on_undefined:
    inc r14
    add qword [rsp], 3
    iretq
