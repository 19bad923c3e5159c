; Puts a file of SIZE bytes in pieces of PIECE bytes, ROUNDS times in the place of the one before, and
; gets it as often, for the handler `Files`. The file is made of numbers of 64 bits that count up from
; 0; what it gets has to be the same. With SMALL=1 the memory for it is mapped by pages of 4 KiB, each
; behind the one before in reverse, as that of a program that runs for long. It asks again while it
; is told to wait.
;   -DWHAT=1 puts alone, 2 gets alone, 3 both
;
; Ends with status 33 (see `long_mode.inc`) and says "ok" when all was right, or which call was not.
%include "bridge.inc"
%include "long_mode.inc"
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
%ifndef WHAT
%define WHAT 3
%endif

REQUEST equ 0x0110
BEGIN   equ 1
PUT     equ 2
GET     equ 3
END     equ 4
READ    equ 1
REPLACE equ 4

PHYSICAL equ 0x2000000                  ; 32 MiB: the file, and a page for small ones behind it
PAGES    equ (SIZE + 4095) / 4096 + 1
SMALL_TABLES equ 0x200000               ; 2 MiB: page tables of small pages, 4 KiB for 2 MiB
%if SMALL
FILE     equ 0x80000000                 ; where nothing else is mapped
%else
FILE     equ PHYSICAL
%endif

; ASK method: values in r8 to r11, as they stay; what it gives in rbx. Goes to `failed` for a failure.
%macro ASK 1
%%again:
    BRIDGE_CALL BRIDGE_VMCALL, REQUEST, %1
    BRIDGE_CHECK_STAMPS nobody
    cmp ah, 1                           ; WAITING
    je %%again
    mov r15d, %1
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
%if WHAT & 1
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
%endif
%if WHAT & 2
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
%endif
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
    SAY {"ok", 10}
    ret
nobody:
    SAY {"nobody answers", 10}
    ret
failed:
    push rax
    SAY "call "
    mov eax, r15d
    call hex
    SAY " failed with "
    pop rax
    call hex
    SAY {10}
    ret

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
