/*
 * A guest with nothing below it, in C and in C++: ends with eax = 0x600d, or the line of the check
 * of called_methods.h that failed.
 *
 *   -DHOW=1|2|3   the instruction
 */
#include "called_methods.h"

static unsigned char ours[ROOM + 1], theirs[ROOM + 1];

static void ask_at_once(void *state)
{
    (void)state;
}

#ifdef __cplusplus
extern "C" __attribute__((used)) unsigned guest(void);
#else
__attribute__((used)) unsigned guest(void);
#endif

unsigned guest(void)
{
    struct vmibridge_caller caller = vmibridge_by((enum vmibridge_how)HOW);
    struct called_buffers buffers;

    caller.sleep = ask_at_once;
    buffers.ours = ours;
    buffers.theirs = theirs;
    return call_all(&caller, &buffers);
}

__asm__(".section .entry, \"ax\"\n"
        ".globl _start\n"
        "_start:\n"
        "    call guest\n"
        "    hlt\n"
        ".text\n");
