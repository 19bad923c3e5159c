/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"

#ifndef VMIBRIDGE_DEPLOY_H
#define VMIBRIDGE_DEPLOY_H

/*
 * deploy: request 0x0011.
 *
 * Opens the gates of its settings. Its output is the status of a guest that is done.
 *
 * A class that derives from it may open them otherwise: by `may_download` and `may_execute`.
 *
 * Say when a guest of vmi-rs may download and execute what it brings: its deploy, bit for bit.
 *
 *     [handlers.deploy]
 *     download = "continue"
 *     execute = "continue"
 *     execute_after = "/run/lab/snapshot-taken"
 *
 * | method | value1 | value2 | value1 of the answer |
 * |---|---|---|---|
 * | 0x0001 DOWNLOAD | attempt | HRESULT of the attempt before | a gate |
 * | 0x0002 EXECUTE | | | a gate |
 * | 0xffff EXIT | encoded status | native code | left alone |
 *
 * A gate is CONTINUE, WAIT or ABORT; on WAIT the guest sleeps and asks again, without end. Attempt 0
 * asks whether the host is ready, and is sent also where there is nothing to download. An attempt
 * above 0 comes after a download that failed.
 *
 * The handler keeps nothing of a guest: while a guest asks again and again, one host may take over
 * from another, and goes on where that one was.
 */
#define VMIBRIDGE_DEPLOY_REQUEST 0x0011u
#define VMIBRIDGE_DEPLOY_METHOD_DOWNLOAD 0x0001u
#define VMIBRIDGE_DEPLOY_METHOD_EXECUTE 0x0002u
#define VMIBRIDGE_DEPLOY_METHOD_EXIT 0xffffu

/*
 * Whether the guest may download.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_deploy_download(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_DEPLOY_REQUEST, VMIBRIDGE_DEPLOY_METHOD_DOWNLOAD, 4, false);
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
 * Whether the guest may execute.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_deploy_execute(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_DEPLOY_REQUEST, VMIBRIDGE_DEPLOY_METHOD_EXECUTE, 4, false);
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
static inline vmibridge_status vmibridge_deploy_exit(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_DEPLOY_REQUEST, VMIBRIDGE_DEPLOY_METHOD_EXIT, 4, false);
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
