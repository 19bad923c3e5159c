/*
 * Calls by the device from a program of Linux, without a driver: its BARs are mapped through sysfs.
 * For C11 and C++ with a C library that shows what is of POSIX: -std=gnu11, or _GNU_SOURCE.
 *
 *   struct vmibridge_sysfs way;
 *   int error = vmibridge_sysfs_open(&way);          0, or an errno
 *   struct vmibridge_caller caller = vmibridge_by_slot(&way.slot);
 *   ...
 *   vmibridge_sysfs_close(&way);
 *
 * Root may do so, and whom `resource0` (of ivshmem `resource0` and `resource2`) was given to: see
 * 70-vmibridge.rules. Whoever has them sees the slots of all others.
 *
 * Each `way` has a slot of its own, by a lock on a byte of that file, which the kernel frees when the
 * program ends. One thread at a time may use it. Buffers are copied through the slot.
 */
#ifndef VMIBRIDGE_SYSFS_H
#define VMIBRIDGE_SYSFS_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "vmibridge_device.h"

#ifndef F_OFD_SETLK
#define F_OFD_SETLK 37 /* linux/fcntl.h; the C library has it with _GNU_SOURCE */
#endif

#define VMIBRIDGE_SYSFS_DEVICES "/sys/bus/pci/devices"

/* A slot of a device, and what it takes to have it. */
struct vmibridge_sysfs {
    struct vmibridge_slot slot;
    struct vmibridge_device device;
    uint32_t index;        /* of the slot */
    uint32_t milliseconds; /* after which a call is given up; 0: never. 60,000 at first */
    struct timespec since; /* of the call that is waited for */
    int lock;              /* the file of the device's memory */
    void *memory, *registers;
    size_t size;
};

/* `wait` of such a slot: sleep, longer and longer, up to a millisecond. */
static inline bool vmibridge_sysfs_wait(struct vmibridge_slot *slot, uint32_t times)
{
    struct vmibridge_sysfs *way = (struct vmibridge_sysfs *)slot->state;
    struct timespec now, pause;

    clock_gettime(CLOCK_MONOTONIC, &now);
    if (!times) {
        way->since = now;
    }
    if (way->milliseconds && (now.tv_sec - way->since.tv_sec) * 1000 +
                                     (now.tv_nsec - way->since.tv_nsec) / 1000000 >=
                                 (long)way->milliseconds) {
        return false;
    }
    pause.tv_sec = 0;
    pause.tv_nsec = times < 20 ? 50000 * (long)times : 1000000;
    nanosleep(&pause, 0);
    return true;
}

/* `sleep` of such a slot, while the host tells to wait. */
static inline void vmibridge_sysfs_sleep(struct vmibridge_slot *slot)
{
    const struct timespec pause = {0, 10000000};

    (void)slot;
    nanosleep(&pause, 0);
}

static inline int vmibridge_sysfs_file(const char *device, const char *name, int flags)
{
    char path[sizeof VMIBRIDGE_SYSFS_DEVICES + 80];

    if (snprintf(path, sizeof path, "%s/%s/%s", VMIBRIDGE_SYSFS_DEVICES, device, name) >=
        (int)sizeof path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    return open(path, flags | O_CLOEXEC);
}

/* A number in a file of a device; 0: it cannot be read. */
static inline uint32_t vmibridge_sysfs_number(const char *device, const char *name)
{
    char text[32];
    const int file = vmibridge_sysfs_file(device, name, O_RDONLY);
    const ssize_t size = file < 0 ? -1 : read(file, text, sizeof text - 1);

    if (file >= 0) {
        close(file);
    }
    if (size <= 0) {
        return 0;
    }
    text[size] = 0;
    return (uint32_t)strtoul(text, 0, 0);
}

/* Map all of a BAR. Returns its file and, in `*size`, its bytes; -1 with errno. */
static inline int vmibridge_sysfs_map(const char *device, const char *name, void **memory,
                                      size_t *size)
{
    struct stat about;
    const int file = vmibridge_sysfs_file(device, name, O_RDWR);
    int error;

    if (file < 0) {
        return -1;
    }
    *memory = MAP_FAILED;
    if (!fstat(file, &about) && about.st_size > 0) {
        *size = (size_t)about.st_size;
        *memory = mmap(0, *size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    }
    if (*memory == MAP_FAILED) {
        error = errno;
        close(file);
        errno = error;
        return -1;
    }
    return file;
}

/* Let go of the slot and of the device. A call that was given up is left to the host. */
static inline void vmibridge_sysfs_close(struct vmibridge_sysfs *way)
{
    if (way->registers) {
        munmap(way->registers, 4096);
    }
    if (way->memory) {
        munmap(way->memory, way->size);
    }
    if (way->lock >= 0) {
        close(way->lock);
    }
    way->registers = way->memory = 0;
    way->lock = -1;
}

/* Take the first free slot that is not the kernel's. Returns 0 or an errno. */
static inline int vmibridge_sysfs_take(struct vmibridge_sysfs *way)
{
    struct flock byte;

    for (way->index = way->device.header.kernel_slots; way->index < way->device.header.slots;
         way->index++) {
        memset(&byte, 0, sizeof byte);
        byte.l_type = F_WRLCK;
        byte.l_whence = SEEK_SET;
        byte.l_start = way->index;
        byte.l_len = 1;
        if (fcntl(way->lock, F_OFD_SETLK, &byte) == 0) {
            vmibridge_slot_open(&way->device, way->index, &way->slot);
            way->slot.space = VMIBRIDGE_SPACE_SLOT;
            way->slot.wait = vmibridge_sysfs_wait;
            way->slot.sleep = vmibridge_sysfs_sleep;
            way->slot.state = way;
            return 0;
        }
        if (errno != EAGAIN && errno != EACCES) {
            return errno;
        }
    }
    return EBUSY;
}

/* Take a slot of this device. Returns 0 or an errno. */
static inline int vmibridge_sysfs_open_device(struct vmibridge_sysfs *way, const char *device,
                                              uint32_t kind)
{
    const bool is_ivshmem = kind == VMIBRIDGE_DEVICE_IVSHMEM;
    size_t unused;
    int file, error;

    if (is_ivshmem) {
        file = vmibridge_sysfs_map(device, "resource0", &way->registers, &unused);
        if (file < 0) {
            way->registers = 0;
            return errno;
        }
        close(file);
    }
    way->lock = vmibridge_sysfs_map(device, is_ivshmem ? "resource2" : "resource0", &way->memory,
                                    &way->size);
    if (way->lock < 0) {
        way->memory = 0;
        return errno;
    }
    /* What reads as all ones is off: `enable` of the device, which root or the rule sets. */
    if (!vmibridge_device_open(&way->device, way->memory, way->registers)) {
        return way->device.header.magic == 0xffffffffu ? ENXIO : EPROTO;
    }
    error = (2 + 2 * (size_t)way->device.header.slots) * VMIBRIDGE_DEVICE_PAGE > way->size
                ? EPROTO
                : vmibridge_sysfs_take(way);
    return error;
}

/*
 * Take a slot of the first device that has one. Returns 0, or an errno:
 *
 *   ENODEV   no device        EACCES   no right to its files     ENXIO    it is not enabled
 *   EBUSY    no slot is free  EPROTO   no host, or another version of it
 */
static inline int vmibridge_sysfs_open(struct vmibridge_sysfs *way)
{
    int error = ENODEV, enable;
    uint32_t kind;
    const struct dirent *each;
    DIR *devices = opendir(VMIBRIDGE_SYSFS_DEVICES);

    memset(way, 0, sizeof *way);
    way->lock = -1;
    way->milliseconds = 60000;
    while (devices && error && (each = readdir(devices))) {
        kind = vmibridge_pci_kind(vmibridge_sysfs_number(each->d_name, "device") << 16 |
                                  vmibridge_sysfs_number(each->d_name, "vendor"));
        if (!kind) {
            continue;
        }
        if (!vmibridge_sysfs_number(each->d_name, "enable")) {
            enable = vmibridge_sysfs_file(each->d_name, "enable", O_WRONLY);
            if (enable >= 0) {
                /* If it does not work, reading says so. */
                if (write(enable, "1", 1) < 0) {
                    errno = 0;
                }
                close(enable);
            }
        }
        error = vmibridge_sysfs_open_device(way, each->d_name, kind);
        if (error) {
            vmibridge_sysfs_close(way);
        }
    }
    if (devices) {
        closedir(devices);
    }
    return error;
}

#endif
