; The guest that runs generated programs: 64-bit, ring 0, no devices. It asks the host for the next
; program by one VMCALL, goes there with IRETQ, and hands over what the program left behind with the
; next call. Exceptions of a program are logged; a fault goes on at the next address of FIXUPS, a #DB
; where it was, and INT 40h (or INT3, or a fault too many) is the end of the program.
;
; With -DKVM the call to the host is an OUT. In Unicorn (entry: the first byte) it runs one program.
; The addresses are those of layout.py.

%ifndef LOADER_MAGIC
%error "the addresses are missing"
%endif

bits 32
org IMAGE
    jmp start_unicorn                   ; the same bytes in 32 and 64 bits
align 4
header:
    dd 0x1BADB002, 0x00010003, -(0x1BADB002 + 0x00010003)
    dd header, IMAGE, 0, 0, start
start:
    cli
    cld
    mov eax, cr4
    or eax, 1 << 5                      ; PAE
    mov cr4, eax
    mov eax, ROOT_A
    mov cr3, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 1 << 8                      ; LME
    wrmsr
    mov eax, cr0
    or eax, 1 << 31 | 1                 ; PG, PE
    mov cr0, eax
    lgdt [gdt_pointer]
    jmp 8:long_mode

gdt_pointer:
    dw 0x1FF
    dq GDT
idt_pointer:
    dw 0xFFF
    dq IDT

bits 64
start_unicorn:
    lgdt [abs gdt_pointer]
    mov rax, cr4
    or eax, 1 << 5
    mov cr4, rax
    mov eax, ROOT_A
    mov cr3, rax
    mov rax, cr0
    or eax, 1 << 31
    mov cr0, rax
    mov esp, STACK_OF_LOADER
    jmp enter

long_mode:
    mov eax, 16
    mov ds, eax
    mov es, eax
    mov ss, eax
    lidt [abs idt_pointer]
    mov eax, TASK_SELECTOR
    ltr ax
%ifndef KVM
    mov al, 0xFF                        ; no interrupts of the old controller
    out 0x21, al
    out 0xA1, al
    mov eax, APIC                       ; the local one is on
    mov dword [rax + 0xF0], 0x1FF
%endif
next:
    mov esp, STACK_OF_LOADER
    mov eax, 16
    mov ss, eax
    mov eax, ROOT_A
    mov cr3, rax
    xor eax, eax
    mov dr7, rax
    mov dr6, rax
    mov ecx, LOADER_MAGIC
%ifdef KVM
    out LOADER_PORT, al
%else
    vmcall
%endif
loader_next:
    test eax, eax
    jnz enter
    mov al, 16
    out 0xF4, al                        ; isa-debug-exit
    hlt

enter:
    mov rax, [abs CONTEXT + 0xA8]
    mov cr3, rax
    mov eax, LOCAL_SELECTOR
    lldt ax
    mov rax, [abs CONTEXT + 0xB0]       ; ds, es
    mov ds, eax
    mov es, eax
    mov rax, [abs CONTEXT + 0xC0]
    mov dr0, rax
    mov rax, [abs CONTEXT + 0xC8]
    mov dr1, rax
    mov rax, [abs CONTEXT + 0xD0]
    test rax, rax
    jz .no_breakpoints
    mov dr7, rax
.no_breakpoints:
    push qword [abs CONTEXT + 0xA0]     ; ss
    push qword [abs CONTEXT + 0x20]     ; rsp
    push qword [abs CONTEXT + 0x98]     ; rflags
    push qword [abs CONTEXT + 0x90]     ; cs
    push qword [abs CONTEXT + 0x80]     ; rip
    mov rax, [abs CONTEXT + 0x00]
    mov rcx, [abs CONTEXT + 0x08]
    mov rdx, [abs CONTEXT + 0x10]
    mov rbx, [abs CONTEXT + 0x18]
    mov rbp, [abs CONTEXT + 0x28]
    mov rsi, [abs CONTEXT + 0x30]
    mov rdi, [abs CONTEXT + 0x38]
    mov r8, [abs CONTEXT + 0x40]
    mov r9, [abs CONTEXT + 0x48]
    mov r10, [abs CONTEXT + 0x50]
    mov r11, [abs CONTEXT + 0x58]
    mov r12, [abs CONTEXT + 0x60]
    mov r13, [abs CONTEXT + 0x68]
    mov r14, [abs CONTEXT + 0x70]
    mov r15, [abs CONTEXT + 0x78]
    iretq

; The stack: vector, error code, and what the processor pushed.
exception:
    cld
    push rax
    push rcx
    push rdx
    mov ecx, [abs RESULT + 0xB0]        ; how many are logged
    cmp ecx, MAX_LOG
    jae .too_many
    inc dword [abs RESULT + 0xB0]
    shl ecx, 5
    mov rax, [rsp + 40]                 ; rip
    mov [abs rcx + LOG + 8], rax
    mov rax, [rsp + 56]                 ; rflags
    mov [abs rcx + LOG + 16], rax
    mov rdx, dr6
    mov eax, [rsp + 24]
    mov [abs rcx + LOG], eax
    mov eax, [rsp + 48]                 ; cs
    mov [abs rcx + LOG + 4], eax
    mov [abs rcx + LOG + 24], rdx
    mov eax, [rsp + 24]
    cmp eax, 1
    je .debug
    cmp eax, INTERRUPT
    je .interrupt
    cmp eax, 3
    je .too_many
    mov ecx, [abs RESULT + 0xB4]        ; how many fixups are used
    cmp ecx, [abs CONTEXT + 0xB8]
    jae .too_many
    inc dword [abs RESULT + 0xB4]
    mov rax, [abs rcx * 8 + FIXUPS]
    mov [rsp + 40], rax
    jmp .back
.interrupt:
    mov eax, APIC
    mov dword [rax + 0xB0], 0
    jmp .back
.debug:
    test edx, 15
    jz .is_step
    or dword [rsp + 56], 1 << 16        ; RF: the breakpoint's instruction runs now
.is_step:
    xor eax, eax
    mov dr6, rax
.back:
    pop rdx
    pop rcx
    pop rax
    add rsp, 16
    iretq
.too_many:
    pop rdx
    pop rcx
    pop rax
    jmp ended.with_vector

ended:
    push 0
    push END_VECTOR
.with_vector:
    mov [abs RESULT + 0x00], rax
    mov [abs RESULT + 0x08], rcx
    mov [abs RESULT + 0x10], rdx
    mov [abs RESULT + 0x18], rbx
    mov [abs RESULT + 0x28], rbp
    mov [abs RESULT + 0x30], rsi
    mov [abs RESULT + 0x38], rdi
    mov [abs RESULT + 0x40], r8
    mov [abs RESULT + 0x48], r9
    mov [abs RESULT + 0x50], r10
    mov [abs RESULT + 0x58], r11
    mov [abs RESULT + 0x60], r12
    mov [abs RESULT + 0x68], r13
    mov [abs RESULT + 0x70], r14
    mov [abs RESULT + 0x78], r15
    pop rax
    mov [abs RESULT + 0xA8], rax        ; vector
    pop rax
    pop qword [abs RESULT + 0x80]       ; rip
    pop qword [abs RESULT + 0x90]       ; cs
    pop qword [abs RESULT + 0x98]       ; rflags
    pop qword [abs RESULT + 0x20]       ; rsp
    pop qword [abs RESULT + 0xA0]       ; ss
    cld
    jmp next

; Each stub is 16 bytes; layout.py makes the gates.
align 16
stubs:
%assign vector 0
%rep 32
    align 16
%if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
    nop
    nop
%else
    push 0
%endif
    push vector
    jmp near exception
%assign vector vector + 1
%endrep
    align 16
    push 0
    push INTERRUPT
    jmp near exception
    align 16
    jmp near ended
