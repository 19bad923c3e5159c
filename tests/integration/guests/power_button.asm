; A multiboot guest for QEMU's machine `pc`: says "up" at port 0xe9, and when its power button is pressed "off", and
; powers off. With DEAF=1 it says "up" and nothing else.
%ifndef DEAF
%define DEAF 0
%endif
BASE       equ 0x100000
PM1_STATUS equ 0x600                    ; where SeaBIOS puts the PIIX4's (ACPI 6.5, 4.8.3.1)
PM1_ENABLE equ PM1_STATUS + 2
PM1_CONTROL equ PM1_STATUS + 4
BUTTON     equ 1 << 8
SLEEP      equ 1 << 13                  ; of type 0, which is S5 here
CONSOLE    equ 0xe9
bits 32
org BASE
header:
    dd 0x1BADB002, 0x00010003, -(0x1BADB002 + 0x00010003)
    dd BASE, BASE, 0, 0, start
start:
    cli
    mov dx, PM1_ENABLE
    mov ax, BUTTON
    out dx, ax
    mov esi, up
    mov ecx, up_end - up
    mov dx, CONSOLE
    rep outsb
.wait:
    pause
    mov dx, PM1_STATUS
    in ax, dx
    test ax, BUTTON
    jz .wait
%if DEAF
    jmp .wait
%endif
    mov esi, off
    mov ecx, off_end - off
    mov dx, CONSOLE
    rep outsb
    mov dx, PM1_CONTROL
    mov ax, SLEEP
    out dx, ax
    hlt
up: db 'up', 10
up_end:
off: db 'off', 10
off_end:
