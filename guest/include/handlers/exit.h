/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"

#ifndef VMIBRIDGE_EXIT_H
#define VMIBRIDGE_EXIT_H

/*
 * exit: request 0x0111.
 *
 * Gives what the guest exits with to the consumer of the outcomes.
 */
#define VMIBRIDGE_EXIT_REQUEST 0x0111u
#define VMIBRIDGE_EXIT_METHOD_EXIT 0xffffu
#define VMIBRIDGE_EXIT_EXIT_REASON_LIMIT 1024u

/*
 * End the run with a status, and a reason in words.
 *
 * status_: a number, 32 bits.
 * reason: UTF-8, at most 1024 bytes, then a NUL. Or none, at address 0.
 */
static inline vmibridge_status vmibridge_exit_exit(
    const struct vmibridge_caller *caller, uint32_t status_, const char *reason)
{
    struct vmibridge_method_call call;

    vmibridge_begin_call(&call, VMIBRIDGE_EXIT_REQUEST, VMIBRIDGE_EXIT_METHOD_EXIT, 2, true);
    call.kinds = VMIBRIDGE_WORD_TEXT << 4;
    call.block[1] = status_;
    call.block[2] = VMIBRIDGE_ADDRESS(reason);
    call.limits[1] = VMIBRIDGE_EXIT_EXIT_REASON_LIMIT;
    return vmibridge_call_method(caller, &call);
}

#endif
