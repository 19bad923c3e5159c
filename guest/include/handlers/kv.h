/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"

#ifndef VMIBRIDGE_KV_H
#define VMIBRIDGE_KV_H

/*
 * kv: request 0x0112.
 *
 * Keeps values by name. Raises `MissingExtraError` without APSW.
 */
#define VMIBRIDGE_KV_REQUEST 0x0112u
#define VMIBRIDGE_KV_METHOD_GET 0x0001u
#define VMIBRIDGE_KV_METHOD_PUT 0x0002u
#define VMIBRIDGE_KV_METHOD_DELETE 0x0003u
#define VMIBRIDGE_KV_METHOD_NEXT 0x0004u
#define VMIBRIDGE_KV_METHOD_VERSION 0x0005u
#define VMIBRIDGE_KV_METHOD_PUT_IF 0x0006u
#define VMIBRIDGE_KV_GET_NAME_LIMIT 256u
#define VMIBRIDGE_KV_GET_INTO_LIMIT 1048576u
#define VMIBRIDGE_KV_PUT_NAME_LIMIT 256u
#define VMIBRIDGE_KV_PUT_VALUE_LIMIT 1048576u
#define VMIBRIDGE_KV_DELETE_NAME_LIMIT 256u
#define VMIBRIDGE_KV_NEXT_NAME_LIMIT 256u
#define VMIBRIDGE_KV_NEXT_INTO_LIMIT 1048576u
#define VMIBRIDGE_KV_VERSION_NAME_LIMIT 256u
#define VMIBRIDGE_KV_PUT_IF_NAME_LIMIT 256u
#define VMIBRIDGE_KV_PUT_IF_VALUE_LIMIT 1048576u

/*
 * Fill a buffer with a value; gives the length of the value in bytes.
 *
 * name: UTF-8, at most 256 bytes, then a NUL.
 * into: room to fill, of into_capacity bytes, at most 1048576.
 * result: a number, 32 bits.
 */
static inline vmibridge_status vmibridge_kv_get(
    const struct vmibridge_caller *caller, const char *name, void *into, size_t into_capacity,
    uint32_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_KV_REQUEST, VMIBRIDGE_KV_METHOD_GET, 3, true);
    call.kinds = VMIBRIDGE_WORD_TEXT | VMIBRIDGE_WORD_ROOM << 4;
    call.block[1] = VMIBRIDGE_ADDRESS(name);
    call.limits[0] = VMIBRIDGE_KV_GET_NAME_LIMIT;
    call.block[2] = VMIBRIDGE_ADDRESS(into);
    call.block[3] = into_capacity;
    call.limits[1] = VMIBRIDGE_KV_GET_INTO_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = (uint32_t)call.block[0];
    }
    return status;
}

/*
 * Keep a value; gives its version.
 *
 * name: UTF-8, at most 256 bytes, then a NUL.
 * value: value_size bytes of it, at most 1048576.
 * result: a number, 64 bits.
 */
static inline vmibridge_status vmibridge_kv_put(
    const struct vmibridge_caller *caller, const char *name, const void *value, size_t value_size,
    uint64_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_KV_REQUEST, VMIBRIDGE_KV_METHOD_PUT, 3, true);
    call.kinds = VMIBRIDGE_WORD_TEXT | VMIBRIDGE_WORD_BYTES << 4;
    call.is_wide = true;
    call.block[1] = VMIBRIDGE_ADDRESS(name);
    call.limits[0] = VMIBRIDGE_KV_PUT_NAME_LIMIT;
    call.block[2] = VMIBRIDGE_ADDRESS(value);
    call.block[3] = value_size;
    call.limits[1] = VMIBRIDGE_KV_PUT_VALUE_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = call.block[0];
    }
    return status;
}

/*
 * Take an entry away; gives whether there was one.
 *
 * name: UTF-8, at most 256 bytes, then a NUL.
 * result: true or false.
 */
static inline vmibridge_status vmibridge_kv_delete(
    const struct vmibridge_caller *caller, const char *name, bool *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_KV_REQUEST, VMIBRIDGE_KV_METHOD_DELETE, 1, true);
    call.kinds = VMIBRIDGE_WORD_TEXT;
    call.block[1] = VMIBRIDGE_ADDRESS(name);
    call.limits[0] = VMIBRIDGE_KV_DELETE_NAME_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = (call.block[0] & 1) != 0;
    }
    return status;
}

/*
 * Fill a buffer with the name that follows; gives its length in bytes, 0 at the end.
 *
 * name: UTF-8, at most 256 bytes, then a NUL.
 * into: room to fill, of into_capacity bytes, at most 1048576.
 * result: a number, 32 bits.
 */
static inline vmibridge_status vmibridge_kv_next(
    const struct vmibridge_caller *caller, const char *name, void *into, size_t into_capacity,
    uint32_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_KV_REQUEST, VMIBRIDGE_KV_METHOD_NEXT, 3, true);
    call.kinds = VMIBRIDGE_WORD_TEXT | VMIBRIDGE_WORD_ROOM << 4;
    call.block[1] = VMIBRIDGE_ADDRESS(name);
    call.limits[0] = VMIBRIDGE_KV_NEXT_NAME_LIMIT;
    call.block[2] = VMIBRIDGE_ADDRESS(into);
    call.block[3] = into_capacity;
    call.limits[1] = VMIBRIDGE_KV_NEXT_INTO_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = (uint32_t)call.block[0];
    }
    return status;
}

/*
 * The version of an entry; 0 where there is none.
 *
 * name: UTF-8, at most 256 bytes, then a NUL.
 * result: a number, 64 bits.
 */
static inline vmibridge_status vmibridge_kv_version(
    const struct vmibridge_caller *caller, const char *name, uint64_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_KV_REQUEST, VMIBRIDGE_KV_METHOD_VERSION, 1, true);
    call.kinds = VMIBRIDGE_WORD_TEXT;
    call.is_wide = true;
    call.block[1] = VMIBRIDGE_ADDRESS(name);
    call.limits[0] = VMIBRIDGE_KV_VERSION_NAME_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = call.block[0];
    }
    return status;
}

/*
 * Keep a value where the entry still has this version; gives its new one.
 *
 * name: UTF-8, at most 256 bytes, then a NUL.
 * version: a number, 64 bits.
 * value: value_size bytes of it, at most 1048576.
 * result: a number, 64 bits.
 */
static inline vmibridge_status vmibridge_kv_put_if(
    const struct vmibridge_caller *caller, const char *name, uint64_t version, const void *value,
    size_t value_size, uint64_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_KV_REQUEST, VMIBRIDGE_KV_METHOD_PUT_IF, 4, true);
    call.kinds = VMIBRIDGE_WORD_TEXT | VMIBRIDGE_WORD_BYTES << 8;
    call.is_wide = true;
    call.block[1] = VMIBRIDGE_ADDRESS(name);
    call.limits[0] = VMIBRIDGE_KV_PUT_IF_NAME_LIMIT;
    call.block[2] = version;
    call.block[3] = VMIBRIDGE_ADDRESS(value);
    call.block[4] = value_size;
    call.limits[2] = VMIBRIDGE_KV_PUT_IF_VALUE_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = call.block[0];
    }
    return status;
}

#endif
