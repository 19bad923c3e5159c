/*
 * Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
 *
 * A function returns 0, or why there is no result: see vmibridge_status in vmibridge.h. Where a
 * result is written to may be NULL; it is 0 where there is none.
 */
#include "vmibridge.h"

#ifndef VMIBRIDGE_EXEC_GATE_H
#define VMIBRIDGE_EXEC_GATE_H

/*
 * exec_gate: request 0x0113.
 *
 * Asks a service or a person. Raises `MissingExtraError` for a webhook without httpcore.
 *
 * Let the host decide whether the guest may go on with what it is about to run.
 *
 *     [handlers.exec_gate]
 *     folder = "questions"     # or webhook = "https://policy.example/ask"
 *     default = "abort"        # where nobody answers
 *
 * | 0x0001 ASK | in | out |
 * |---|---|---|
 * | value1 | address of the command: UTF-8, at most 4096 bytes, then a NUL | a code of the gate |
 * | value2 | | why: 0 decided, 1 nobody answered, 2 too many questions, 3 no command |
 *
 * A code is `Gate.CONTINUE` (0) or `Gate.ABORT` (0xffffffff). While the host is asked, the guest gets
 * `Gate.WAIT` (1), and sends its request again. What is wrong with a request is an ABORT. A guest
 * looks at the stamps before anything else: without them there was no host.
 *
 * Invariants:
 *
 * - Nobody answers in time, or in a form that is known: the default.
 * - The questions under way are bounded: a guest floods neither a service nor a person.
 * - Who is asked is asked by `vmi.outside`: a replay gives the recorded answer.
 */
#define VMIBRIDGE_EXEC_GATE_REQUEST 0x0113u
#define VMIBRIDGE_EXEC_GATE_METHOD_ASK 0x0001u

/*
 * Ask whether a command may run.
 *
 * It takes and gives four values. 0: it has answered by `response`.
 */
static inline vmibridge_status vmibridge_exec_gate_ask(
    const struct vmibridge_caller *caller, vmibridge_word value1, vmibridge_word value2,
    vmibridge_word value3, vmibridge_word value4, struct vmibridge_response *response)
{
    struct vmibridge_method_call call;
    vmibridge_status status;

    vmibridge_begin_call(&call, VMIBRIDGE_EXEC_GATE_REQUEST, VMIBRIDGE_EXEC_GATE_METHOD_ASK, 4, false);
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
