; A multiboot guest in 32-bit protected mode that asks for a host without end, by a VMCALL, and counts what
; becomes of it: answered, undefined (#UD), or nothing at all (skipped). Its counters go along as value1
; (undefined) and value2 (skipped). The table behind the header has the trap's address and the counters'.
; Ends by isa-debug-exit at 0xf4 with 0x11 (status 35) if anything else becomes of it.
BASE equ 0x100000
MARK equ 0x11111111
bits 32
org BASE
header:
    dd 0x1BADB002, 0x00010003, -(0x1BADB002 + 0x00010003)
    dd BASE, BASE, 0, 0, start
    dd site, answered, undefined, skipped
start:
    cli
    mov esp, 0x90000
    lgdt [gdt_pointer]
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    jmp 8:flat
flat:
    mov eax, on_undefined
    mov [idt + 6 * 8], ax
    mov word [idt + 6 * 8 + 2], 8
    mov word [idt + 6 * 8 + 4], 0x8E00
    shr eax, 16
    mov [idt + 6 * 8 + 6], ax
    lidt [idt_pointer]
next:
    mov ebp, 0x42494D56
    mov edx, 0x00010100
    mov esi, [undefined]
    mov edi, [skipped]
    mov eax, MARK
    mov ebx, MARK
    mov ecx, MARK
site:
    vmcall
    cmp ebp, 0x42494D56
    jne wrong
    cmp eax, MARK
    je not_answered
    not eax
    cmp eax, esi
    jne wrong
    cmp ecx, 0x2D494D56
    jne wrong
    inc dword [answered]
    jmp next
not_answered:
    cmp ebx, MARK
    jne wrong
    cmp ecx, MARK
    jne wrong
    cmp edx, 0x00010100
    jne wrong
    cmp esi, [undefined]
    jne next
    inc dword [skipped]
    jmp next
wrong:
    mov al, 0x11
    out 0xF4, al
stay:
    hlt
    jmp stay
on_undefined:
    inc dword [undefined]
    add dword [esp], 3
    iretd
align 8
gdt:
    dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    dw $ - gdt - 1
    dd gdt
idt_pointer:
    dw 7 * 8 - 1
    dd idt
align 8
idt:
    times 7 dq 0
answered:
    dd 0
undefined:
    dd 0
skipped:
    dd 0
