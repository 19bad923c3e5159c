; A multiboot guest that calls by device.inc: COUNT times INVERT of the handler `exchange`, and once a
; request that nobody has. Ends QEMU by isa-debug-exit: status 33 when all was right, else 35.
%include "device.inc"
TABLES equ 0x70000
bits 32
org 0x100000
    dd 0x1BADB002, 0x00010003, -(0x1BADB002 + 0x00010003), 0x100000, 0x100000, 0, 0, start
start:
    cli
    cld
    mov esp, 0x90000
    mov edi, TABLES
    xor eax, eax
    mov ecx, 6 * 1024
    rep stosd
    mov dword [TABLES], TABLES + 0x1007
%assign n 0
%rep 4
    mov dword [TABLES + 0x1000 + n * 8], TABLES + 0x2007 + n * 0x1000
%assign n n + 1
%endrep
    mov edi, TABLES + 0x2000
    mov eax, 0x87
.map:
    mov [edi], eax
    add eax, 0x200000
    add edi, 8
    cmp edi, TABLES + 0x6000
    jb .map
    mov eax, TABLES
    mov cr3, eax
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000001
    mov cr0, eax
    lgdt [gdt_pointer]
    jmp 8:long_mode
align 8
gdt:
    dq 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdt_pointer:
    dw $ - gdt - 1
    dd gdt
bits 64
long_mode:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    BRIDGE_DEVICE_FIND wrong
    BRIDGE_DEVICE_SLOT 3
    BRIDGE_DEVICE_SPACE
    xor r12d, r12d
next:
    mov r8, r12
    lea r9, [r12 + 1]
    mov r10d, 3
    mov r11d, 4
    BRIDGE_DEVICE_CALL 0x0200, 1
    BRIDGE_CHECK_STAMPS wrong
    not rax
    cmp rax, r12
    jne wrong
    lea rax, [r12 * 2 + 1]
    cmp rax, rbx
    jne wrong
    inc r12
    cmp r12, COUNT
    jb next
    BRIDGE_DEVICE_CALL 0x0200, 1, 0x12345678
    or rax, rbx
    or rax, rcx
    or rax, rdx
    jnz wrong
    mov al, 0x10
    jmp leave_qemu
wrong:
    mov al, 0x11
leave_qemu:
    out 0xF4, al
    jmp leave_qemu
