/* What compilers call by themselves. */
#include "platform.h"

void *memcpy(void *target, const void *source, size_t size)
{
    void *at = target;

    __asm__ volatile("rep movsb" : "+D"(at), "+S"(source), "+c"(size) : : "memory");
    return target;
}

void *memset(void *target, int value, size_t size)
{
    void *at = target;

    __asm__ volatile("rep stosb" : "+D"(at), "+c"(size) : "a"(value) : "memory");
    return target;
}

int memcmp(const void *one, const void *other, size_t size)
{
    const unsigned char *left = one, *right = other;

    for (; size; size--, left++, right++) {
        if (*left != *right) {
            return *left - *right;
        }
    }
    return 0;
}
