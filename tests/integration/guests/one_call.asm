; One call, then HLT: for what happens to a guest whose handler misbehaves. Its rbx is
; 0x1234 before and, where nobody answers, after. ecx counts that it went on.
;
;   -DHOW=1|2|3  -DREQUEST=n  -DMETHOD=n  -DVALUE=n

%include "bridge.inc"

bits 64
org 0x100000
    mov r8, VALUE
    mov r9d, 0
    mov ebx, 0x1234
    BRIDGE_CALL HOW, REQUEST, METHOD
    mov r15d, 0x600d
    hlt
