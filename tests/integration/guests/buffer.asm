; vCPU 0 asks, through a gate, for bytes that are to be written into its buffer. Between two
; attempts it uses other memory, and checks that its buffer is still all zeros; with the
; answer it has to hold the bytes 7 * n + 3. For the handler `Jobs` of
; tests/integration/test_slow_handlers.py.
;
; Ends with eax = 0x600d, or the number of the check that failed: 1 nobody answered, 2 the
; answer, 3 a byte of the buffer, 4 the buffer before the answer, 5 other memory, 6 the call
; of vCPU 1. Leaves in ecx how often it was told to wait.
;
;   -DWIDTH=64|32  -DHOW=1|2|3  -DMETHOD=n  -DPAGING=0|1 (the buffer is in ALIAS)
;   -DMEET=0|1: with two vCPUs. Told to wait, vCPU 0 does not ask again before vCPU 1, which
;       asks for that, has been told that the handler wants to write.
;   -DREMAP=0|1: with paging in 64-bit code. Told to wait, vCPU 0 maps other physical memory
;       where its buffer is: 8 MiB, instead of 2 MiB.

%macro BRIDGE_SLEEP 0
    call use_memory
%endmacro

%include "bridge.inc"
%include "gate.inc"
%include "paging.inc"

REQUEST equ 0x0300
MEETING equ 7
PHYSICAL equ 0x200ff0                   ; over the end of a small page
SIZE    equ 5000
SCRATCH equ 0x500000                    ; 4 KiB of other memory

%if PAGING
BUFFER  equ ALIAS + PHYSICAL
%else
BUFFER  equ PHYSICAL
%endif

bits WIDTH
org 0x100000
%if WIDTH == 64
    default rel
    %define VALUE1 r8d
    %define VALUE2 r9d
%elif HOW == BRIDGE_CPUID
    %define VALUE1 ebx
    %define VALUE2 edx
%else
    %define VALUE1 esi
    %define VALUE2 edi
%endif

%macro CHECK 1
    mov dword [check], %1
%endmacro

    test edi, edi                       ; the number of the vCPU
    jnz meets
%if PAGING && WIDTH == 64
    ENABLE_PAGING_4_LEVEL
%elif PAGING
    ENABLE_PAGING_32_BIT
%endif
    mov VALUE1, BUFFER
    mov VALUE2, SIZE
%if WIDTH == 64
    mov r10d, 0
    mov r11d, 0
%elif HOW == BRIDGE_CPUID
    mov esi, 0
    mov edi, 0
%endif
    CHECK 1
    BRIDGE_GATE HOW, REQUEST, METHOD, failed
    CHECK 2
    cmp eax, BRIDGE_CONTINUE
    jne failed

    CHECK 3
    xor ecx, ecx
.compare:
    lea eax, [ecx * 8 + 3]
    sub eax, ecx
    cmp [ecx + BUFFER], al
    jne failed
    inc ecx
    cmp ecx, SIZE
    jb .compare
    CHECK 0x600d
failed:
    mov eax, [check]
    mov ecx, [waits]
    hlt

; --- between two attempts, with all registers as they were -----------------------------

use_memory:
%if WIDTH == 64
    push rax
    push rcx
%else
    push eax
    push ecx
%endif
    inc dword [waits]

    ; Fill the scratch page with something new, ...
    mov eax, [waits]
    xor ecx, ecx
.fill:
    mov [ecx + SCRATCH], eax
    add eax, 0x01010101
    add ecx, 4
    cmp ecx, 4096
    jb .fill
    BRIDGE_PAUSE 100000
%if MEET
.meet:
    pause
    cmp dword [met], 0
    je .meet
%endif
%if REMAP
    mov dword [abs PAGE_TABLES + 0x2008], 0x800087
    mov rax, cr3
    mov cr3, rax
%endif

    ; ... see that it is still there, ...
    mov eax, [waits]
    xor ecx, ecx
.verify:
    cmp [ecx + SCRATCH], eax
    jne .changed
    add eax, 0x01010101
    add ecx, 4
    cmp ecx, 4096
    jb .verify

    ; ... and that the buffer and its surroundings are empty.
    xor ecx, ecx
.zeros:
    cmp byte [ecx + BUFFER - 16], 0
    jne .early
    inc ecx
    cmp ecx, SIZE + 32
    jb .zeros
%if WIDTH == 64
    pop rcx
    pop rax
%else
    pop ecx
    pop eax
%endif
    ret
.early:
    CHECK 4
    jmp failed
.changed:
    CHECK 5
    jmp failed

; --- the other vCPU ------------------------------------------------------------------------

meets:
    BRIDGE_CALL HOW, REQUEST, MEETING
    BRIDGE_CHECK_STAMPS .failed
    mov dword [met], 1
    mov eax, 0x600d
    hlt
.failed:
    mov eax, 6
    hlt

align 4
check:  dd 0
waits:  dd 0
met:    dd 0
