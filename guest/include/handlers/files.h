/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"

#ifndef VMIBRIDGE_FILES_H
#define VMIBRIDGE_FILES_H

/*
 * files: request 0x0110.
 *
 * Files between guests and one folder. Its output is what a method gives, or nothing.
 */
#define VMIBRIDGE_FILES_REQUEST 0x0110u
#define VMIBRIDGE_FILES_METHOD_BEGIN 0x0001u
#define VMIBRIDGE_FILES_METHOD_PUT 0x0002u
#define VMIBRIDGE_FILES_METHOD_GET 0x0003u
#define VMIBRIDGE_FILES_METHOD_END 0x0004u
#define VMIBRIDGE_FILES_METHOD_ABORT 0x0005u
#define VMIBRIDGE_FILES_METHOD_STAT 0x0006u
#define VMIBRIDGE_FILES_METHOD_LIST 0x0007u
#define VMIBRIDGE_FILES_METHOD_LENGTH 0x0008u
#define VMIBRIDGE_FILES_METHOD_BEGIN_UTF16 0x0011u
#define VMIBRIDGE_FILES_METHOD_STAT_UTF16 0x0016u
#define VMIBRIDGE_FILES_METHOD_LIST_UTF16 0x0017u
#define VMIBRIDGE_FILES_BEGIN_NAME_LIMIT 4096u
#define VMIBRIDGE_FILES_PUT_DATA_LIMIT 1048576u
#define VMIBRIDGE_FILES_GET_INTO_LIMIT 1048576u
#define VMIBRIDGE_FILES_END_SHA256_LIMIT 32u
#define VMIBRIDGE_FILES_STAT_NAME_LIMIT 4096u
#define VMIBRIDGE_FILES_STAT_INTO_LIMIT 1048576u
#define VMIBRIDGE_FILES_LIST_FOLDER_LIMIT 4096u
#define VMIBRIDGE_FILES_LIST_AFTER_LIMIT 4096u
#define VMIBRIDGE_FILES_LIST_INTO_LIMIT 1048576u
#define VMIBRIDGE_FILES_BEGIN_UTF16_NAME_LIMIT 4096u
#define VMIBRIDGE_FILES_STAT_UTF16_NAME_LIMIT 4096u
#define VMIBRIDGE_FILES_STAT_UTF16_INTO_LIMIT 1048576u
#define VMIBRIDGE_FILES_LIST_UTF16_FOLDER_LIMIT 4096u
#define VMIBRIDGE_FILES_LIST_UTF16_AFTER_LIMIT 4096u
#define VMIBRIDGE_FILES_LIST_UTF16_INTO_LIMIT 1048576u

/*
 * What a BEGIN is for: one of the first three, and HASH or not.
 */
typedef uint32_t vmibridge_files_mode;
#define VMIBRIDGE_FILES_MODE_READ 0x1u
#define VMIBRIDGE_FILES_MODE_CREATE 0x2u
#define VMIBRIDGE_FILES_MODE_REPLACE 0x4u
#define VMIBRIDGE_FILES_MODE_HASH 0x8u

/*
 * Begin to put or get a file; gives its handle.
 *
 * name: UTF-8, at most 4096 bytes, then a NUL.
 * size: a number, 64 bits.
 * mode: of Mode, 32 bits.
 * result: a number, 32 bits.
 */
static inline vmibridge_status vmibridge_files_begin(
    const struct vmibridge_caller *caller, const char *name, uint64_t size,
    vmibridge_files_mode mode, uint32_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILES_REQUEST, VMIBRIDGE_FILES_METHOD_BEGIN, 3, true);
    call.kinds = VMIBRIDGE_WORD_TEXT;
    call.is_wide = true;
    call.block[1] = VMIBRIDGE_ADDRESS(name);
    call.limits[0] = VMIBRIDGE_FILES_BEGIN_NAME_LIMIT;
    call.block[2] = size;
    call.block[3] = mode;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = (uint32_t)call.block[0];
    }
    return status;
}

/*
 * Write bytes at an offset; gives how many.
 *
 * handle: a number, 32 bits.
 * offset: a number, 64 bits.
 * data: data_size bytes of it, at most 1048576.
 * result: a number, 32 bits.
 */
static inline vmibridge_status vmibridge_files_put(
    const struct vmibridge_caller *caller, uint32_t handle, uint64_t offset, const void *data,
    size_t data_size, uint32_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILES_REQUEST, VMIBRIDGE_FILES_METHOD_PUT, 4, true);
    call.kinds = VMIBRIDGE_WORD_BYTES << 8;
    call.is_wide = true;
    call.block[1] = handle;
    call.block[2] = offset;
    call.block[3] = VMIBRIDGE_ADDRESS(data);
    call.block[4] = data_size;
    call.limits[2] = VMIBRIDGE_FILES_PUT_DATA_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = (uint32_t)call.block[0];
    }
    return status;
}

/*
 * Read bytes at an offset; gives how many, 0 at the end.
 *
 * handle: a number, 32 bits.
 * offset: a number, 64 bits.
 * into: room to fill, of into_capacity bytes, at most 1048576.
 * result: a number, 32 bits.
 */
static inline vmibridge_status vmibridge_files_get(
    const struct vmibridge_caller *caller, uint32_t handle, uint64_t offset, void *into,
    size_t into_capacity, uint32_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILES_REQUEST, VMIBRIDGE_FILES_METHOD_GET, 4, true);
    call.kinds = VMIBRIDGE_WORD_ROOM << 8;
    call.is_wide = true;
    call.block[1] = handle;
    call.block[2] = offset;
    call.block[3] = VMIBRIDGE_ADDRESS(into);
    call.block[4] = into_capacity;
    call.limits[2] = VMIBRIDGE_FILES_GET_INTO_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = (uint32_t)call.block[0];
    }
    return status;
}

/*
 * Check a file, and give it its name if it was put.
 *
 * handle: a number, 32 bits.
 * sha256: sha256_size bytes of it, at most 32. Or none, at address 0.
 */
static inline vmibridge_status vmibridge_files_end(
    const struct vmibridge_caller *caller, uint32_t handle, const void *sha256, size_t sha256_size)
{
    struct vmibridge_method_call call;

    vmibridge_begin_call(&call, VMIBRIDGE_FILES_REQUEST, VMIBRIDGE_FILES_METHOD_END, 3, true);
    call.kinds = VMIBRIDGE_WORD_BYTES << 4;
    call.block[1] = handle;
    call.block[2] = VMIBRIDGE_ADDRESS(sha256);
    call.block[3] = sha256_size;
    call.limits[1] = VMIBRIDGE_FILES_END_SHA256_LIMIT;
    return vmibridge_call_method(caller, &call);
}

/*
 * End a transfer; nothing is left of a file that was put.
 *
 * handle: a number, 32 bits.
 */
static inline vmibridge_status vmibridge_files_abort(
    const struct vmibridge_caller *caller, uint32_t handle)
{
    struct vmibridge_method_call call;

    vmibridge_begin_call(&call, VMIBRIDGE_FILES_REQUEST, VMIBRIDGE_FILES_METHOD_ABORT, 1, true);
    call.block[1] = handle;
    return vmibridge_call_method(caller, &call);
}

/*
 * Look up a file or a folder; gives its size in bytes.
 *
 * name: UTF-8, at most 4096 bytes, then a NUL.
 * into: room to fill, of into_capacity bytes, at most 1048576. Or none, at address 0.
 * result: a number, 64 bits.
 */
static inline vmibridge_status vmibridge_files_stat(
    const struct vmibridge_caller *caller, const char *name, void *into, size_t into_capacity,
    uint64_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILES_REQUEST, VMIBRIDGE_FILES_METHOD_STAT, 3, true);
    call.kinds = VMIBRIDGE_WORD_TEXT | VMIBRIDGE_WORD_ROOM << 4;
    call.is_wide = true;
    call.block[1] = VMIBRIDGE_ADDRESS(name);
    call.limits[0] = VMIBRIDGE_FILES_STAT_NAME_LIMIT;
    call.block[2] = VMIBRIDGE_ADDRESS(into);
    call.block[3] = into_capacity;
    call.limits[1] = VMIBRIDGE_FILES_STAT_INTO_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = call.block[0];
    }
    return status;
}

/*
 * List a folder in the order of names; gives the bytes of the entries, 0 at the end.
 *
 * folder: UTF-8, at most 4096 bytes, then a NUL.
 * after: UTF-8, at most 4096 bytes, then a NUL. Or none, at address 0.
 * into: room to fill, of into_capacity bytes, at most 1048576.
 * result: a number, 32 bits.
 */
static inline vmibridge_status vmibridge_files_list(
    const struct vmibridge_caller *caller, const char *folder, const char *after, void *into,
    size_t into_capacity, uint32_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILES_REQUEST, VMIBRIDGE_FILES_METHOD_LIST, 4, true);
    call.kinds = VMIBRIDGE_WORD_TEXT | VMIBRIDGE_WORD_TEXT << 4 | VMIBRIDGE_WORD_ROOM << 8;
    call.block[1] = VMIBRIDGE_ADDRESS(folder);
    call.limits[0] = VMIBRIDGE_FILES_LIST_FOLDER_LIMIT;
    call.block[2] = VMIBRIDGE_ADDRESS(after);
    call.limits[1] = VMIBRIDGE_FILES_LIST_AFTER_LIMIT;
    call.block[3] = VMIBRIDGE_ADDRESS(into);
    call.block[4] = into_capacity;
    call.limits[2] = VMIBRIDGE_FILES_LIST_INTO_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = (uint32_t)call.block[0];
    }
    return status;
}

/*
 * Bytes of a file that are there from its beginning on: go on putting from here.
 *
 * handle: a number, 32 bits.
 * result: a number, 64 bits.
 */
static inline vmibridge_status vmibridge_files_length(
    const struct vmibridge_caller *caller, uint32_t handle, uint64_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILES_REQUEST, VMIBRIDGE_FILES_METHOD_LENGTH, 1, true);
    call.is_wide = true;
    call.block[1] = handle;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = call.block[0];
    }
    return status;
}

/*
 * The same with a name in UTF-16.
 *
 * name: UTF-16, at most 4096 bytes, then a NUL.
 * size: a number, 64 bits.
 * mode: of Mode, 32 bits.
 * result: a number, 32 bits.
 */
static inline vmibridge_status vmibridge_files_begin_utf16(
    const struct vmibridge_caller *caller, const vmibridge_char16 *name, uint64_t size,
    vmibridge_files_mode mode, uint32_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILES_REQUEST, VMIBRIDGE_FILES_METHOD_BEGIN_UTF16, 3, true);
    call.kinds = VMIBRIDGE_WORD_TEXT16;
    call.is_wide = true;
    call.block[1] = VMIBRIDGE_ADDRESS(name);
    call.limits[0] = VMIBRIDGE_FILES_BEGIN_UTF16_NAME_LIMIT;
    call.block[2] = size;
    call.block[3] = mode;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = (uint32_t)call.block[0];
    }
    return status;
}

/*
 * The same with a name in UTF-16.
 *
 * name: UTF-16, at most 4096 bytes, then a NUL.
 * into: room to fill, of into_capacity bytes, at most 1048576. Or none, at address 0.
 * result: a number, 64 bits.
 */
static inline vmibridge_status vmibridge_files_stat_utf16(
    const struct vmibridge_caller *caller, const vmibridge_char16 *name, void *into,
    size_t into_capacity, uint64_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILES_REQUEST, VMIBRIDGE_FILES_METHOD_STAT_UTF16, 3, true);
    call.kinds = VMIBRIDGE_WORD_TEXT16 | VMIBRIDGE_WORD_ROOM << 4;
    call.is_wide = true;
    call.block[1] = VMIBRIDGE_ADDRESS(name);
    call.limits[0] = VMIBRIDGE_FILES_STAT_UTF16_NAME_LIMIT;
    call.block[2] = VMIBRIDGE_ADDRESS(into);
    call.block[3] = into_capacity;
    call.limits[1] = VMIBRIDGE_FILES_STAT_UTF16_INTO_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = call.block[0];
    }
    return status;
}

/*
 * The same with names in UTF-16.
 *
 * folder: UTF-16, at most 4096 bytes, then a NUL.
 * after: UTF-16, at most 4096 bytes, then a NUL. Or none, at address 0.
 * into: room to fill, of into_capacity bytes, at most 1048576.
 * result: a number, 32 bits.
 */
static inline vmibridge_status vmibridge_files_list_utf16(
    const struct vmibridge_caller *caller, const vmibridge_char16 *folder,
    const vmibridge_char16 *after, void *into, size_t into_capacity, uint32_t *result)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_FILES_REQUEST, VMIBRIDGE_FILES_METHOD_LIST_UTF16, 4, true);
    call.kinds = VMIBRIDGE_WORD_TEXT16 | VMIBRIDGE_WORD_TEXT16 << 4 | VMIBRIDGE_WORD_ROOM << 8;
    call.block[1] = VMIBRIDGE_ADDRESS(folder);
    call.limits[0] = VMIBRIDGE_FILES_LIST_UTF16_FOLDER_LIMIT;
    call.block[2] = VMIBRIDGE_ADDRESS(after);
    call.limits[1] = VMIBRIDGE_FILES_LIST_UTF16_AFTER_LIMIT;
    call.block[3] = VMIBRIDGE_ADDRESS(into);
    call.block[4] = into_capacity;
    call.limits[2] = VMIBRIDGE_FILES_LIST_UTF16_INTO_LIMIT;
    status = vmibridge_call_method(caller, &call);
    if (result) {
        *result = (uint32_t)call.block[0];
    }
    return status;
}

#endif
