; A multiboot guest in 32-bit protected mode, which checks that an answered trap leaves what the
; processor would. CASE says what:
; 1 code in a segment with a base           2 the same selector gets another base
; 3 TF set: #DB behind each instruction     4 STI before the trap: an interrupt behind it
; 5 RF set at the trap, and clear behind it 6 the trap gets a prefix, so it is longer
; 7 as 3, and the traps are not a bridge's  8 as 4, many times, while a timer kicks the vCPU
; HOW: 1 CPUID, 2 VMCALL, 3 VMMCALL. The table behind the header has the traps' linear addresses.
; Ends by isa-debug-exit at 0xf4: 0x10 (status 33) when all was right, else 0x11.
%ifndef HOW
%define HOW 2
%endif
BASE equ 0x100000
%macro TRAP 0
%if HOW = 1
    cpuid
%elif HOW = 2
    vmcall
%else
    vmmcall
%endif
%endmacro
; Before a trap, with the value in EBX or ESI.
%macro ASK 1
%if HOW = 1
    mov eax, MAGIC
    mov ecx, 0x00010100
    mov ebx, %1
    xor edx, edx
%else
    mov ebp, MAGIC
    mov edx, 0x00010100
    mov esi, %1
%endif
%endmacro
%if CASE = 7
MAGIC equ 0x12345678
%else
MAGIC equ 0x42494D56
%endif
bits 32
org BASE
header:
    dd 0x1BADB002, 0x00010003, -(0x1BADB002 + 0x00010003)
    dd BASE, BASE, 0, 0, start
    dd site, site_2
start:
    cli
    mov al, 0xFF
    out 0x21, al
    out 0xA1, al
    mov esp, 0x90000
    lgdt [gdt_pointer]
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    jmp 8:flat
flat:
    mov eax, on_debug
    mov ebx, idt + 1 * 8
    call set_gate
    mov eax, on_undefined
    mov ebx, idt + 6 * 8
    call set_gate
    mov eax, on_interrupt
    mov ebx, idt + 0x40 * 8
    call set_gate
    lidt [idt_pointer]
%if CASE = 1 || CASE = 2
    jmp 24:in_segment - BASE
in_segment:
    mov edi, 100
next:
    push edi
    ASK edi
site:
    TRAP
    pop edi
    not eax
    cmp eax, edi
    jne near wrong
    dec edi
    jnz near next
%if CASE = 2
    cmp byte [gdt + 24 + 4], 0x10
    jne near right
    ; the descriptor's base becomes BASE - 0x1000, so the same code has other offsets
    mov byte [gdt + 24 + 3], 0xF0
    mov byte [gdt + 24 + 4], 0x0F
    jmp 24:in_segment - BASE + 0x1000
%endif
site_2:
    jmp right
%elif CASE = 3 || CASE = 7
    pushfd
    or dword [esp], 0x100
    ASK 5
    popfd
first:
    nop
site:
    TRAP
behind:
    nop
site_2:
    TRAP
behind_2:
    nop
    pushfd
    and dword [esp], ~0x100
    popfd
    mov esi, log
    mov edi, expected
    mov ecx, EXPECTED
    cmp dword [log_end], log + 4 * EXPECTED
    jb near wrong
    repe cmpsd
    jne near wrong
    jmp right
%elif CASE = 4
    mov ebx, 0xFEE00000
    mov dword [ebx + 0xF0], 0x1FF
    mov dword [ebx + 0x300], 0x00044040
    ASK 6
    sti
site:
    TRAP
behind:
    cli
    cmp dword [interrupted], behind
    jne near wrong
site_2:
    jmp right
%elif CASE = 5
    ASK 7
    push 0x10002
    push 8
    push site
    iretd
site:
    TRAP
    mov eax, MAGIC
    mov ecx, 0x00010100
    mov edx, ecx
site_2:
    TRAP
    jmp right
%elif CASE = 6
    call rewritten
    mov dword [site], 0xC1010F3E
    call rewritten
    jmp right
rewritten:
    ASK 9
site:
    vmcall
    nop
    cmp eax, ~9
    jne near wrong
site_2:
    ret
%elif CASE = 8
    ; The old controller is masked, so its timer interrupts nothing. But each of its edges makes QEMU
    ; kick the vCPU, for it to look at its local APIC: 40,000 times a second.
    mov ebx, 0xFEE00000
    mov dword [ebx + 0xF0], 0x1FF
    mov al, 0x34
    out 0x43, al
    mov al, 1193182 / 20000
    out 0x40, al
    xor al, al
    out 0x40, al
    mov edi, 200
again:
    ASK edi
    sti
site:
    TRAP
    cli
    not eax
    cmp eax, edi
    jne near wrong
    dec edi
    jnz near again
site_2:
    jmp right
%endif
right:
    mov al, 0x10
    jmp leave_qemu
wrong:
    mov al, 0x11
leave_qemu:
    out 0xF4, al
stay:
    hlt
    jmp stay
set_gate:
    mov [ebx], ax
    mov word [ebx + 2], 8
    mov word [ebx + 4], 0x8E00
    shr eax, 16
    mov [ebx + 6], ax
    ret
on_debug:
    push eax
    push ebx
    mov ebx, [log_end]
    mov eax, [esp + 8]
    mov [ebx], eax
    add dword [log_end], 4
    mov eax, dr6
    test eax, 0x4000
    jz near wrong
    xor eax, eax
    mov dr6, eax
    pop ebx
    pop eax
    iretd
on_undefined:
    add dword [esp], 3
    iretd
on_interrupt:
    push eax
    mov eax, [esp + 4]
    mov [interrupted], eax
    mov dword [0xFEE000B0], 0
    pop eax
    iretd
align 8
gdt:
    dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00cf9b100000ffff
gdt_pointer:
    dw $ - gdt - 1
    dd gdt
idt_pointer:
    dw 0x41 * 8 - 1
    dd idt
align 8
idt:
    times 0x41 dq 0
interrupted:
    dd 0
log_end:
    dd log
%if CASE = 3 || CASE = 7
expected:
%if CASE = 7 && HOW != 1
    ; each is undefined, and its handler, which has TF clear, goes on behind it
    dd site, behind + 1, site_2 + 4
%else
    dd site, behind, site_2, behind_2, behind_2 + 1
%endif
EXPECTED equ ($ - expected) / 4
%endif
log:
    times 64 dd 0
