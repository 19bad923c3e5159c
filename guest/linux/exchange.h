/*
 * Calls of the handler `exchange` (exchange.py), and a check of everything that comes back: the
 * same for programs and for the kernel module. The including file has `sleep_a_little`, which sleeps
 * for some milliseconds.
 */
#ifndef EXCHANGE_H
#define EXCHANGE_H

#include "vmibridge.h"

#define EXCHANGE_REQUEST 0x0200
#define EXCHANGE_INVERT 0x0001  /* value1: ours, inverted; value2: the sum of ours */
#define EXCHANGE_REVERSE 0x0002 /* reads value2 bytes at value1, writes them behind, last first */
#define EXCHANGE_JOB 0x0003     /* takes long: value1 inverted after some time, WAIT until then */

#define EXCHANGE_SIZE 6000 /* no whole number of pages */

/* Memory of both ends: half of it is for the host to read, and the other for it to write. */
struct exchange_buffer {
    unsigned char *bytes;   /* twice `size` */
    vmibridge_word address; /* where they are for the host */
    unsigned size;          /* 0: nothing is shared */
};

static void sleep_a_little(void *unused);

/* What is wrong with a buffer that the host reverses, or NULL. */
static const char *exchange_memory(const struct vmibridge_caller *caller,
                                   const struct exchange_buffer *buffer)
{
    struct vmibridge_packet packet = {
        VMIBRIDGE_MAGIC, EXCHANGE_REQUEST, EXCHANGE_REVERSE, buffer->address, buffer->size, 0, 0};
    unsigned char *ours = buffer->bytes, *theirs = buffer->bytes + buffer->size;
    struct vmibridge_response response;
    unsigned i;

    /* Both halves are written here: so their pages are there. */
    for (i = 0; i < buffer->size; i++) {
        ours[i] = (unsigned char)(7 * i + (unsigned)caller->how);
        theirs[i] = 0xee;
    }
    response = vmibridge_send(caller, &packet);
    if (!vmibridge_stamped(&response)) {
        return "the buffer has no stamps";
    }
    if (response.value1 != buffer->size) {
        return "the buffer was not taken";
    }
    for (i = 0; i < buffer->size; i++) {
        if (ours[i] != (unsigned char)(7 * i + (unsigned)caller->how)) {
            return "the buffer for the host was changed";
        }
        if (theirs[i] != ours[buffer->size - 1 - i]) {
            return "the buffer of the host is wrong";
        }
    }
    return NULL;
}

/* One check after the other, for one caller. Returns what is wrong, or NULL. `*nobody` says that
   there was no answer to begin with: no host, or a policy that denies us. */
static const char *exchange(const struct vmibridge_caller *caller, unsigned count,
                            const struct exchange_buffer *buffer, bool *nobody)
{
    const struct vmibridge_retry retry = {500, VMIBRIDGE_WAIT, 2, sleep_a_little, NULL};
    struct vmibridge_packet packet = {VMIBRIDGE_MAGIC, EXCHANGE_REQUEST, EXCHANGE_INVERT, 0, 0, 0, 0};
    struct vmibridge_response response;
    uint32_t version, features;
    const char *wrong;
    unsigned i;

    *nobody = !vmibridge_handshake_by(caller, &version, &features);
    if (*nobody) {
        return "nobody";
    }
    if (!vmibridge_self_test_by(caller)) {
        return "a register does not get through";
    }

    for (i = 0; i < count; i++) {
        packet.value1 = i;
        packet.value2 = 3 * (vmibridge_word)i + 1;
        response = vmibridge_send(caller, &packet);
        if (!vmibridge_stamped(&response)) {
            return "a call has no stamps";
        }
        if (response.value1 != ~(vmibridge_word)i || response.value2 != 4 * (vmibridge_word)i + 1) {
            return "a call has a wrong answer";
        }
    }

    wrong = buffer->size ? exchange_memory(caller, buffer) : NULL;
    if (wrong) {
        return wrong;
    }

    packet.method = EXCHANGE_JOB;
    packet.value1 = 0x70c0ffeeu + (unsigned)caller->how;
    packet.value2 = 0;
    switch (vmibridge_ask_by(caller, &packet, &retry, &response)) {
    case VMIBRIDGE_NOBODY:
        return "the job has no stamps";
    case VMIBRIDGE_WAITING:
        return "the job is not done";
    case VMIBRIDGE_ANSWERED:
        break;
    }
    return response.value1 == ~packet.value1 ? NULL : "the job has a wrong answer";
}

#endif
