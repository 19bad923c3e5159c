; Calls a handler COUNT times, checks every register of each answer, then has the host
; reverse eight bytes in memory. Ends with eax = 0x600d, or the number of the check that
; failed. For the handler `Echo` of tests/integration/test_unicorn.py.
;
;   -DWIDTH=64|32  -DHOW=1|2|3  -DPAGING=0|1|2 (2: PAE, 32-bit code)  -DCOUNT=n

%include "bridge.inc"
%include "paging.inc"

REQUEST equ 0x0100

bits WIDTH
org 0x100000

%if WIDTH == 64
    default rel
    mov r14, rdi                        ; the number of the vCPU
  %if PAGING
    ENABLE_PAGING_4_LEVEL
    mov rbx, ALIAS + in_alias
    jmp rbx
in_alias:
  %endif
    mov r15d, COUNT
again:
    mov r12, 0x8000000000000000
    or r12, r15
    mov r8, r12
    mov r9, r14
    mov r10, 0x1111111111111111
    mov r11, 0x2222222222222222
    BRIDGE_CALL HOW, REQUEST, 1
    mov rsi, 1
    BRIDGE_CHECK_STAMPS done
    mov rsi, 2
    not rax                             ; value1 comes back inverted
    cmp rax, r12
    jne done
    mov rsi, 3
    mov rax, 0x3333333333333333         ; the other three come back as their sum
    add rax, r14
    cmp rbx, rax
    jne done
    dec r15d
    jnz again

    lea r8, [text]
    lea r9, [answer]
    imul rax, r14, 8                    ; a place for each vCPU
    add r9, rax
    mov r13, r9
    mov r10d, 8
    mov r11d, 0
    BRIDGE_CALL HOW, REQUEST, 2
    mov rsi, 4
    BRIDGE_CHECK_STAMPS done
    mov rsi, 5
    mov rax, 'hgfedcba'
    cmp [r13], rax
    jne done
    mov esi, 0x600d
done:
    mov rax, rsi
    hlt
%else
  %if PAGING == 1
    ENABLE_PAGING_32_BIT
  %elif PAGING == 2
    ENABLE_PAGING_PAE
  %endif
  %if PAGING
    mov ebx, ALIAS + in_alias
    jmp ebx
in_alias:
  %endif
    mov dword [left], COUNT
again:
    mov eax, [left]
    or eax, 0x80000000
    mov [sent], eax
  %if HOW == BRIDGE_CPUID
    mov ebx, eax
    mov edx, 0x10000000
    mov esi, 0x11111111
    mov edi, 0x22222222
  %else
    mov esi, eax
    mov edi, 0x33333333
  %endif
    BRIDGE_CALL HOW, REQUEST, 1
    mov esi, 1
    BRIDGE_CHECK_STAMPS done
    mov esi, 2
    not eax
    cmp eax, [sent]
    jne done
    mov esi, 3
  %if HOW == BRIDGE_CPUID
    cmp ebx, 0x43333333
  %else
    cmp ebx, 0x33333333
  %endif
    jne done
    dec dword [left]
    jnz again

  %if PAGING
    %define AT(name) (ALIAS + name)
  %else
    %define AT(name) (name)
  %endif
  %if HOW == BRIDGE_CPUID
    mov ebx, AT(text)
    mov edx, AT(answer)
    mov esi, 8
  %else
    mov esi, AT(text)
    mov edi, AT(answer)
  %endif
    BRIDGE_CALL HOW, REQUEST, 2
    mov esi, 4
    BRIDGE_CHECK_STAMPS done
    mov esi, 5
    cmp dword [answer], 'hgfe'
    jne done
    cmp dword [answer + 4], 'dcba'
    jne done
    mov esi, 0x600d
done:
    mov eax, esi
    hlt
%endif

align 8
text:   db 'abcdefgh'
answer: times 64 db 0
left:   dd 0
sent:   dd 0
