; A multiboot guest for QEMU: enters 64-bit mode and makes COUNT calls, each by HOW (1 CPUID,
; 2 VMCALL, 3 VMMCALL), with VALUE1 counting up, and checks value1 = ~VALUE1 and both stamps.
; With AP_COUNT a second vCPU makes that many calls of AP_METHOD at the same time, and the
; first one waits for it.
; Ends by isa-debug-exit at 0xf4: 0x10 (status 33) when every answer was right, else 0x11.
%ifndef COUNT
%define COUNT 100
%endif
%ifndef HOW
%define HOW 2
%endif
%ifndef METHOD
%define METHOD 1
%endif
%ifndef AP_METHOD
%define AP_METHOD METHOD
%endif
BASE   equ 0x100000
TABLES equ 0x70000
AP     equ 0x8000
ICR    equ 0xFEE00300
bits 32
org BASE
header:
    dd 0x1BADB002, 0x00010003, -(0x1BADB002 + 0x00010003)
    dd BASE, BASE, 0, 0, start
start:
    cli
    mov edi, TABLES
    xor eax, eax
    mov ecx, 3 * 1024
    rep stosd
    mov dword [TABLES], TABLES + 0x1003
    mov dword [TABLES + 0x1000], TABLES + 0x2003
    mov edi, TABLES + 0x2000
    mov eax, 0x83
.map:
    mov [edi], eax
    add eax, 0x200000
    add edi, 8
    cmp edi, TABLES + 0x3000
    jb .map
    lgdt [gdt_pointer]
%ifdef AP_COUNT
    mov esi, ap_begin
    mov edi, AP
    mov ecx, ap_end - ap_begin
    rep movsb
    mov dword [ICR], 0xC4500            ; INIT to all but this one
    mov ecx, 10000
.init:
    out 0x80, al
    loop .init
    mov dword [ICR], 0xC4600 | AP >> 12 ; start-up
%endif
    xor ebx, ebx
    jmp enter_long_mode
ap32:
    mov ebx, 1
enter_long_mode:
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
    jmp 8:long_mode
align 8
gdt:
    dq 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
gdt_pointer:
    dw 31
    dd gdt
done:
    dd 0
%ifdef AP_COUNT
bits 16
ap_begin:
    cli
    o32 lgdt [cs:ap_gdt - ap_begin]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp dword 24:ap32
ap_gdt:
    dw 31
    dd gdt
ap_end:
%endif
bits 64
long_mode:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov r13d, COUNT
    mov r14d, METHOD << 16 | 0x0100
    mov esi, ebx
%ifdef AP_COUNT
    test esi, esi
    jz .begin
    mov r13d, AP_COUNT
    mov r14d, AP_METHOD << 16 | 0x0100
.begin:
%endif
    xor r15, r15
.next:
    mov r8, r15
    mov r9, buffer
    mov r10, 16
    xor r11, r11
%if HOW = 1
    mov eax, 0x42494D56
    mov ecx, r14d
    cpuid
%else
    mov ecx, 0x42494D56
    mov edx, r14d
%if HOW = 2
    vmcall
%else
    vmmcall
%endif
%endif
    mov rbx, 0x213353522D494D56
    cmp rcx, rbx
    jne wrong
    mov rbx, 0x213453522D494D56
    cmp rdx, rbx
    jne wrong
    not rax
    cmp rax, r15
    jne wrong
    inc r15
    cmp r15, r13
    jb .next
%if METHOD = 2
    mov rax, [buffer + 16]
    mov rbx, "tseug ot"
    cmp rax, rbx
    jne wrong
%endif
%ifdef AP_COUNT
    test esi, esi
    jz .wait
    mov dword [done], 1
    jmp halt
.wait:
    pause
    cmp dword [done], 0
    je .wait
%endif
    mov al, 0x10
    jmp leave_qemu
wrong:
    mov al, 0x11
leave_qemu:
    out 0xf4, al
halt:
    cli
    hlt
    jmp halt
align 16
buffer:
    db "hello to guest!!"
    times 16 db 0
