/*
 * device sysfs|driver|shared COUNT [UID]: calls the handler `exchange` by the device and checks every
 * answer, as the user UID if it is given: through sysfs; by the driver, with buffers in the slot; by
 * the driver, with a buffer of its own that the host reaches by its address.
 *
 * Ends with 0 when all was right, 2 when there is no device or no host, and else with 1.
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>

#include "vmibridge_driver.h"
#include "vmibridge_sysfs.h"

static void sleep_a_little(void *unused)
{
    (void)unused;
    usleep(20000);
}

#include "exchange.h"

static struct vmibridge_sysfs sysfs;
static struct vmibridge_driver driver;
static unsigned char bytes[2 * EXCHANGE_SIZE];

/* The slot, its number and the buffer; 0, or an errno. */
static int begin(const char *how, struct vmibridge_slot **slot, uint32_t *index,
                 struct exchange_buffer *buffer)
{
    int error;

    if (!strcmp(how, "sysfs")) {
        error = vmibridge_sysfs_open(&sysfs);
        *slot = &sysfs.slot;
        *index = sysfs.index;
    } else {
        error = vmibridge_driver_open(&driver, NULL);
        *slot = &driver.slot;
        *index = driver.about.slot;
    }
    if (error) {
        return error;
    }
    if (!strcmp(how, "shared")) {
        buffer->bytes = bytes;
        buffer->address = VMIBRIDGE_ADDRESS(bytes);
        buffer->size = EXCHANGE_SIZE;
        return vmibridge_driver_share(&driver, bytes, sizeof bytes);
    }
    buffer->bytes = (unsigned char *)(uintptr_t)(*slot)->page->payload;
    buffer->address = 64;
    buffer->size = 2016;
    return 0;
}

int main(int count, char **arguments)
{
    struct vmibridge_caller caller;
    struct vmibridge_slot *slot;
    struct exchange_buffer buffer;
    const char *wrong = NULL;
    char line[200];
    uint32_t index = 0;
    unsigned calls;
    bool nobody = false;
    int error, length;

    if (count < 3) {
        puts("device sysfs|driver|shared COUNT [UID]");
        return 1;
    }
    calls = (unsigned)atoi(arguments[2]);
    if (count > 3 && (setgid((gid_t)atoi(arguments[3])) || setuid((uid_t)atoi(arguments[3])))) {
        perror("vmibridge: device");
        return 1;
    }
    error = begin(arguments[1], &slot, &index, &buffer);
    if (error) {
        wrong = strerror(error);
        nobody = error == ENODEV || error == ENOENT || error == EPROTO;
    } else {
        caller = vmibridge_by_slot(slot);
        wrong = exchange(&caller, calls, &buffer, &nobody);
    }
    /* In one piece: programs that run at a time do not mix theirs. */
    length = snprintf(line, sizeof line, "vmibridge: device %s uid %d slot %u: %s%s, %u calls\n",
                      arguments[1], (int)getuid(), index, wrong ? "WRONG: " : "right",
                      wrong ? wrong : "", calls);
    if (!strcmp(arguments[1], "sysfs")) {
        vmibridge_sysfs_close(&sysfs);
    } else {
        vmibridge_driver_close(&driver);
    }
    if (write(1, line, (size_t)length) != length || wrong) {
        return nobody ? 2 : 1;
    }
    return 0;
}
