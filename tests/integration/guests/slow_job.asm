; vCPU 0 asks for a job through a gate; vCPU 1, if there is one, makes COUNT fast calls
; meanwhile, and checks every answer. For the handler `Jobs` of
; tests/integration/test_slow_handlers.py.
;
; Each vCPU ends with eax = 0x600d, or the number of the check that failed: 1 nobody answered
; the job, 2 its value1, 3 its value2, 4 a fast call. vCPU 0 leaves in ecx how often it was
; told to wait.
;
;   -DWIDTH=64|32  -DHOW=1|2|3  -DMETHOD=n  -DANSWER=n (value1 of the job)  -DCOUNT=n
;   -DCOUNTER=0|1 (the last value that there is counts the attempts)

%macro BRIDGE_SLEEP 0
    inc dword [waits]
    BRIDGE_PAUSE 200000
%endmacro

%include "bridge.inc"
%include "gate.inc"

REQUEST equ 0x0300
FAST    equ 2
TOKEN   equ 0x70c0ffee

bits WIDTH
org 0x100000
%if WIDTH == 64
    default rel
    %define VALUE1 r8d
    %define VALUE2 r9d
    %define LAST_VALUE r11d
%elif HOW == BRIDGE_CPUID
    %define VALUE1 ebx
    %define VALUE2 edx
    %define LAST_VALUE edi
%else
    %define VALUE1 esi
    %define LAST_VALUE edi
%endif

%macro CHECK 1
    mov dword [check], %1
%endmacro

    test edi, edi                       ; the number of the vCPU
    jnz fast

    mov VALUE1, TOKEN
%ifdef VALUE2
    mov VALUE2, 0x22222222
%endif
    mov LAST_VALUE, 0
    CHECK 1
%if COUNTER
    BRIDGE_GATE HOW, REQUEST, METHOD, failed, LAST_VALUE
%else
    BRIDGE_GATE HOW, REQUEST, METHOD, failed
%endif
    CHECK 2
    cmp eax, ANSWER
    jne failed
    CHECK 3
    cmp ebx, ~TOKEN & 0xffffffff        ; value2: value1 inverted
    jne failed
    CHECK 0x600d
failed:
    mov eax, [check]
    mov ecx, [waits]
    hlt

fast:
    mov dword [left], COUNT
.again:
    mov VALUE1, [left]
    BRIDGE_CALL HOW, REQUEST, FAST
    BRIDGE_CHECK_STAMPS .failed
    not eax                             ; value1 comes back inverted
    cmp eax, [left]
    jne .failed
    dec dword [left]
    jnz .again
    mov eax, 0x600d
    hlt
.failed:
    mov eax, 4
    hlt

align 4
check:  dd 0
waits:  dd 0
left:   dd 0
