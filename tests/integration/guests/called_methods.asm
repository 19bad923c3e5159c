; Calls each method of the handler `Called` (tests/helpers/called_methods.py) by the file that is
; made of it. Ends with eax = 0x600d, or the line of the check that failed.
;
;   -DWIDTH=64|32 -DHOW=1|2|3 (the instruction)

bits WIDTH
org 0x100000
%macro BRIDGE_SLEEP 0
    pause
%endmacro
%include "called.inc"

%define ROOM 20000
%if WIDTH == 64

  %define ADDRESS rsi
%else

  %define ADDRESS esi
%endif

; Unless the last comparison was equal, end.
%macro CHECK 0
    mov ebp, __?LINE?__
    jne failed
%endmacro

; The call has given this, and no more.
%macro GAVE 1-2 0
    CHECK
  %if WIDTH == 64
    mov rcx, (%1) | (%2) << 32
    cmp rbx, rcx
    CHECK
  %else
    cmp ebx, %1
    CHECK
    cmp ecx, %2
    CHECK
  %endif
%endmacro

start:
%if WIDTH == 64
    BRIDGE_CALLED_UNSIGNED HOW, 0xff, 0xffff, 0xffffffff, 0x8000000000000000
%else
    BRIDGE_CALLED_UNSIGNED HOW, 0xff, 0xffff, 0xffffffff, 0, 0x80000000
%endif
    GAVE 0x100fd, 0x80000001
%if WIDTH == 64
    mov r9, -5
    BRIDGE_CALLED_SIGNED HOW, -128, -32768, r9, -2
%else
    mov edx, -5
    BRIDGE_CALLED_SIGNED HOW, -128, -32768, edx, -2, -1
%endif
    GAVE 0xffff7f79, 0xffffffff
    BRIDGE_CALLED_NARROW HOW, 5, 700
    GAVE 0xfffffd49, 0xffffffff
    BRIDGE_CALLED_NARROW HOW, 5, -700
    GAVE 705
    BRIDGE_CALLED_THREE HOW, 0xffffffff, 3, -1
    GAVE 1
    BRIDGE_CALLED_MEMBERS HOW, BRIDGE_CALLED_MODE_WRITE, 0
    GAVE BRIDGE_CALLED_MODE_WRITE
    BRIDGE_CALLED_MEMBERS HOW, BRIDGE_CALLED_MODE_NEITHER, 0
    GAVE 0xffffffff, 0xffffffff
    BRIDGE_CALLED_MEMBERS HOW, 9, 0
    cmp eax, BRIDGE_KIND_INVALID_PARAMETERS << 8 | 1 << 16
    GAVE 0
    mov eax, BRIDGE_CALLED_FLAGS_A | BRIDGE_CALLED_FLAGS_TOP
%if WIDTH == 64
    BRIDGE_CALLED_COMBINE HOW, rax, 0
%else
    BRIDGE_CALLED_COMBINE HOW, eax, 0
%endif
    GAVE BRIDGE_CALLED_FLAGS_TOP
    BRIDGE_CALLED_NEGATE HOW, 0
    GAVE 1

    BRIDGE_CALLED_TEXTS HOW, name, wide, wide + 4
    GAVE 0x000204
    BRIDGE_CALLED_TEXTS HOW, wide + 4, wide + 4, 0
    GAVE 0xff0000

    BRIDGE_CALLED_FILL HOW, 0x5a, theirs, ROOM
    GAVE ROOM
    mov ADDRESS, theirs
    mov ecx, ROOM
.filled:
    cmp byte [ADDRESS], 0x5a
    CHECK
    inc ADDRESS
    dec ecx
    jnz .filled
    cmp byte [ADDRESS], 0
    CHECK
    mov ADDRESS, theirs
    BRIDGE_CALLED_TOTAL HOW, [five], ADDRESS, ROOM
    GAVE ROOM * 0x5a + 5
    BRIDGE_CALLED_TOTAL HOW, 5, theirs, ROOM + 1
    cmp eax, BRIDGE_KIND_INVALID_PARAMETERS << 8 | 2 << 16
    GAVE 0
    BRIDGE_CALLED_REVERSE HOW, name, 4, theirs, 4
    GAVE 4
    cmp dword [theirs], 'eman'
    CHECK
    BRIDGE_CALLED_REVERSE HOW, 0, 9, 0, 9
    GAVE 3

    BRIDGE_CALLED_FAILS HOW, BRIDGE_CALLED_PROBLEM_NOT_THERE
    mov ecx, eax
%if WIDTH == 64
    shr rax, 32
    cmp eax, 0xc0000034
    CHECK
%endif
    cmp ecx, BRIDGE_KIND_FAILED << 8 | BRIDGE_CALLED_PROBLEM_NOT_THERE << 16
    CHECK
    test ebx, ebx
    CHECK
    BRIDGE_CALLED_NOTHING HOW
    GAVE 0
%if WIDTH == 64
    BRIDGE_CALLED_SLOW HOW, 0x100000002
%else
    BRIDGE_CALLED_SLOW HOW, 2, 1
%endif
    GAVE 0xfffffffd, 0xfffffffe
    BRIDGE_CALLED_KEYWORDS HOW, 1, 2, 3, 4
    GAVE 10

%if WIDTH == 64
    mov r8d, 5
    mov r9d, 6
%elif HOW == BRIDGE_CPUID
    mov ebx, 5
    mov edx, 6
%else
    mov esi, 5
    mov edi, 6
%endif
    BRIDGE_CALLED_PLAIN HOW, failed
    cmp eax, ~5 & 0xffffffff
    CHECK
    cmp ebx, 11
    CHECK
    mov eax, BRIDGE_CALLED_ANSWER
    cmp eax, 42
    CHECK
    mov eax, 0x600d
    hlt
failed:
    mov eax, ebp
    hlt

name: db "name", 0
align 2
wide: dw 'w', 0x4e16, 0
align 8
five: dq 5
theirs: times ROOM + 1 db 0
