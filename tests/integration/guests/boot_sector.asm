; A boot sector that runs at 07C0:0000, with a CPUID in it. The trap is `site`, in the two bytes before
; the signature. Ends by isa-debug-exit at 0xf4: 0x10 (status 33) when it comes to its end.
bits 16
org 0
    jmp 0x07C0:start
start:
    mov eax, 0x42494D56
    mov ecx, 0x00010100
    mov ebx, 0x1234
    nop
site:
    cpuid
    mov al, 0x10
    out 0xF4, al
stay:
    hlt
    jmp stay
    times 508 - ($ - $$) db 0
    dw site, 0xAA55
