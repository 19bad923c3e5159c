/*
 * The start of a guest in C for QEMU's -kernel (multiboot), with nothing below it: 64-bit code with the
 * first 4 GiB mapped as they are, for ring 3, too, or 32-bit code without paging. Calls `guest` and
 * ends QEMU by isa-debug-exit at 0xf4: status 33 when it returned NULL, else 35, and on the first
 * serial port what it returned.
 */
#ifndef DEVICE_START_H
#define DEVICE_START_H

#include "vmibridge_device.h"

static const char *guest(void);

enum { INTERRUPT_VECTOR = 0x40, APIC = (int)0xfee00000 };

#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)

__asm__(".pushsection .entry, \"ax\"\n"
        ".code32\n"
        "    .long 0x1badb002, 0x00010003, -(0x1badb002 + 0x00010003)\n"
        "    .long 0x100000, 0x100000, 0, 0, _start\n"
        ".globl _start\n"
        "_start:\n"
        "    cli\n"
        "    cld\n"
        "    movl $0x90000, %esp\n"
#ifdef __x86_64__
        "    movl $0x70000, %edi\n"
        "    xorl %eax, %eax\n"
        "    movl $(6 * 1024), %ecx\n"
        "    rep stosl\n"
        "    movl $0x71007, 0x70000\n"
        "    movl $0x72007, 0x71000\n"
        "    movl $0x73007, 0x71008\n"
        "    movl $0x74007, 0x71010\n"
        "    movl $0x75007, 0x71018\n"
        "    movl $0x72000, %edi\n"
        "    movl $0x87, %eax\n"
        "1:  movl %eax, (%edi)\n"
        "    addl $0x200000, %eax\n"
        "    addl $8, %edi\n"
        "    cmpl $0x76000, %edi\n"
        "    jb 1b\n"
        "    movl $0x70000, %eax\n"
        "    movl %eax, %cr3\n"
        "    movl %cr4, %eax\n"
        "    orl $0x20, %eax\n"
        "    movl %eax, %cr4\n"
        "    movl $0xc0000080, %ecx\n"
        "    rdmsr\n"
        "    orl $0x100, %eax\n"
        "    wrmsr\n"
        "    movl %cr0, %eax\n"
        "    orl $0x80000001, %eax\n"
        "    movl %eax, %cr0\n"
        "    lgdt pointer_to_gdt\n"
        "    ljmp $8, $2f\n"
        ".code64\n"
        "2:  movw $16, %ax\n"
        "    movw %ax, %ds\n"
        "    movw %ax, %es\n"
        "    movw %ax, %ss\n"
#endif
        "    call begin\n"
#ifdef __x86_64__
        ".balign 8\n"
        /* code and data of ring 0; data and 64-bit code of ring 3 */
        "gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0x00cff3000000ffff, 0x00affb000000ffff\n"
        "pointer_to_gdt: .word . - gdt - 1\n"
        "    .long gdt\n"
        "pointer_to_idt: .word 256 * 16 - 1\n"
        "    .quad 0x78000\n"
        "on_interrupt:\n"
        "    pushq %rax\n"
        "    movl $0xfee00000, %eax\n"
        "    movl $0, 0xb0(%rax)\n"
        "    popq %rax\n"
        "    incl interrupts(%rip)\n"
        "    iretq\n"
#endif
        ".popsection\n");

__attribute__((used)) static volatile unsigned interrupts;

static void say(const char *text)
{
    for (; *text; text++) {
        __asm__ volatile("outb %0, %1" : : "a"(*text), "Nd"((uint16_t)0x3f8));
    }
}

__attribute__((noreturn)) static void leave(const char *wrong)
{
    if (wrong) {
        say(wrong);
        say("\n");
    }
    for (;;) {
        __asm__ volatile("outb %0, %1" : : "a"((uint8_t)(wrong ? 0x11 : 0x10)), "Nd"((uint16_t)0xf4));
    }
}

__attribute__((used, noreturn)) void begin(void);
void begin(void)
{
    leave(guest());
}

#ifdef __x86_64__

/* Let INTERRUPT_VECTOR come to this vCPU, and nothing else. */
static inline void take_interrupts(void)
{
    extern char on_interrupt[];
    volatile uint32_t *gate = (volatile uint32_t *)(uintptr_t)(0x78000 + INTERRUPT_VECTOR * 16);
    volatile uint8_t *apic = (volatile uint8_t *)(uintptr_t)(uint32_t)APIC;
    const uintptr_t to = (uintptr_t)on_interrupt;

    gate[0] = 8u << 16 | ((uint32_t)to & 0xffff);
    gate[1] = ((uint32_t)to & 0xffff0000u) | 0x8e00;
    gate[2] = gate[3] = 0;
    __asm__ volatile("lidt pointer_to_idt");
    /* None of the PIC, of the APIC's timer, and of what is wired to it. */
    __asm__ volatile("outb %0, $0x21\n\toutb %0, $0xa1" : : "a"((uint8_t)0xff));
    *(volatile uint32_t *)(apic + 0xf0) = 0x1ff;
    *(volatile uint32_t *)(apic + 0x320) = 0x10000;
    *(volatile uint32_t *)(apic + 0x350) = 0x10000;
}

/* Go on in ring 3, on a stack of its own, with port I/O. */
__attribute__((noreturn)) static inline void leave_ring_0(void (*to)(void))
{
    __asm__ volatile("pushq $0x1b\n\t"
                     "pushq $0x87ff8\n\t"
                     "pushq $0x3002\n\t"
                     "pushq $0x23\n\t"
                     "pushq %0\n\t"
                     "iretq"
                     :
                     : "r"(to)
                     : "memory");
    __builtin_unreachable();
}

#endif

#endif
