/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"

#ifndef VMIBRIDGE_FETCH_H
#define VMIBRIDGE_FETCH_H

/*
 * fetch: request 0x0023.
 *
 * Streams allowed URLs into the guest. The output of READ is the bytes written.
 *
 * Uses no proxy, sends no credentials, and trusts the certificates that the system
 * trusts (`SSL_CERT_FILE` adds others). Raises `MissingExtraError` without httpcore.
 *
 * Let the guest download what the host allows: GET over HTTP and HTTPS, in pieces.
 *
 *     [handlers.fetch]
 *     allow = ["https://example.com/tools", "http://192.168.0.2:8000"]
 *
 * | method | value1 in | value2 in | value3 in | value2 out |
 * |---|---|---|---|---|
 * | 0x0001 OPEN | address of a URL: at most 2048 bytes, then a NUL | | | handle, 1 to 4095 |
 * | 0x0002 READ | handle | address of a buffer | its capacity in bytes | bytes written, 0: the end |
 * | 0x0003 CLOSE | handle | | | 0 |
 * | 0x0004 LENGTH | handle | | | length of the content in bytes, 2**64-1: not known |
 *
 * value1 of the answer is the status. A capacity is at most 64 KiB; 0 stands for 4096. READ
 * waits for the next piece only, and may fill less than the buffer.
 *
 * | status | native | when |
 * |---|---|---|
 * | invalid parameters | | a URL or a buffer that is not accessible, a capacity over 64 KiB |
 * | | | a handle that is not open, or that another address space opened |
 * | failed | EACCES | the URL, a redirect or an address that it leads to is not allowed |
 * | failed | EMFILE | as many handles are open as may be |
 * | failed, code 1 | the HTTP status | the server answered other than 200 |
 * | failed | EIO | the network failed, or the body ended too early |
 * | failed | EFBIG | the content is longer than may be |
 * | failed | EBUSY | another vCPU reads from this handle right now |
 *
 * The native code is in the upper half of the status, which an x86 guest does not see.
 *
 * Invariants:
 *
 * - Only URLs on the list are asked for. Each redirect is held against it like the first URL.
 * - A host's addresses are looked up and checked here, all of them, and a connection goes to
 *   an address that was checked. So a name that changes its address gets nowhere.
 * - A READ that fails, or that its deadline cuts off, ends the transfer and frees its handle;
 *   with invalid parameters nothing is lost, and it can be repeated.
 * - A handle that was not used for a while is taken back when the next one is opened.
 *
 * Its methods take the packet, and not typed parameters, since guests rely on what is answered. A
 * typed method would have the number of the wrong parameter in the code of *invalid parameters*, and
 * would answer *touch* where a page is not present. READ has three words, which VMCALL of 32-bit code
 * would have to put into a block of memory, and a default for the third; and a handle that is not open
 * is *invalid parameters* here, which the body of a typed method cannot answer.
 */
#define VMIBRIDGE_FETCH_REQUEST 0x0023u
#define VMIBRIDGE_FETCH_METHOD_OPEN 0x0001u
#define VMIBRIDGE_FETCH_METHOD_READ 0x0002u
#define VMIBRIDGE_FETCH_METHOD_CLOSE 0x0003u
#define VMIBRIDGE_FETCH_METHOD_LENGTH 0x0004u

/*
 * Ask for a URL; answer when the headers are there.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_fetch_open(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FETCH_REQUEST, VMIBRIDGE_FETCH_METHOD_OPEN, 4, false);
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
 * Write the next piece of the content into a buffer of the guest.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_fetch_read(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FETCH_REQUEST, VMIBRIDGE_FETCH_METHOD_READ, 4, false);
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
 * End a transfer and free its handle.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_fetch_close(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FETCH_REQUEST, VMIBRIDGE_FETCH_METHOD_CLOSE, 4, false);
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
 * Tell the length of the content; an x86 guest gets the low 32 bits.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_fetch_length(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FETCH_REQUEST, VMIBRIDGE_FETCH_METHOD_LENGTH, 4, false);
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
