/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"

#ifndef VMIBRIDGE_CLOCK_H
#define VMIBRIDGE_CLOCK_H

/*
 * clock: request 0x0114.
 *
 * Tells the time; the nanoseconds are its output.
 */
#define VMIBRIDGE_CLOCK_REQUEST 0x0114u
#define VMIBRIDGE_CLOCK_METHOD_REAL 0x0001u
#define VMIBRIDGE_CLOCK_METHOD_MONOTONIC 0x0002u

/*
 * The time of day, in nanoseconds since the Unix epoch.
 *
 * result: a number, 64 bits.
 */
static inline vmibridge_status vmibridge_clock_real(
    const struct vmibridge_caller *caller, uint64_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_CLOCK_REQUEST, VMIBRIDGE_CLOCK_METHOD_REAL, 0, true);
    call.is_wide = true;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = call.block[0];
    }
    return status;
}

/*
 * A time that never goes back, in nanoseconds.
 *
 * result: a number, 64 bits.
 */
static inline vmibridge_status vmibridge_clock_monotonic(
    const struct vmibridge_caller *caller, uint64_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_CLOCK_REQUEST, VMIBRIDGE_CLOCK_METHOD_MONOTONIC, 0, true);
    call.is_wide = true;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = call.block[0];
    }
    return status;
}

#endif
