; A multiboot guest for QEMU: 64-bit mode, CPUS vCPUs (1 or 2), each with COUNT calls by HOW
; (1 CPUID, 2 VMCALL, 3 VMMCALL, 4 all in turn, each with a prefix) of METHOD, VALUE1 counting up.
; With AP_COUNT or AP_METHOD the second vCPU differs. It checks value1 = ~VALUE1 and both stamps, and
; with NATIVE=1 that there are none and that every VMCALL and VMMCALL was undefined. USER=1 runs the
; calls in ring 3. The table behind the header has the addresses of the trap instructions and of the
; #UD handler, for those who set breakpoints.
; Ends by isa-debug-exit at 0xf4: 0x10 (status 33) when all was right, else 0x11.
%ifndef COUNT
%define COUNT 100
%endif
%ifndef HOW
%define HOW 2
%endif
%ifndef METHOD
%define METHOD 1
%endif
%ifndef CPUS
%ifdef AP_COUNT
%define CPUS 2
%else
%define CPUS 1
%endif
%endif
%ifndef AP_COUNT
%define AP_COUNT COUNT
%endif
%ifndef AP_METHOD
%define AP_METHOD METHOD
%endif
%ifndef NATIVE
%define NATIVE 0
%endif
%ifndef USER
%define USER 0
%endif
BASE       equ 0x100000
TABLES     equ 0x70000
IDT        equ 0x76000
TRAMPOLINE equ 0x8000
APIC       equ 0xFEE00000
bits 32
org BASE
header:
    dd 0x1BADB002, 0x00010003, -(0x1BADB002 + 0x00010003)
    dd BASE, BASE, 0, 0, start
    dq site_cpuid, site_vmcall, site_vmmcall, on_undefined, buffer
start:
    cli
    cld
    mov esp, 0x90000
    mov edi, TABLES
    xor eax, eax
    mov ecx, 7 * 1024
    rep stosd
    ; 1 GiB as it is, the same again from 1 GiB on, and the page of the APIC
    mov dword [TABLES], TABLES + 0x1007
    mov dword [TABLES + 0x1000], TABLES + 0x2007
    mov dword [TABLES + 0x1008], TABLES + 0x2007
    mov dword [TABLES + 0x1018], TABLES + 0x3007
    mov dword [TABLES + 0x3000 + 0x1F7 * 8], 0xFEE0009B
    mov edi, TABLES + 0x2000
    mov eax, 0x87
.map:
    mov [edi], eax
    add eax, 0x200000
    add edi, 8
    cmp edi, TABLES + 0x3000
    jb .map
    call to_long_mode
    jmp 8:long_mode
to_long_mode:
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
    ret
align 8
gdt:
    dq 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cf9b000000ffff
    dq 0x00affb000000ffff, 0x00cff3000000ffff
    dq 0x0000890000000067 | (TSS & 0xFFFFFF) << 16, 0
gdt_pointer:
    dw $ - gdt - 1
    dd gdt
TSS equ 0x77000
bits 64
long_mode:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov rdi, IDT
    mov rax, on_undefined
    mov [rdi + 6 * 16], ax
    mov dword [rdi + 6 * 16 + 2], 0x8E000008
    shr rax, 16
    mov [rdi + 6 * 16 + 6], rax
    lidt [idt_pointer]
    xor eax, eax
    mov rdi, TSS
    mov ecx, 0x68 / 8
    rep stosq
    mov qword [TSS + 4], 0x88000
    mov ax, 0x30
    ltr ax
%if CPUS = 2
    mov rsi, trampoline
    mov rdi, TRAMPOLINE
    mov ecx, trampoline.end - trampoline
    rep movsb
    mov rbx, APIC
    mov dword [rbx + 0xF0], 0x1FF
    mov dword [rbx + 0x300], 0x000C4500
    mov ecx, 200000
.wait_init:
    pause
    loop .wait_init
    mov dword [rbx + 0x300], 0x000C4608
    mov ecx, 20000
.wait_start:
    pause
    loop .wait_start
    mov dword [rbx + 0x300], 0x000C4608
%endif
    xor r12, r12
    mov r13d, COUNT
    mov ebp, METHOD << 16 | 0x0100
%if USER
    push 0x2B
    push 0x8F000
    push 0x3002
    push 0x23
    push work
    iretq
%endif
work:
    xor r15, r15
next:
%if HOW = 4
    mov rax, r15
    xor edx, edx
    mov ecx, 3
    div rcx
    lea r14, [rdx + 1]
%else
    mov r14, HOW
%endif
    mov r8, r15
    lea r9, [buffer + 0x40000000]
    mov r10, 16
    mov r11, r12
    cmp r14, 1
    jne hypercall
    mov eax, 0x42494D56
    mov ecx, ebp
site_cpuid:
%if HOW = 4
    db 0x66
%endif
    cpuid
    jmp check
hypercall:
    mov ecx, 0x42494D56
    mov edx, ebp
    cmp r14, 2
    jne site_vmmcall
site_vmcall:
%if HOW = 4
    db 0x48
%endif
    vmcall
    jmp check
site_vmmcall:
%if HOW = 4
    db 0x3E
%endif
    vmmcall
check:
    mov rbx, 0x213353522D494D56
%if NATIVE
    cmp rcx, rbx
    je wrong
%else
    cmp rcx, rbx
    jne wrong
    mov rbx, 0x213453522D494D56
    cmp rdx, rbx
    jne wrong
    not rax
    cmp rax, r15
    jne wrong
%endif
    inc r15
    cmp r15, r13
    jb next
%if METHOD = 2
    mov rax, [buffer + 16]
    mov rbx, "tseug ot"
    cmp rax, rbx
    jne wrong
%endif
    lock inc dword [done]
wait_for_all:
    pause
    cmp dword [done], CPUS
    jb wait_for_all
%if NATIVE
    ; each call of a VMCALL or VMMCALL came to the handler below once, each CPUID never
%if HOW = 1
    cmp qword [undefined], 0
%elif HOW = 4
    cmp qword [undefined], CPUS * (COUNT - (COUNT + 2) / 3)
%else
    cmp qword [undefined], CPUS * COUNT
%endif
    jne wrong
%endif
    mov al, 0x10
    jmp leave_qemu
wrong:
    mov al, 0x11
leave_qemu:
    out 0xF4, al
stay:
    pause
    jmp stay
on_undefined:
    lock inc qword [undefined]
    push rax
    mov rax, [rsp + 8]
%if HOW = 4
    add rax, 1
%endif
    add rax, 3
    mov [rsp + 8], rax
    pop rax
    iretq
%if CPUS = 2
bits 16
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    o32 lgdt [TRAMPOLINE + .gdt_pointer - trampoline]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp dword 0x18:second
.gdt_pointer:
    dw 31
    dd gdt
.end:
bits 32
second:
    mov ax, 16
    mov ds, ax
    mov ss, ax
    mov esp, 0x9F000
    call to_long_mode
    jmp 8:second_long_mode
bits 64
second_long_mode:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    lidt [idt_pointer]
    mov r12, 1
    mov r13d, AP_COUNT
    mov ebp, AP_METHOD << 16 | 0x0100
    jmp work
%endif
align 16
idt_pointer:
    dw 16 * 16 - 1
    dq IDT
align 16
undefined:
    dq 0
done:
    dq 0
buffer:
    db "hello to guest!!"
    times 16 db 0
