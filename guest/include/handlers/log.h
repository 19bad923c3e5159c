/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"

#ifndef VMIBRIDGE_LOG_H
#define VMIBRIDGE_LOG_H

/*
 * log: request 0x0021.
 *
 * Writes the guest's text to the log; the escaped text is its output.
 *
 * Let the guest write to the host's log.
 *
 * | method | value1 in | value2 in | value1 out | value2 out |
 * |---|---|---|---|---|
 * | 0x0001 DEBUG | address of the text, UTF-8 | its length in bytes | status | bytes taken |
 * | 0x0002 INFO | as above | | | |
 * | 0x0003 WARNING | as above | | | |
 * | 0x0004 ERROR | as above | | | |
 *
 * The status is success, or invalid parameters for a text that is too long or not
 * readable. Text below the configured level is taken and dropped: the guest cannot tell.
 *
 * Lines go to the logger `vmibridge.guest`, with `vm` and `vcpu` as attributes of the
 * record too. What a guest writes is hostile: every character that is not printable, and
 * every byte that is not UTF-8, becomes a backslash escape, so that it can neither begin a
 * line of its own nor steer the terminal that shows it.
 */
#define VMIBRIDGE_LOG_REQUEST 0x0021u
#define VMIBRIDGE_LOG_METHOD_DEBUG 0x0001u
#define VMIBRIDGE_LOG_METHOD_INFO 0x0002u
#define VMIBRIDGE_LOG_METHOD_WARNING 0x0003u
#define VMIBRIDGE_LOG_METHOD_ERROR 0x0004u

/*
 * Log a text as debug.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_log_debug(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_LOG_REQUEST, VMIBRIDGE_LOG_METHOD_DEBUG, 4, false);
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

/*
 * Log a text as info.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_log_info(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_LOG_REQUEST, VMIBRIDGE_LOG_METHOD_INFO, 4, false);
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

/*
 * Log a text as a warning.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_log_warning(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_LOG_REQUEST, VMIBRIDGE_LOG_METHOD_WARNING, 4, false);
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

/*
 * Log a text as an error.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_log_error(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_LOG_REQUEST, VMIBRIDGE_LOG_METHOD_ERROR, 4, false);
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
