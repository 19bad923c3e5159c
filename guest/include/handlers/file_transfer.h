/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"

#ifndef VMIBRIDGE_FILE_TRANSFER_H
#define VMIBRIDGE_FILE_TRANSFER_H

/*
 * file_transfer: request 0x0012.
 *
 * Keeps the files that guests send. Its output is the name of a file that is there whole, and
 * the status of a guest that is done.
 *
 * Take files from guests of vmi-rs: its file transfer, bit for bit.
 *
 *     [handlers.file_transfer]
 *     folder = "/srv/samples"
 *
 * | method | value1 | value2 | value3 | value4 | value1 out |
 * |---|---|---|---|---|---|
 * | 0x0001 BEGIN | its own handle | size, signed | address of a name | its bytes | a transfer |
 * | 0x0002 SET_BUFFER | handle | address | | | a gate |
 * | 0x0003 CHUNK | handle | bytes in the buffer | | | a gate |
 * | 0x0004 CLOSE | handle | 0 for success | | | a gate |
 * | 0xffff EXIT | encoded status | native code | | | left alone |
 *
 * A transfer is a handle of 1 to 4095, or'ed with the size of a chunk in bytes, 65536, shifted left
 * by 12; 0 rejects. A gate is CONTINUE or ABORT: this guest knows no WAIT, and is never told to.
 *
 * Unlike upstream's host it leaves nothing behind of a file that was not closed with success and in
 * its declared size; a file that is there stays as it is, and the other one gets a number in its name;
 * and handles are used again.
 */
#define VMIBRIDGE_FILE_TRANSFER_REQUEST 0x0012u
#define VMIBRIDGE_FILE_TRANSFER_METHOD_BEGIN 0x0001u
#define VMIBRIDGE_FILE_TRANSFER_METHOD_SET_BUFFER 0x0002u
#define VMIBRIDGE_FILE_TRANSFER_METHOD_CHUNK 0x0003u
#define VMIBRIDGE_FILE_TRANSFER_METHOD_CLOSE 0x0004u
#define VMIBRIDGE_FILE_TRANSFER_METHOD_EXIT 0xffffu

/*
 * Begin a file; its size and its name are the guest's.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_file_transfer_begin(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILE_TRANSFER_REQUEST, VMIBRIDGE_FILE_TRANSFER_METHOD_BEGIN, 4, false);
    call.wait = 0xffffffffu;
    call.waiting = 0x1u;
    call.block[1] = value1;
    call.block[2] = value2;
    call.block[3] = value3;
    call.block[4] = value4;
    status = vmibridge_call_method(caller, &call);
    *response = call.response;
    return status;
}

/*
 * Where the guest puts each chunk.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_file_transfer_set_buffer(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILE_TRANSFER_REQUEST, VMIBRIDGE_FILE_TRANSFER_METHOD_SET_BUFFER, 4, false);
    call.wait = 0xffffffffu;
    call.waiting = 0x1u;
    call.block[1] = value1;
    call.block[2] = value2;
    call.block[3] = value3;
    call.block[4] = value4;
    status = vmibridge_call_method(caller, &call);
    *response = call.response;
    return status;
}

/*
 * Take the next bytes out of the guest's buffer; a failure ends the transfer.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_file_transfer_chunk(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILE_TRANSFER_REQUEST, VMIBRIDGE_FILE_TRANSFER_METHOD_CHUNK, 4, false);
    call.wait = 0xffffffffu;
    call.waiting = 0x1u;
    call.block[1] = value1;
    call.block[2] = value2;
    call.block[3] = value3;
    call.block[4] = value4;
    status = vmibridge_call_method(caller, &call);
    *response = call.response;
    return status;
}

/*
 * End a file: it counts if the guest says so, and if it has its size.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_file_transfer_close(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILE_TRANSFER_REQUEST, VMIBRIDGE_FILE_TRANSFER_METHOD_CLOSE, 4, false);
    call.wait = 0xffffffffu;
    call.waiting = 0x1u;
    call.block[1] = value1;
    call.block[2] = value2;
    call.block[3] = value3;
    call.block[4] = value4;
    status = vmibridge_call_method(caller, &call);
    *response = call.response;
    return status;
}

/*
 * The guest is done.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_file_transfer_exit(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILE_TRANSFER_REQUEST, VMIBRIDGE_FILE_TRANSFER_METHOD_EXIT, 4, false);
    call.wait = 0xffffffffu;
    call.waiting = 0x1u;
    call.block[1] = value1;
    call.block[2] = value2;
    call.block[3] = value3;
    call.block[4] = value4;
    status = vmibridge_call_method(caller, &call);
    *response = call.response;
    return status;
}

#endif
