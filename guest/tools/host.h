/* The host: whether it is there, how it is called, and what its answers mean. */
#ifndef VMIB_HOST_H
#define VMIB_HOST_H

#include "platform.h"
#include "vmibridge_device.h"

/* The exit statuses of vmib; docs/linux-guest.md has them. */
enum exit_status {
    EXIT_DONE = 0,
    EXIT_FAILED = 1,    /* the host's status says so */
    EXIT_USAGE = 2,
    EXIT_NO_HOST = 3,   /* nobody answered */
    EXIT_NO_ANSWER = 4, /* there is a host, and it did not answer this request */
    EXIT_WAITING = 5,   /* it told to wait until the end of --timeout */
    EXIT_LOCAL = 6      /* something in the guest failed, as a file that cannot be read */
};

/* How the host is called: by an instruction, or by a slot of the PCI device. */
enum way {
    BY_ANY, /* CPUID, or else the device: as host_begin finds */
    BY_CPUID = VMIBRIDGE_CPUID,
    BY_VMCALL = VMIBRIDGE_VMCALL,
    BY_VMMCALL = VMIBRIDGE_VMMCALL,
    BY_DRIVER,
    BY_SYSFS
};

/* What the host and the command line say. */
struct host {
    enum way way;
    bool is_there;            /* it answered the handshake, with a version of ours */
    uint32_t version;         /* 0: it did not answer */
    uint32_t features;
    uint32_t timeout;         /* milliseconds that one request may be told to wait; 0: any */
    const char *doing;        /* for messages: the command, and what it is at */
};

extern struct host host;

/* Print "vmib: DOING: ..." and end with this status. */
_Noreturn void fail(enum exit_status status, const char *form, ...);

/* Ask whether it is there. Ends the program if an instruction is undefined, or no slot can be had. */
void host_begin(void);

/* The caller of the next request, which has all of the timeout before it. */
const struct vmibridge_caller *by(void);

/* End the program, since there is no answer at all to this request. */
_Noreturn void host_did_not_answer(void);

/* Go on if this is success, else end the program with what it means. */
void expect(vmibridge_status status);

/* The error number of a status that says that something failed; 0: another status. */
uint32_t error_of(vmibridge_status status);

/* The name of a way, as --by takes it. NULL: it has none. */
const char *way_name(enum way way);

/* Memory that the host reads and writes in calls of untyped methods: some bytes at `words`, and the others
   at `buffer`. By the device it is in the slot, and the sizes are smaller. */
struct shared {
    unsigned char *words, *buffer;
    size_t words_size, buffer_size;
};

/* Have `words_size` bytes for words in it, of what the slot has. */
struct shared host_memory(size_t words_size);

/* Where this is for the host. */
vmibridge_word host_address(const void *at);

#endif
