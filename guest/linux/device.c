/*
 * device COUNT [UID]: calls the handler `exchange` by the device, through sysfs, and checks every
 * answer; as the user UID, if it is given.
 *
 * Ends with 0 when all was right, 2 when there is no device or no host, and else with 1.
 */
#define _GNU_SOURCE
#include "vmibridge_sysfs.h"

static void sleep_a_little(void *unused)
{
    (void)unused;
    usleep(20000);
}

#include "exchange.h"

int main(int count, char **arguments)
{
    struct vmibridge_sysfs way;
    struct vmibridge_caller caller;
    struct exchange_buffer buffer = {NULL, 64, 2016};
    const unsigned calls = count > 1 ? (unsigned)atoi(arguments[1]) : 100;
    const char *wrong;
    char line[200];
    bool nobody = false;
    int error = 0, length;

    if (count > 2 && (setgid((gid_t)atoi(arguments[2])) || setuid((uid_t)atoi(arguments[2])))) {
        perror("vmibridge: device");
        return 1;
    }
    error = vmibridge_sysfs_open(&way);
    if (error) {
        printf("vmibridge: device uid %d: WRONG: %s\n", (int)getuid(), strerror(error));
        return error == ENODEV || error == EPROTO ? 2 : 1;
    }
    buffer.bytes = (unsigned char *)(uintptr_t)way.slot.page->payload;
    caller = vmibridge_by_slot(&way.slot);
    wrong = exchange(&caller, calls, &buffer, &nobody);
    /* In one piece: programs that run at a time do not mix theirs. */
    length = wrong ? snprintf(line, sizeof line, "vmibridge: device uid %d slot %u: WRONG: %s\n",
                              (int)getuid(), way.index, wrong)
                   : snprintf(line, sizeof line, "vmibridge: device uid %d slot %u: right, %u calls\n",
                              (int)getuid(), way.index, calls);
    vmibridge_sysfs_close(&way);
    if (write(1, line, (size_t)length) != length || wrong) {
        return nobody ? 2 : 1;
    }
    return 0;
}
