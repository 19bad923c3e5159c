/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"

#ifndef VMIBRIDGE_ENVIRONMENT_H
#define VMIBRIDGE_ENVIRONMENT_H

/*
 * environment: request 0x0022.
 *
 * Hands out the values that its settings list, and no others.
 *
 * Its output is the name that was asked for, never the value, which may be a secret;
 * there is none when nothing was handed out.
 *
 * Hand named values to the guest: configuration, tokens, variables of the host.
 *
 * | 0x0001 GET | in | out |
 * |---|---|---|
 * | value1 | address of a name: UTF-8, at most 256 bytes, then a NUL | status |
 * | value2 | address of a buffer for the value | length of the value in bytes |
 * | value3 | capacity of the buffer in bytes; 0 stands for 256 | |
 *
 * The value goes into the buffer with a NUL behind it, which its length does not count.
 *
 * | status | when |
 * |---|---|
 * | invalid parameters | a name that is too long, no UTF-8 or not readable |
 * | | a buffer that is not writable |
 * | failed, native ENOENT | a name that is not handed out, whether the host has it or not |
 * | failed, native ERANGE | the buffer is too small: value2 is the capacity that it takes |
 *
 * The native code is in the upper half of the status, which an x86 guest does not see; it
 * can tell the two failures by value2, which is 0 for the first.
 */
#define VMIBRIDGE_ENVIRONMENT_REQUEST 0x0022u
#define VMIBRIDGE_ENVIRONMENT_METHOD_GET 0x0001u

/*
 * Write the value of a name into a buffer of the guest.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_environment_get(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_ENVIRONMENT_REQUEST, VMIBRIDGE_ENVIRONMENT_METHOD_GET, 4, false);
    call.wait = 0xffffffffu;
    call.waiting = 0x100u;
    call.block[1] = value1;
    call.block[2] = value2;
    call.block[3] = value3;
    call.block[4] = value4;
    status = vmibridge_call_method(caller, &call);
    *response = call.response;
    return status;
}

#endif
