; The first process of a guest made by `vmibridge qemu initramfs`: runs programs one after the other,
; says how each ended, and powers off.
;
; - The programs are the paths in /etc/programs, each with a NUL behind it.
; - Each gets the arguments behind `--` of the kernel's command line, and NAME=VALUE from there in its
;   environment, as the kernel gives both to its first process. PATH and LD_LIBRARY_PATH are added.
; - Lines of this program begin with "vmibridge: "; the last is "all right", or "WRONG" when a program
;   ended with another status than 0.
;
; An ELF file of one piece, made by nasm alone, so that the same source gives the same bytes anywhere:
;
;   nasm -Werror -f bin init.asm -o init

SYS_READ    equ 0
SYS_WRITE   equ 1
SYS_OPEN    equ 2
SYS_IOCTL   equ 16
SYS_PAUSE   equ 34
SYS_FORK    equ 57
SYS_EXECVE  equ 59
SYS_EXIT    equ 60
SYS_WAIT4   equ 61
SYS_SYNC    equ 162
SYS_MOUNT   equ 165
SYS_REBOOT  equ 169

TCSBRK      equ 0x5409                  ; with an argument other than 0: wait until all is sent
MAGIC1      equ 0xfee1dead              ; linux/reboot.h
MAGIC2      equ 0x28121969
POWER_OFF   equ 0x4321fedc

MAX_LIST    equ 65536                   ; bytes of /etc/programs
MAX_LINE    equ 4352                    ; a path has 4096 at the most
MAX_ENV     equ 256                     ; the kernel gives 34

bits 64
default rel
org 0x400000

; --- ELF64 header, one segment ------------------------------------------------------------
elf:
    db 0x7f, "ELF", 2, 1, 1, 0          ; 64 bits, little-endian, System V
    dq 0
    dw 2, 62                            ; an executable, for x86-64
    dd 1
    dq start, program_header - elf, 0
    dd 0
    dw program_header - elf, 56, 1, 0, 0, 0
program_header:
    dd 1, 7                             ; loaded: readable, writable, executable
    dq 0, elf, elf, file_end - elf, file_end - elf + ZEROS, 0x1000

; --- the program --------------------------------------------------------------------------
start:
    lea r15, [rsp + 8]                  ; argv, and behind its NULL the environment
    mov rax, [rsp]
    lea rsi, [r15 + 8 * rax + 8]
    lea rdi, [environment]
    lea rax, [path]
    stosq
    lea rax, [libraries]
    stosq
    mov ecx, MAX_ENV
.next_variable:
    lodsq
    test rax, rax
    jz .mount
    stosq
    loop .next_variable
.mount:
    xor eax, eax
    stosq
    ; What cannot be mounted is not there: programs that need it say so.
    lea rsi, [proc_at]
    lea rdx, [proc_type]
    call mount
    lea rsi, [sys_at]
    lea rdx, [sys_type]
    call mount
    lea rsi, [dev_at]
    lea rdx, [dev_type]
    call mount

    mov eax, SYS_OPEN
    lea rdi, [list_at]
    xor esi, esi
    syscall
    mov edi, eax
    xor eax, eax                        ; SYS_READ
    lea rsi, [list]
    mov edx, MAX_LIST
    syscall
    xor r14d, r14d                      ; whether something went wrong
    lea r12, [list]                     ; the next path
    lea r13, [list]
    test rax, rax
    js .list_missing
    add r13, rax
.next_program:
    cmp r12, r13
    jae .end
    call run
.skip:                                  ; to behind its NUL
    inc r12
    cmp byte [r12 - 1], 0
    jne .skip
    jmp .next_program
.list_missing:
    inc r14d
.end:
    lea rsi, [all_right]
    test r14d, r14d
    jz .tell
    lea rsi, [wrong]
.tell:
    call begin_line
    call put
    call end_line
    mov eax, SYS_IOCTL
    mov edi, 1
    mov esi, TCSBRK
    mov edx, 1
    syscall
    mov eax, SYS_SYNC
    syscall
    mov eax, SYS_REBOOT
    mov edi, MAGIC1
    mov esi, MAGIC2
    mov edx, POWER_OFF
    syscall
.stay:                                  ; no power to switch off; without us the kernel panics
    mov eax, SYS_PAUSE
    syscall
    jmp .stay

; Mount type rdx at rsi.
mount:
    mov eax, SYS_MOUNT
    mov rdi, rdx
    xor r10d, r10d
    xor r8d, r8d
    syscall
    ret

; Run the program whose path is at r12, and say how it ended.
run:
    mov eax, SYS_FORK
    syscall
    test rax, rax
    jz short .child              ; nasm 2 takes the long form, nasm 3 the short one
    js .failed
    mov ebx, eax
.wait:                                  ; orphans of programs end up here, too
    mov eax, SYS_WAIT4
    mov rdi, -1
    lea rsi, [status]
    xor edx, edx
    xor r10d, r10d
    syscall
    cmp eax, ebx
    je .ended
    test rax, rax
    jns .wait
.failed:
    neg rax
    lea rbx, [cannot_start]
    jmp .tell
.ended:
    mov eax, [status]
    test eax, eax
    jz .right
    inc r14d
.right:
    lea rbx, [ended_with]
    mov ecx, eax
    shr eax, 8
    and ecx, 0x7f
    jz .say
    lea rbx, [ended_by]
    mov eax, ecx
    jmp .say
.tell:
    inc r14d
.say:                                   ; the path, the text at rbx, the number in eax
    push rax
    call begin_line
    mov rsi, r12
    call put
    mov rsi, rbx
    call put
    pop rax
    call put_number
    jmp end_line
.child:
    mov [r15], r12                      ; its argv[0]
    mov eax, SYS_EXECVE
    mov rdi, r12
    mov rsi, r15
    lea rdx, [environment]
    syscall
    neg rax
    lea rbx, [cannot_start]
    call .say
    mov eax, SYS_EXIT
    mov edi, 127
    syscall

; --- a line, written in one piece; rdi is where it goes on ----------------------------------
begin_line:
    lea rdi, [line]
    push rsi
    lea rsi, [prefix]
    call put
    pop rsi
    ret

; Put the text at rsi.
put:
    lodsb
    test al, al
    jz .done
    lea rcx, [line + MAX_LINE - 32]     ; room for a number and the end
    cmp rdi, rcx
    jae .done
    stosb
    jmp put
.done:
    ret

; Put the number in eax, in decimal.
put_number:
    mov ecx, 10
    xor edx, edx
    div ecx
    push rdx
    test eax, eax
    jz .digit
    call put_number
.digit:
    pop rax
    add al, '0'
    stosb
    ret

end_line:
    mov al, 10
    stosb
    lea rsi, [line]
    mov rdx, rdi
    sub rdx, rsi
    mov eax, SYS_WRITE
    mov edi, 1
    syscall
    ret

; --- data -----------------------------------------------------------------------------------
list_at:      db "/etc/programs", 0
proc_at:      db "/proc", 0
proc_type:    db "proc", 0
sys_at:       db "/sys", 0
sys_type:     db "sysfs", 0
dev_at:       db "/dev", 0
dev_type:     db "devtmpfs", 0
prefix:       db "vmibridge: ", 0
all_right:    db "all right", 0
wrong:        db "WRONG", 0
ended_with:   db " ended with ", 0
ended_by:     db " was ended by signal ", 0
cannot_start: db " cannot be started, error ", 0
path:         db "PATH=/bin", 0
libraries:    db "LD_LIBRARY_PATH=/lib", 0

file_end:

section .bss align=1
environment:  resq 2 + MAX_ENV + 1
status:       resq 1
line:         resb MAX_LINE
list:         resb MAX_LIST + 1
ZEROS equ $ - environment
