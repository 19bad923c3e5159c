/*
 * What a program needs of Linux, without a C library: so the 32-bit build needs none, either.
 * For one source file per program. `run` is its main.
 */
#ifndef TINY_H
#define TINY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static int run(int count, char **arguments);

#ifdef __x86_64__

enum { SYS_WRITE = 1, SYS_NANOSLEEP = 35, SYS_AFFINITY = 203, SYS_CLOCK = 228, SYS_EXIT = 231 };

static long call_kernel(long number, long first, long second, long third)
{
    long result;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(first), "S"(second), "d"(third)
                     : "rcx", "r11", "memory");
    return result;
}

__asm__(".globl _start\n"
        "_start:\n"
        "    xorl %ebp, %ebp\n"
        "    movq %rsp, %rdi\n"
        "    andq $-16, %rsp\n"
        "    call begin\n");

#else

enum { SYS_WRITE = 4, SYS_NANOSLEEP = 162, SYS_AFFINITY = 241, SYS_EXIT = 252, SYS_CLOCK = 265 };

static long call_kernel(long number, long first, long second, long third)
{
    long result;

    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "a"(number), "b"(first), "c"(second), "d"(third)
                     : "memory");
    return result;
}

__asm__(".globl _start\n"
        "_start:\n"
        "    xorl %ebp, %ebp\n"
        "    movl %esp, %eax\n"
        "    andl $-16, %esp\n"
        "    subl $12, %esp\n"
        "    pushl %eax\n"
        "    call begin\n");

#endif

/* The stack of a new process: how many arguments, and the arguments. */
__attribute__((used, noreturn)) void begin(long *stack);
void begin(long *stack)
{
    int status = run((int)stack[0], (char **)(stack + 1));

    for (;;) {
        call_kernel(SYS_EXIT, status, 0, 0);
    }
}

struct timespan { long seconds, nanoseconds; };

static inline void sleep_for(long milliseconds)
{
    struct timespan span = {milliseconds / 1000, milliseconds % 1000 * 1000000};

    call_kernel(SYS_NANOSLEEP, (long)&span, 0, 0);
}

/* Microseconds of the monotonic clock; wraps. */
static inline unsigned microseconds(void)
{
    struct timespan span;

    call_kernel(SYS_CLOCK, 1, (long)&span, 0);
    return (unsigned)span.seconds * 1000000u + (unsigned)(span.nanoseconds / 1000);
}

/* Run on this CPU alone. */
static inline bool pin(unsigned cpu)
{
    unsigned long mask = 1ul << cpu;

    return call_kernel(SYS_AFFINITY, 0, sizeof mask, (long)&mask) == 0;
}

/* A line is put together, and written in one piece: programs that run at a time do not mix theirs. */
static char line[256];
static size_t line_length;

static inline void put(const char *text)
{
    while (*text && line_length < sizeof line) {
        line[line_length++] = *text++;
    }
}

static inline void put_number(unsigned long value, unsigned base, unsigned width)
{
    char digits[32];
    size_t at = sizeof digits - 1;

    digits[at] = 0;
    do {
        digits[--at] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value || sizeof digits - 1 - at < width);
    put(digits + at);
}

static inline void end_line(void)
{
    put("\n");
    call_kernel(SYS_WRITE, 1, (long)line, (long)line_length);
    line_length = 0;
}

static inline bool same(const char *one, const char *other)
{
    while (*one && *one == *other) {
        one++;
        other++;
    }
    return *one == *other;
}

static inline unsigned number_of(const char *text)
{
    unsigned value = 0;

    while (*text >= '0' && *text <= '9') {
        value = 10 * value + (unsigned)(*text++ - '0');
    }
    return value;
}

#endif
