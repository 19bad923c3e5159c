/*
 * The start of a C guest that has nothing below it: a flat image, linked by flat.ld and run in
 * Unicorn. It calls `int main(void)`. 0 ends the guest; any other number makes it fail, with the
 * number in eax: `vmibridge run` then tells it, and ends with status 1.
 */
#ifndef VMIBRIDGE_START_H
#define VMIBRIDGE_START_H

#include "vmibridge.h"

int main(void);

__asm__(".pushsection .entry, \"ax\"\n"
        ".globl _start\n"
        "_start:\n"
        "    call main\n"
        "    test %eax, %eax\n"
        "    jnz 1f\n"
        "    hlt\n"
        "1:  ud2\n"
        "    .ascii \"status\"\n"
        ".popsection\n");

/*
 * A compiler may call these for an assignment or an initial value, whatever it was told, and a
 * guest may. They are not made of loops, which a compiler would take for calls of themselves.
 */
__attribute__((weak, used)) void *memcpy(void *target, const void *source, size_t size)
{
    void *to = target;

    __asm__ volatile("rep movsb" : "+D"(to), "+S"(source), "+c"(size) : : "memory");
    return target;
}

__attribute__((weak, used)) void *memset(void *target, int value, size_t size)
{
    void *to = target;

    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
    return target;
}

__attribute__((weak, used)) int memcmp(const void *one, const void *other, size_t size)
{
    const unsigned char *left = one, *right = other;

    for (; size; left++, right++, size--) {
        if (*left != *right) {
            return *left - *right;
        }
        __asm__ volatile("");
    }
    return 0;
}

__attribute__((weak, used)) size_t strlen(const char *text)
{
    size_t size = 0;

    while (text[size]) {
        size++;
        __asm__ volatile("");
    }
    return size;
}

#endif
