; Calls through the PCI device, COUNT times on each of CPUS vCPUs, and checks every answer.
;
; METHOD 1: value1 comes back inverted, value2 as it was, and the stamps. METHOD 2: value2 is the address of
; 32 bytes in the caller's space, of which the handler writes the second half. METHOD 3: never answered
; by its handler. METHOD 4: the answer is late.
; USER=1: calls from ring 3. SPACE=1: addresses are offsets in the slot; 2: CR3; 0: none.
; HALT=1: waits for MSI. TWICE=1: rings twice. FIRST: the slot of the first vCPU. STALE=1: after its
; calls it asks once more with the last number. CANCEL=1: cancels each call. PATIENT=1: a doorbell that
; reads as all ones is not the host's end.
; PLUG=1: waits until the device is plugged in, calls until it is to be unplugged, lets it go, and
; begins anew; on the machine pc.
; ECAM: where config space is on a machine whose firmware does not assign BARs (microvm).
; Ends by isa-debug-exit: 33 all was right, 35 a wrong answer, 37 no answer, 39 the host is gone,
; 41 there is no device.
%ifndef COUNT
%define COUNT 100
%endif
%ifndef CPUS
%define CPUS 1
%endif
%ifndef METHOD
%define METHOD 1
%endif
%ifndef USER
%define USER 0
%endif
%ifndef SPACE
%define SPACE 2 * !USER
%endif
%ifndef HALT
%define HALT 0
%endif
%ifndef TWICE
%define TWICE 0
%endif
%ifndef STALE
%define STALE 0
%endif
%ifndef CANCEL
%define CANCEL 0
%endif
%ifndef PATIENT
%define PATIENT 0
%endif
%ifndef PLUG
%define PLUG 0
%endif
%ifndef FIRST
%define FIRST 0
%endif
%ifndef ECAM
%define ECAM 0
%endif
%ifndef MAGIC
%define MAGIC 0x42494D56
%endif
%include "long_mode.inc"
IDS    equ 0x564D1234
VECTOR equ 0x40
TRAMP  equ 0x8000
PAGES  equ TABLES + 0x3000              ; 2 MiB each, of the fourth GiB
%if ECAM
CONFIG equ ECAM
STEP   equ 0x8000
%else
CONFIG equ 0x80000000
STEP   equ 0x800
%endif

%macro END 1
    mov al, %1
    out 0xF4, al
%%stay:
    jmp %%stay
%endmacro

main:
    GATE 13, fault
    GATE 14, fault
%if ECAM
    mov dword [abs PAGES + (ECAM - 0xC0000000) / 0x200000 * 8], ECAM | 0x9F
    mov dword [abs PAGES], 0xC000009F   ; where the BAR goes
%endif
    mov ebx, CONFIG
.scan:
    xor ecx, ecx
    call config_read
    cmp eax, IDS
    je .found
    add ebx, STEP
    cmp ebx, CONFIG + 32 * STEP
    jb .scan
%if PLUG
    jmp main
%else
    END 0x14
%endif
.found:
    mov [config], ebx
%if ECAM || PLUG
    mov cl, 0x10
    mov eax, 0xC0000000
    call config_write
%endif
    mov cl, 4                           ; command: memory, bus master
    call config_read
    or eax, 6
    call config_write
    mov cl, 0x10
    call config_read
    and eax, ~15
    mov [bar], eax
    mov edx, eax
    and edx, ~0x1FFFFF                  ; it is at most 1 MiB, so in one page
    or edx, 0x9F
    mov ecx, eax
    sub ecx, 0xC0000000
    shr ecx, 21
    mov [abs PAGES + ecx * 8], edx
%if HALT
    mov cl, 0x44
    mov eax, APIC
    call config_write
    mov cl, 0x48
    xor eax, eax
    call config_write
    mov cl, 0x4C
    mov eax, VECTOR
    call config_write
    mov cl, 0x40
    call config_read
    or eax, 0x10000
    call config_write
    GATE VECTOR, on_interrupt
    mov eax, APIC
    mov dword [rax + 0x320], 0x10000    ; none of the APIC's timer, or of LINT0
    mov dword [rax + 0x350], 0x10000
%endif
%if CPUS > 1
    lea rsi, [trampoline]
    mov rdi, TRAMP
    mov ecx, trampoline.end - trampoline
    rep movsb
    mov ebx, APIC
    mov dword [rbx + 0x300], 0x000C4500 ; INIT, then twice the start
    mov ecx, 200000
.initialised:
    pause
    loop .initialised
    mov dword [rbx + 0x300], 0x000C4608
    mov ecx, 20000
.started:
    pause
    loop .started
    mov dword [rbx + 0x300], 0x000C4608
%endif
    mov r12d, FIRST
work:
%if USER
    push USERSS
    push STACK3
    push 0x3002                         ; ring 3 may use ports, for the end
    push USER64
    lea rax, [calls]
    push rax
    iretq
%endif
calls:
    mov ebx, [bar]
    mov rax, r12
    shl rax, 13
    lea rbx, [rbx + rax + 0x2000]       ; its doorbell
    lea rsi, [rbx + 0x1000]             ; its slot
    mov rdi, r12
    shl rdi, 12
    lea rax, [block]
    add rdi, rax                        ; its memory
    xor r15d, r15d
next:
    mov rax, MAGIC | 0x0100 << 32 | METHOD << 48
    mov [rsi], rax
    mov [rsi + 8], r15
    mov [rsi + 16], rdi
    mov qword [rsi + 24], 16
    mov qword [rsi + 32], 4
%if SPACE = 1
    mov qword [rsi + 16], 64
    mov rax, [text]
    mov [rsi + 64], rax
    mov rax, [text + 8]
    mov [rsi + 72], rax
    mov qword [rsi + 80], 0
%else
    mov rax, [text]
    mov [rdi], rax
    mov rax, [text + 8]
    mov [rdi + 8], rax
    mov qword [rdi + 16], 0
%endif
    mov dword [rsi + 44], 2             ; an interrupt for a late answer
%if SPACE = 2
    mov rax, cr3
    mov [rsi + 48], rax
%else
    mov qword [rsi + 48], SPACE
%endif
    lea eax, [r15 + 1]
    mov [rsi + 56], eax
    mov dword [rsi + 40], 1
    mov dword [rbx], 1
%if TWICE
    mov dword [rbx], 1
%endif
%if CANCEL
    mov [rbx + 4], eax
%endif
.wait:
    mov eax, [rsi + 40]
    cmp eax, 1
    je .untaken
    cmp eax, 3
    jne .answered
%if HALT
    cli
    cmp dword [rsi + 40], 3
    jne .on
    sti
    hlt
.on:
    sti
%else
    pause
%if !PATIENT && !PLUG
    inc r13d
    test r13d, 0xFFFF                   ; a host that was killed has not said so
    jnz .wait
    cmp dword [rbx], -1
    je .gone
%endif
%endif
    jmp .wait
.untaken:                               ; the ring was acknowledged, and the call was not taken
%if PATIENT
    pause
    jmp .wait
%else
    cmp dword [rbx], -1
    jne .wait
.gone:
    END 0x13
%endif
.answered:
    cmp eax, 4
    jne .value
%if PLUG
    jmp .plugged
%else
    END 0x12
%endif
.value:
    mov eax, [rsi + 60]
    lea ecx, [r15 + 1]
    cmp eax, ecx
    jne wrong
    mov rax, [rsi + 8]
    not rax
    cmp rax, r15
    jne wrong
    mov rax, [rsi + 16]                 ; not in the answer, so as it was
%if SPACE = 1
    cmp rax, 64
%else
    cmp rax, rdi
%endif
    jne wrong
    mov rax, 0x213353522D494D56
    cmp rax, [rsi + 24]
    jne wrong
    mov rax, 0x213453522D494D56
    cmp rax, [rsi + 32]
    jne wrong
%if METHOD = 2
%if SPACE = 1
    mov rax, [rsi + 80]
%else
    mov rax, [rdi + 16]
%endif
    cmp rax, [expected]
    jne wrong
%endif
    inc r15
%if PLUG
.plugged:
    mov dx, 0xAE10                      ; ACPI PCI hot-plug: the first bus
    xor eax, eax
    out dx, eax
    mov dx, 0xAE04                      ; slots to be unplugged
    in eax, dx
    test eax, eax
    jz next
    mov r14d, eax
    mov ebx, [config]
    mov cl, 4
    xor eax, eax
    call config_write
    mov eax, r14d
    mov dx, 0xAE08                      ; eject
    out dx, eax
    jmp main
%endif
    cmp r15, COUNT
    jb next
%if STALE
    mov dword [rsi + 40], 1             ; the number of the last call, once more
    mov dword [rbx], 1
    cmp dword [rsi + 40], 4
    jne wrong
%endif
    lock inc dword [done]
.others:
    pause
    cmp dword [done], CPUS
    jb .others
    END 0x10
wrong:
%if PLUG
    jmp next.plugged                    ; the server has stopped: what is left is to be unplugged
%else
    END 0x11
%endif
fault:
    END 0x15
on_interrupt:
    push rax
    mov eax, APIC
    mov dword [rax + 0xB0], 0
    pop rax
    iretq
%if ECAM
config_read:                            ; EAX: the config space of EBX at CL
    movzx edx, cl
    mov eax, [rbx + rdx]
    ret
config_write:
    movzx edx, cl
    mov [rbx + rdx], eax
    ret
%else
config_read:
    lea eax, [rbx]
    mov al, cl
    mov edx, 0xCF8
    out dx, eax
    mov edx, 0xCFC
    in eax, dx
    ret
config_write:
    push rax
    call config_read
    pop rax
    out dx, eax
    ret
%endif
%if CPUS > 1
bits 16
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    o32 lgdt [TRAMP + .pointer - trampoline]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp dword CODE32:second
.pointer:
    dw 0x5F
    dd gdt
.end:
bits 32
second:
    mov ax, DATA
    mov ds, ax
    mov ss, ax
    mov esp, 0x9F000
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
    jmp CODE64:second_long
bits 64
second_long:
    mov ax, DATA
    mov ds, ax
    mov es, ax
    mov ss, ax
    lidt [idt_pointer]
    mov eax, APIC
    mov dword [rax + 0xF0], 0x1FF
    mov r12d, FIRST + 1
    jmp work
%endif
align 8
bar:      dd 0
config:   dd 0
done:     dd 0
text:     db "hello to guest!!"
expected: db "tseug ot"
align 4096
block:    times 4096 * (FIRST + CPUS) db 0
