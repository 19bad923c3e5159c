; Asks the host what there is, and sends patterns through every register. Ends with
; eax = 0x600d, or the number of the check that failed: 1 version, 2 features, 3 deadlines,
; 4 to 6 limits, 7 a limit that is not there, 8 the self-test.
;
;   -DWIDTH=64|32  -DHOW=1|2|3  -DFEATURES=n  -DSOFT=n  -DHARD=n (milliseconds)
;   -DACCESS=n  -DIN_FLIGHT=n  -DRESULT_TIMEOUT=n

%include "bridge.inc"
%include "handshake.inc"

bits WIDTH
org 0x100000
%if WIDTH == 64
    default rel
%endif

%macro CHECK 1
    mov dword [check], %1
%endmacro

%macro EXPECT 2
    cmp %1, %2
    jne failed
%endmacro

    CHECK 1
    BRIDGE_HANDSHAKE HOW, failed
    EXPECT eax, 0x00010000
    CHECK 2
    EXPECT ebx, FEATURES

    CHECK 3
    BRIDGE_CALL HOW, BRIDGE_HOST, BRIDGE_HOST_DEADLINES
    BRIDGE_CHECK_STAMPS failed
    EXPECT eax, SOFT
    EXPECT ebx, HARD

    CHECK 4
    BRIDGE_LIMIT HOW, BRIDGE_LIMIT_ACCESS, failed
    EXPECT eax, ACCESS
    CHECK 5
    BRIDGE_LIMIT HOW, BRIDGE_LIMIT_IN_FLIGHT, failed
    EXPECT eax, IN_FLIGHT
    CHECK 6
    BRIDGE_LIMIT HOW, BRIDGE_LIMIT_RESULT_TIMEOUT, failed
    EXPECT eax, RESULT_TIMEOUT
    CHECK 7
    BRIDGE_LIMIT HOW, 0x1000, expected
    jmp failed
expected:

    CHECK 8
    BRIDGE_SELF_TEST HOW, failed
    CHECK 0x600d
failed:
    mov eax, [check]
    hlt

align 4
check:  dd 0
