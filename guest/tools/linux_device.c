/*
 * A slot of the PCI device on Linux: what vmibridge_driver.h and vmibridge_sysfs.h do with a C library, by
 * system calls. It is given back when the program ends, by the kernel.
 */
#include "linux_calls.h"
#include "numbers.h"
#include "text.h"
#include "vmibridge_device.h"

#define DRIVER "/dev/vmibridge0"
#define DEVICES "/sys/bus/pci/devices"

/* Of vmibridge_driver.h: _IOR('V', 0x40, struct vmibridge_driver_about). */
#define DRIVER_ABOUT 0x80105640ul
struct about { uint32_t slot, kind, version, unused; };

enum { NONE = 2, NO_UNIT = 6, AGAIN = 11, NOT_ALLOWED = 13, BUSY = 16, NO_DEVICE = 19, NO_PROTOCOL = 71 };
enum { LOCK_OF_FILE = 37, LOCK_TO_WRITE = 1 }; /* F_OFD_SETLK, F_WRLCK */

/* Both return 0 or an errno. */
static int mapped(platform_file file, size_t size, void **memory)
{
    const long result = map(size, MAP_RIGHTS, MAP_SHARED, file);

    *memory = (void *)result;
    return is_error(result) ? (int)-result : 0;
}

static int opened(const char *path, long flags, platform_file *file)
{
    *file = call3(SYS_OPEN, (long)path, flags | CLOSE_ON_EXEC, 0);
    return *file < 0 ? (int)-*file : 0;
}

/* --- the driver --------------------------------------------------------------------------- */

/* The doorbell of ivshmem is not in the mapping. */
static void ring(struct vmibridge_slot *slot)
{
    /* If it fails, the device is gone, which shows as a call without an answer. */
    call3(SYS_WRITE, (platform_file)slot->state, (long)"", 1);
}

static int by_driver(struct vmibridge_slot *slot)
{
    struct about about;
    platform_file file;
    void *pages;
    int error = opened(DRIVER, READ_WRITE, &file);

    if (!error) {
        error = (int)-call3(SYS_IOCTL, file, (long)DRIVER_ABOUT, (long)&about);
    }
    if (!error) {
        error = mapped(file, 2 * VMIBRIDGE_DEVICE_PAGE, &pages);
    }
    if (error) {
        return error;
    }
    vmibridge_slot_open_pages(slot, pages, (char *)pages + VMIBRIDGE_DEVICE_PAGE);
    if (about.kind == VMIBRIDGE_DEVICE_IVSHMEM) {
        slot->is_ivshmem = true;
        slot->ring_by = ring;
        slot->state = (void *)file;
    }
    return 0;
}

/* --- sysfs -------------------------------------------------------------------------------- */

/* The path of a file of a device, until the next call. */
static const char *path_of(const char *device, const char *name)
{
    static char path[sizeof DEVICES + 300];
    struct text text = text_in(path, sizeof path);

    text_add(&text, "%s/%s/%s", DEVICES, device, name);
    return path;
}

/* A number in a file of a device; 0: it cannot be read. */
static uint32_t number_of(const char *device, const char *name)
{
    char digits[24];
    uint64_t number = 0;
    platform_file file;
    long size;

    if (opened(path_of(device, name), READ_ONLY, &file)) {
        return 0;
    }
    size = call3(SYS_READ, file, (long)digits, sizeof digits);
    platform_close(file);
    if (size < 2) {
        return 0;
    }
    digits[size - 1] = 0; /* the end of the line */
    return text_number(digits, &number) ? (uint32_t)number : 0;
}

/* All of a BAR, its bytes, and its file. */
static int mapped_bar(const char *device, const char *name, void **memory, uint64_t *size,
                      platform_file *file)
{
    const char *path = path_of(device, name);
    char found[STAT_SIZE];
    int error = opened(path, READ_WRITE, file);

    if (!error) {
        /* To seek to its end says 0. */
        error = (int)-call3(SYS_STAT, (long)path, (long)found, 0);
    }
    if (error) {
        return error;
    }
    memcpy(size, found + STAT_LENGTH, sizeof *size);
    return mapped(*file, (size_t)*size, memory);
}

/* The first free slot that is not the kernel's: a lock on a byte of the file of the device's memory. */
static int take(const struct vmibridge_device *device, platform_file file, struct vmibridge_slot *slot)
{
    /* struct flock of 64 bits */
    struct { int16_t type, whence; int64_t start, length; int32_t process; } byte;
    long result;

    for (uint32_t i = device->header.kernel_slots; i < device->header.slots; i++) {
        memset(&byte, 0, sizeof byte);
        byte.type = LOCK_TO_WRITE;
        byte.start = i;
        byte.length = 1;
        result = call3(SYS_FCNTL, file, LOCK_OF_FILE, (long)&byte);
        if (!result) {
            vmibridge_slot_open(device, i, slot);
            return 0;
        }
        if (result != -AGAIN && result != -NOT_ALLOWED) {
            return (int)-result;
        }
    }
    return BUSY;
}

static int by_bars(const char *name, uint32_t kind, struct vmibridge_slot *slot)
{
    const bool is_ivshmem = kind == VMIBRIDGE_DEVICE_IVSHMEM;
    struct vmibridge_device device;
    void *registers = NULL, *memory;
    platform_file file;
    uint64_t size;
    int error = 0;

    if (!number_of(name, "enable") && !opened(path_of(name, "enable"), WRITE_ONLY, &file)) {
        /* If it does not work, reading says so. */
        call3(SYS_WRITE, file, (long)"1", 1);
        platform_close(file);
    }
    if (is_ivshmem) {
        error = mapped_bar(name, "resource0", &registers, &size, &file);
    }
    if (!error) {
        error = mapped_bar(name, is_ivshmem ? "resource2" : "resource0", &memory, &size, &file);
    }
    if (error) {
        return error;
    }
    if (!vmibridge_device_open(&device, memory, registers)) {
        return device.header.magic == UINT32_MAX ? NO_UNIT : NO_PROTOCOL;
    }
    if ((2 + 2 * (uint64_t)device.header.slots) * VMIBRIDGE_DEVICE_PAGE > size) {
        return NO_PROTOCOL;
    }
    return take(&device, file, slot);
}

static int by_sysfs(struct vmibridge_slot *slot)
{
    /* struct linux_dirent64, one behind the other */
    struct entry { uint64_t inode; int64_t next; uint16_t size; uint8_t kind; char name[]; };
    static char entries[4096] __attribute__((aligned(8)));
    const struct entry *entry;
    platform_file folder;
    uint32_t kind;
    long size;
    int error = NO_DEVICE;

    if (opened(DEVICES, READ_ONLY, &folder)) {
        return NO_DEVICE;
    }
    while (error && (size = call3(SYS_FOLDER, folder, (long)entries, sizeof entries)) > 0) {
        for (long at = 0; error && at < size; at += entry->size) {
            entry = (const void *)(entries + at);
            kind = vmibridge_pci_kind(number_of(entry->name, "device") << 16 |
                                      number_of(entry->name, "vendor"));
            if (kind) {
                error = by_bars(entry->name, kind, slot);
            }
        }
    }
    platform_close(folder);
    return error;
}

/* --- both --------------------------------------------------------------------------------- */

bool platform_open_slot(enum platform_way way, struct vmibridge_slot *slot, struct text *why)
{
    const int error = way == PLATFORM_DRIVER ? by_driver(slot) : by_sysfs(slot);
    const char *text = number_text((uint32_t)error);

    if (!error) {
        slot->space = VMIBRIDGE_SPACE_SLOT;
        return true;
    }
    if (error != NO_DEVICE && (error != NONE || way != PLATFORM_DRIVER)) {
        text = error == BUSY          ? "no slot is free"
               : error == NO_UNIT     ? "it is not enabled"
               : error == NO_PROTOCOL ? "no host is there, or one of another version"
                                      : text;
        text_add(why, "%s: ", way == PLATFORM_DRIVER ? DRIVER : "the PCI device");
        if (text) {
            text_add(why, "%s", text);
        } else {
            text_add(why, "error %u", (unsigned)error);
        }
    }
    return false;
}
