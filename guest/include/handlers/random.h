/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"

#ifndef VMIBRIDGE_RANDOM_H
#define VMIBRIDGE_RANDOM_H

/*
 * random: request 0x0115.
 *
 * Fills buffers with random bytes; how many is its output.
 */
#define VMIBRIDGE_RANDOM_REQUEST 0x0115u
#define VMIBRIDGE_RANDOM_METHOD_FILL 0x0001u
#define VMIBRIDGE_RANDOM_FILL_INTO_LIMIT 1048576u

/*
 * Fill a buffer with random bytes; gives how many.
 *
 * into: room to fill, of into_capacity bytes, at most 1048576.
 * result: a number, 32 bits.
 */
static inline vmibridge_status vmibridge_random_fill(
    const struct vmibridge_caller *caller, void *into, size_t into_capacity, uint32_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_RANDOM_REQUEST, VMIBRIDGE_RANDOM_METHOD_FILL, 2, true);
    call.kinds = VMIBRIDGE_WORD_ROOM;
    call.block[1] = VMIBRIDGE_ADDRESS(into);
    call.block[2] = into_capacity;
    call.limits[0] = VMIBRIDGE_RANDOM_FILL_INTO_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = (uint32_t)call.block[0];
    }
    return status;
}

#endif
