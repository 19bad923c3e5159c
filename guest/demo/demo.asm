; The demo: calls hello, log, environment, clock, random, exec_gate and fetch by VMCALL, by
; CPUID and by VMMCALL, with paging on, and checks every answer and both stamps itself. A
; check that fails is reported through the log handler and ends the guest by an undefined
; instruction.
;
; The URL comes from the environment handler (DEMO_URL). What is behind it is known: byte
; n of BODY_SIZE is the low byte of 7 * n + 3.

%include "bridge.inc"
%include "paging.inc"

HELLO       equ 0x0001
LOG         equ 0x0021
ENVIRONMENT equ 0x0022
FETCH       equ 0x0023
EXEC_GATE   equ 0x0113
CLOCK       equ 0x0114
RANDOM      equ 0x0115

STATUS_KIND equ 0xff00                  ; of an encoded status: 0 is success

BODY_SIZE   equ 20000
CHUNK       equ 1500
BUFFER      equ 0x200000

bits 64
default rel
org 0x100000
    ENABLE_PAGING_4_LEVEL
    lea rax, [paged]
    mov rcx, ALIAS
    add rax, rcx
    jmp rax
paged:
    mov dword [how], BRIDGE_VMCALL
    call all_handlers
    mov dword [how], BRIDGE_CPUID
    call all_handlers
    mov dword [how], BRIDGE_VMMCALL
    call all_handlers
    lea r8, [passed]
    mov r9d, passed_end - passed
    mov edi, LOG | 2 << 16
    call bridge
    xor eax, eax
    hlt

; --- one round over all handlers ------------------------------------------------------

all_handlers:
    ; hello: the greeting comes back into BUFFER, its length in rbx
    mov dword [check], '1 he'
    lea r8, [name]
    mov r9d, BUFFER
    mov r10d, 64
    mov edi, HELLO | 1 << 16
    call bridge
    cmp rbx, greeting_end - greeting - 1
    jne failed
    lea rsi, [greeting]
    mov edi, BUFFER
    mov ecx, greeting_end - greeting
    repe cmpsb
    jne failed

    ; log, at level info
    mov dword [check], '2 lo'
    lea r8, [working]
    mov r9d, working_end - working
    mov edi, LOG | 2 << 16
    call bridge
    cmp rbx, working_end - working
    jne failed

    ; environment: the URL, with its terminating NUL, into `url`
    mov dword [check], '3 en'
    lea r8, [url_name]
    lea r9, [url]
    mov r10d, url_end - url
    mov edi, ENVIRONMENT | 1 << 16
    call bridge

    ; ... and a name that is not on the list is refused
    mov dword [check], '4 no'
    lea r8, [secret_name]
    lea r9, [url_end]
    mov r10d, 64
    mov edi, ENVIRONMENT | 1 << 16
    call bridge_unchecked
    BRIDGE_CHECK_STAMPS failed
    test eax, STATUS_KIND
    jz failed

    ; clock: the time does not go back
    mov dword [check], 'a cl'
    mov edi, CLOCK | 2 << 16
    call bridge
    mov r15, rbx
    mov edi, CLOCK | 2 << 16
    call bridge
    cmp rbx, r15
    jb failed

    ; random: all of the buffer, and not the same twice
    mov dword [check], 'b ra'
    mov r8d, BUFFER
    mov r9d, 32
    mov edi, RANDOM | 1 << 16
    call bridge
    cmp rbx, 32
    jne failed
    mov eax, BUFFER
    mov rbx, [rax]
    cmp rbx, [rax + 16]
    je failed

    ; exec_gate: the host of the demo has nobody to ask, so nothing may run
    mov dword [check], 'c ga'
    lea r8, [secret_name]
    mov edi, EXEC_GATE | 1 << 16
    call bridge_unchecked
    BRIDGE_CHECK_STAMPS failed
    cmp eax, 0xffffffff
    jne failed

    ; fetch: open, read in chunks into BUFFER, compare all of it, close
    mov dword [check], '5 op'
    lea r8, [url]
    mov edi, FETCH | 1 << 16
    call bridge
    mov r15, rbx                        ; the handle
    xor r14d, r14d                      ; bytes so far
    mov dword [check], '6 re'
.read:
    mov r8, r15
    lea r9, [r14 + BUFFER]
    mov r10d, CHUNK
    mov edi, FETCH | 2 << 16
    call bridge
    add r14, rbx
    cmp r14, BODY_SIZE
    ja failed
    test rbx, rbx
    jnz .read
    cmp r14, BODY_SIZE
    jne failed
    mov dword [check], '7 by'
    xor ecx, ecx
.compare:
    lea eax, [rcx * 8 + 3]
    sub eax, ecx
    cmp [rcx + BUFFER], al
    jne failed
    inc ecx
    cmp ecx, BODY_SIZE
    jb .compare
    mov dword [check], '8 cl'
    mov r8, r15
    mov edi, FETCH | 3 << 16
    jmp bridge

; --- the call -------------------------------------------------------------------------

; edi: request and method; r8 to r10: values. Returns value2 in rbx; a missing stamp or
; a status other than success (value1) fails the check.
bridge:
    call bridge_unchecked
    BRIDGE_CHECK_STAMPS failed
    test eax, STATUS_KIND
    jnz failed
    ret

bridge_unchecked:
    cmp dword [how], BRIDGE_CPUID
    je .cpuid
    mov ecx, BRIDGE_MAGIC
    mov edx, edi
    cmp dword [how], BRIDGE_VMMCALL
    je .vmmcall
    db 0x0f, 0x01, 0xc1
    ret
.vmmcall:
    db 0x0f, 0x01, 0xd9
    ret
.cpuid:
    mov eax, BRIDGE_MAGIC
    mov ecx, edi
    cpuid
    ret

failed:
    lea r8, [failure]
    mov r9d, failure_end - failure
    mov edi, LOG | 4 << 16
    call bridge_unchecked
    ud2

name:        db 'Ada', 0
greeting:    db 'Hello, Ada!', 0
greeting_end:
working:     db 'the guest is in the middle of its checks'
working_end:
passed:      db 'all checks passed'
passed_end:
failure:     db 'check failed: '
check:       db '....'
failure_end:
url_name:    db 'DEMO_URL', 0
secret_name: db 'PATH', 0
align 4
how:         dd 0
url:         times 256 db 0
url_end:     times 64 db 0
