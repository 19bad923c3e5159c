/*
 * Calls by the driver `vmibridge` of Linux (guest/linux/vmibridge_device), for C11 and C++ with a C
 * library: each open file has a slot of its own, and what it has named as its own memory the host can
 * read and write by its addresses.
 *
 *   struct vmibridge_driver way;
 *   int error = vmibridge_driver_open(&way, NULL);             0, or an errno
 *   error = vmibridge_driver_share(&way, buffer, sizeof buffer);
 *   struct vmibridge_caller caller = vmibridge_by_slot(&way.slot);
 *   ...
 *   vmibridge_driver_close(&way);
 *
 * One thread at a time may use it, and no child of fork(). Nothing shared: buffers are copied through
 * the slot.
 */
#ifndef VMIBRIDGE_DRIVER_H
#define VMIBRIDGE_DRIVER_H

#ifdef __KERNEL__
#include <linux/ioctl.h>
#include <linux/types.h>
#else
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "vmibridge_device.h"
#endif

/* --- what the driver offers ------------------------------------------------------------------ */

/*
 * open      takes a slot: EBUSY if none is free
 * mmap      8192 bytes from 0, shared: its doorbell, and the slot
 * write     rings; the bytes are of no meaning. For a device whose doorbell is not in the mapping
 * poll      readable: the slot is not at a call
 * ioctl     below
 * close     gives up what is open, and frees the slot when the host has let go of it
 */
struct vmibridge_driver_about {
    uint32_t slot;    /* its number */
    uint32_t kind;    /* VMIBRIDGE_DEVICE_VFIO_USER or VMIBRIDGE_DEVICE_IVSHMEM */
    uint32_t version; /* of this interface: 1 */
    uint32_t unused;
};

/* Memory of the process that asks. Its pages stay where they are until the file is closed. */
struct vmibridge_driver_memory {
    uint64_t address, size;
};

#define VMIBRIDGE_DRIVER_ABOUT _IOR('V', 0x40, struct vmibridge_driver_about)
#define VMIBRIDGE_DRIVER_SHARE _IOW('V', 0x41, struct vmibridge_driver_memory)

#ifndef __KERNEL__

/* --- for programs ---------------------------------------------------------------------------- */

#define VMIBRIDGE_DRIVER_PATH "/dev/vmibridge0"

/* A slot by the driver. */
struct vmibridge_driver {
    struct vmibridge_slot slot;
    struct vmibridge_driver_about about;
    int file;
    uint32_t milliseconds; /* after which a call is given up; 0: never. 60,000 at first */
    struct timespec since; /* of the call that is waited for */
    void *pages;
};

/* `wait` of such a slot: until the interrupt. */
static inline bool vmibridge_driver_wait(struct vmibridge_slot *slot, uint32_t times)
{
    struct vmibridge_driver *way = (struct vmibridge_driver *)slot->state;
    struct pollfd file = {0, POLLIN, 0};
    struct timespec now;
    long passed;

    clock_gettime(CLOCK_MONOTONIC, &now);
    if (!times) {
        way->since = now;
    }
    passed = (long)(now.tv_sec - way->since.tv_sec) * 1000 +
             (now.tv_nsec - way->since.tv_nsec) / 1000000;
    if (way->milliseconds && passed >= (long)way->milliseconds) {
        return false;
    }
    /* At the latest in a second, to see whether there is a host at all. */
    file.fd = way->file;
    (void)poll(&file, 1, 1000);
    return !(file.revents & (POLLHUP | POLLERR));
}

/* `sleep` of such a slot, while the host tells to wait. */
static inline void vmibridge_driver_sleep(struct vmibridge_slot *slot)
{
    const struct timespec pause = {0, 10000000};

    (void)slot;
    nanosleep(&pause, 0);
}

/* `ring_by` of such a slot whose doorbell is not in its pages. */
static inline void vmibridge_driver_ring(struct vmibridge_slot *slot)
{
    const struct vmibridge_driver *way = (const struct vmibridge_driver *)slot->state;

    if (write(way->file, "", 1) < 0) {
        /* The device is gone, which shows as a call without an answer. */
        errno = 0;
    }
}

static inline void vmibridge_driver_close(struct vmibridge_driver *way)
{
    if (way->pages) {
        munmap(way->pages, 2 * VMIBRIDGE_DEVICE_PAGE);
    }
    if (way->file >= 0) {
        close(way->file);
    }
    way->pages = 0;
    way->file = -1;
}

/* Take a slot. `path` NULL: VMIBRIDGE_DRIVER_PATH. Returns 0 or an errno: EBUSY if none is free. */
static inline int vmibridge_driver_open(struct vmibridge_driver *way, const char *path)
{
    int error;

    memset(way, 0, sizeof *way);
    way->milliseconds = 60000;
    way->file = open(path ? path : VMIBRIDGE_DRIVER_PATH, O_RDWR | O_CLOEXEC);
    if (way->file < 0) {
        return errno;
    }
    if (!ioctl(way->file, VMIBRIDGE_DRIVER_ABOUT, &way->about)) {
        way->pages = mmap(0, 2 * VMIBRIDGE_DEVICE_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED,
                          way->file, 0);
        if (way->pages != MAP_FAILED) {
            vmibridge_slot_open_pages(&way->slot, way->pages,
                                      (char *)way->pages + VMIBRIDGE_DEVICE_PAGE);
            if (way->about.kind == VMIBRIDGE_DEVICE_IVSHMEM) {
                way->slot.is_ivshmem = true;
                way->slot.ring_by = vmibridge_driver_ring;
            }
            way->slot.flags = VMIBRIDGE_SLOT_INTERRUPT;
            way->slot.space = VMIBRIDGE_SPACE_SLOT;
            way->slot.wait = vmibridge_driver_wait;
            way->slot.sleep = vmibridge_driver_sleep;
            way->slot.state = way;
            return 0;
        }
        way->pages = 0;
    }
    error = errno;
    vmibridge_driver_close(way);
    return error;
}

/*
 * Let the host reach this memory by its addresses, and keep its pages in place. From then on the
 * addresses of all calls of this slot are the program's own, and offsets in the slot are none. Returns
 * 0 or an errno: ENOMEM beyond RLIMIT_MEMLOCK.
 */
static inline int vmibridge_driver_share(struct vmibridge_driver *way, const void *memory,
                                         size_t size)
{
    struct vmibridge_driver_memory given;

    given.address = (uintptr_t)memory;
    given.size = size;
    if (ioctl(way->file, VMIBRIDGE_DRIVER_SHARE, &given)) {
        return errno;
    }
    way->slot.space = VMIBRIDGE_SPACE_PHYSICAL;
    return 0;
}

#endif

#endif
