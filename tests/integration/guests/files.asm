; Puts a file of SIZE bytes in pieces of PIECE bytes, ROUNDS times in the place of the one before, and
; gets it as often, for the handler `Files`. The file is made of numbers of 64 bits that count up from
; 0; what it gets has to be the same. With SMALL=1 the memory for it is mapped by pages of 4 KiB, each
; before the one that comes next, as that of a program that runs for long. It asks again while it is
; told to wait.
;
; In QEMU it ends with status 33 (see `long_mode.inc`) when all was right, else with 35, and says which
; call went wrong. With UNICORN=1 it ends with eax = 0x600d, or the number of the call that went wrong.
%include "bridge.inc"
%ifndef UNICORN
%define UNICORN 0
%endif
%if UNICORN
%include "paging.inc"
bits 64
default rel
org 0x100000
    ENABLE_PAGING_4_LEVEL
    call main
    hlt
TABLES   equ PAGE_TABLES
PHYSICAL equ 0x800000                   ; 8 MiB: the file
%else
%include "long_mode.inc"
PHYSICAL equ 0x1000000                  ; 16 MiB
%endif
%ifndef SIZE
%define SIZE 65537
%endif
%ifndef PIECE
%define PIECE 65536
%endif
%ifndef ROUNDS
%define ROUNDS 1
%endif
%ifndef SMALL
%define SMALL 0
%endif

REQUEST equ 0x0110
BEGIN   equ 1
PUT     equ 2
GET     equ 3
END     equ 4
READ    equ 1
REPLACE equ 4

PAGES    equ (SIZE + 4095) / 4096 + 1
SMALL_TABLES equ 0x200000               ; 2 MiB: page tables of small pages, 4 KiB for 2 MiB
%if SMALL
FILE     equ 0x80000000                 ; where nothing else is mapped
%else
FILE     equ PHYSICAL
%endif

; ASK method: its words are in r8 to r11, which stay; what it gives is in rbx.
%macro ASK 1
%%again:
    BRIDGE_CALL BRIDGE_VMCALL, REQUEST, %1
    mov r15d, %1
    BRIDGE_CHECK_STAMPS failed
    cmp ah, 1                           ; WAITING
    je %%again
    test ah, ah
    jnz failed
%endmacro

main:
%if SMALL
    call map_small_pages
%endif
    mov rdi, FILE
    xor eax, eax
    mov ecx, (SIZE + 7) / 8
.fill:
    mov [rdi], rax
    inc rax
    add rdi, 8
    dec ecx
    jns .fill
    mov r14d, ROUNDS
.round:
    lea r8, [name]
    mov r9, SIZE
    mov r10d, REPLACE
    ASK BEGIN
    mov r8, rbx
    xor r9d, r9d
.put:
    mov r11, SIZE
    sub r11, r9
    jz .put_all
    mov eax, PIECE
    cmp r11, rax
    cmova r11, rax
    mov r10, FILE
    add r10, r9
    ASK PUT
    cmp rbx, r11
    jne failed
    add r9, r11
    jmp .put
.put_all:
    xor r9d, r9d
    xor r10d, r10d
    ASK END
    lea r8, [name]
    xor r9d, r9d
    mov r10d, READ
    ASK BEGIN
    mov r8, rbx
    xor r9d, r9d
.get:
    mov r10, FILE
    add r10, r9
    mov r11, SIZE
    sub r11, r9
    add r11, 1                          ; there is nothing behind its end
    mov eax, PIECE
    cmp r11, rax
    cmova r11, rax
    mov r13, r11
    ASK GET
    test rbx, rbx
    jz .got_all
    add r9, rbx
    jmp .get
.got_all:
    cmp r9, SIZE
    jne failed
    xor r9d, r9d
    xor r10d, r10d
    ASK END
    dec r14d
    jnz .round
    mov rsi, FILE
    xor eax, eax
    mov ecx, SIZE / 8
    jmp .compared
.compare:
    cmp [rsi], rax
    jne failed
    inc rax
    add rsi, 8
    dec ecx
.compared:
    test ecx, ecx
    jnz .compare
    mov eax, 0x600d
    ret
failed:
%if UNICORN
    mov eax, r15d
    hlt
%else
    push rax
    SAY "call "
    mov eax, r15d
    call hex
    SAY " failed with "
    pop rax
    call hex
    SAY {10}
    mov al, 0x11
    mov dx, 0xF4
    out dx, al
%endif

%if SMALL
; 2 GiB to 3 GiB is TABLES + 0x1010; a table of tables of 512 * 2 MiB behind SMALL_TABLES.
map_small_pages:
    mov edi, SMALL_TABLES
    xor eax, eax
    mov ecx, (0x1000 + (PAGES + 511) / 512 * 0x1000) / 8
    rep stosq
    mov dword [abs TABLES + 0x1010], SMALL_TABLES + 7
    mov edi, SMALL_TABLES
    mov eax, SMALL_TABLES + 0x1007
    mov ecx, (PAGES + 511) / 512
.tables:
    mov [rdi], rax
    add rdi, 8
    add eax, 0x1000
    dec ecx
    jnz .tables
    mov edi, SMALL_TABLES + 0x1000
    mov rax, PHYSICAL + (PAGES - 1) * 4096 + 7
    mov ecx, PAGES
.pages:
    mov [rdi], rax
    add rdi, 8
    sub rax, 4096
    dec ecx
    jnz .pages
    mov rax, cr3
    mov cr3, rax
    ret
%endif
name: db "file.bin", 0
