/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"

#ifndef VMIBRIDGE_HELLO_H
#define VMIBRIDGE_HELLO_H

/*
 * hello: request 0x0001.
 *
 * Answers every method with a greeting, which is also its output.
 *
 * Greet the guest: the smallest handler, to try a guest with and to copy from.
 *
 * | any method | in | out |
 * |---|---|---|
 * | value1 | address of a name: UTF-8, at most 256 bytes, then a NUL | status |
 * | value2 | address of a buffer for the greeting, or 0 | length of the greeting in bytes |
 * | value3 | capacity of the buffer in bytes; 0 stands for 256 | |
 *
 * The greeting goes into the buffer with a NUL behind it, which its length does not count.
 *
 * | status | when |
 * |---|---|
 * | invalid parameters | a name that is empty, too long, no UTF-8 or not readable |
 * | | a buffer that is not writable |
 * | failed, native ERANGE | the buffer is too small: value2 is the capacity that it takes |
 *
 * The native code is in the upper half of the status, which an x86 guest does not see.
 */
#define VMIBRIDGE_HELLO_REQUEST 0x0001u

/*
 * Greet by name; see the table of this module.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_hello(
    const struct vmibridge_caller *caller, uint16_t method, vmibridge_word value1,
    vmibridge_word value2, vmibridge_word value3, vmibridge_word value4,
    struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_HELLO_REQUEST, method, 4, false);
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
