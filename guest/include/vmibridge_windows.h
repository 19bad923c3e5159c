/*
 * Calls by the device from kernel code of Windows, without an INF: the device is found in config space
 * by HAL, and its BARs are mapped. For a driver, or for what a kernel debugger or a VMI tool runs, by
 * the WDK or mingw-w64 with its ddk headers; links to ntoskrnl and hal.
 *
 *   struct vmibridge_windows way;
 *   NTSTATUS status = vmibridge_windows_open(&way, 0);     at PASSIVE_LEVEL
 *   struct vmibridge_caller caller = vmibridge_by_slot(&way.slot);
 *   ...
 *   vmibridge_windows_close(&way);
 *
 * One thread at a time may use a slot, and whoever else uses the device has others: `index` is yours to
 * choose. Slots below `kernel_slots` of the header carry addresses of the system's space, as seen in
 * the process that has called vmibridge_windows_open: best the System process, so a DriverEntry. Others
 * copy buffers through the slot. At PASSIVE_LEVEL a call sleeps while it waits, above it polls.
 *
 * It was compiled by mingw-w64, and has not been run in a Windows yet.
 */
#ifndef VMIBRIDGE_WINDOWS_H
#define VMIBRIDGE_WINDOWS_H

#include <ntddk.h>

#include "vmibridge_device.h"

/* A slot, and what is mapped for it. */
struct vmibridge_windows {
    struct vmibridge_slot slot;
    struct vmibridge_device device;
    void *memory, *registers;
    size_t size;            /* bytes of `memory` */
    uint32_t milliseconds;  /* after which a call is given up; 0: never. 60,000 at first */
    uint32_t waited;        /* of the call that is waited for, in steps of a millisecond or more */
};

/* Config space of a function. `false`: it is not there. */
static inline bool vmibridge_windows_read(uint32_t bus, uint32_t device, uint32_t function,
                                          uint32_t at, void *into, uint32_t size)
{
    PCI_SLOT_NUMBER place;

    place.u.AsULONG = 0;
    place.u.bits.DeviceNumber = device;
    place.u.bits.FunctionNumber = function;
    return HalGetBusDataByOffset(PCIConfiguration, bus, place.u.AsULONG, into, at, size) == size;
}

static inline void *vmibridge_windows_map(uint64_t address, size_t size)
{
    typedef PVOID(NTAPI * map_ex)(PHYSICAL_ADDRESS, SIZE_T, ULONG);
    UNICODE_STRING name;
    PHYSICAL_ADDRESS from;
    PVOID found;

    from.QuadPart = (LONGLONG)address;
    RtlInitUnicodeString(&name, L"MmMapIoSpaceEx");
    found = MmGetSystemRoutineAddress(&name);
    if (!found) {
        /* Windows 8.1 and before: what is mapped can be executed, too. */
        return MmMapIoSpace(from, size, MmNonCached);
    }
    return ((map_ex)(ULONG_PTR)found)(from, size, PAGE_READWRITE | PAGE_NOCACHE);
}

static inline void vmibridge_windows_close(struct vmibridge_windows *way)
{
    if (way->memory) {
        MmUnmapIoSpace(way->memory, way->size);
    }
    if (way->registers) {
        MmUnmapIoSpace(way->registers, VMIBRIDGE_DEVICE_PAGE);
    }
    way->memory = way->registers = 0;
}

/* `wait` of such a slot: sleep for a millisecond, or for a clock's tick. */
static inline bool vmibridge_windows_wait(struct vmibridge_slot *slot, uint32_t times)
{
    struct vmibridge_windows *way = (struct vmibridge_windows *)slot->state;
    LARGE_INTEGER time;
    unsigned i;

    way->waited = times ? way->waited + 1 : 0;
    if (way->milliseconds && way->waited >= way->milliseconds) {
        return false;
    }
    if (KeGetCurrentIrql() == PASSIVE_LEVEL) {
        time.QuadPart = -10000; /* units of 100 ns, from now on */
        KeDelayExecutionThread(KernelMode, FALSE, &time);
    } else {
        for (i = 0; i < 20; i++) {
            KeStallExecutionProcessor(50); /* the most that is allowed at a time */
        }
    }
    return true;
}

/* `sleep` of such a slot, while the host tells to wait. */
static inline void vmibridge_windows_sleep(struct vmibridge_slot *slot)
{
    (void)vmibridge_windows_wait(slot, 0);
}

/* Map the device of this function, and take its slot. */
static inline NTSTATUS vmibridge_windows_take(struct vmibridge_windows *way, uint32_t kind,
                                              const uint32_t *bars, uint32_t index)
{
    const unsigned bar = kind == VMIBRIDGE_DEVICE_IVSHMEM ? 2 : 0;
    uint64_t memory = bars[bar] & ~15u;

    if ((bars[bar] & 7) == 4) {
        memory |= (uint64_t)bars[bar + 1] << 32;
    }
    if (!memory) {
        return STATUS_DEVICE_NOT_READY; /* it has no address */
    }
    if (kind == VMIBRIDGE_DEVICE_IVSHMEM) {
        way->registers = vmibridge_windows_map(bars[0] & ~15u, VMIBRIDGE_DEVICE_PAGE);
        if (!way->registers) {
            return STATUS_INSUFFICIENT_RESOURCES;
        }
    }
    /* The header first, which says how much there is. */
    way->size = VMIBRIDGE_DEVICE_PAGE;
    way->memory = vmibridge_windows_map(memory, way->size);
    if (!way->memory) {
        return STATUS_INSUFFICIENT_RESOURCES;
    }
    if (!vmibridge_device_open(&way->device, way->memory, way->registers)) {
        return STATUS_DEVICE_NOT_CONNECTED; /* no host, or one of another version */
    }
    MmUnmapIoSpace(way->memory, way->size);
    way->size = (2 + 2 * (size_t)way->device.header.slots) * VMIBRIDGE_DEVICE_PAGE;
    way->memory = vmibridge_windows_map(memory, way->size);
    if (!way->memory) {
        return STATUS_INSUFFICIENT_RESOURCES;
    }
    if (!vmibridge_device_open(&way->device, way->memory, way->registers)) {
        return STATUS_DEVICE_NOT_CONNECTED;
    }
    if (!vmibridge_slot_open(&way->device, index, &way->slot)) {
        return STATUS_INVALID_PARAMETER;
    }
    if (index < way->device.header.kernel_slots) {
        vmibridge_slot_own_space(&way->slot);
    } else {
        way->slot.space = VMIBRIDGE_SPACE_SLOT;
    }
    way->slot.wait = vmibridge_windows_wait;
    way->slot.sleep = vmibridge_windows_sleep;
    way->slot.state = way;
    return STATUS_SUCCESS;
}

/*
 * Find the first device and take slot `index` of it. At PASSIVE_LEVEL. Other than success:
 * STATUS_NO_SUCH_DEVICE, STATUS_DEVICE_NOT_READY (its BARs have no addresses),
 * STATUS_DEVICE_NOT_CONNECTED (no host), STATUS_INVALID_PARAMETER (no such slot),
 * STATUS_INSUFFICIENT_RESOURCES.
 */
static inline NTSTATUS vmibridge_windows_open(struct vmibridge_windows *way, uint32_t index)
{
    uint32_t bus, place, identity, kind, bars[4];
    uint16_t command;
    PCI_SLOT_NUMBER number;
    NTSTATUS status;

    way->memory = way->registers = 0;
    way->milliseconds = 60000;
    way->waited = 0;
    for (bus = 0; bus < 256; bus++) {
        for (place = 0; place < 256; place++) {
            if (!vmibridge_windows_read(bus, place >> 3, place & 7, 0, &identity, 4)) {
                continue;
            }
            kind = vmibridge_pci_kind(identity);
            if (!kind || !vmibridge_windows_read(bus, place >> 3, place & 7, 0x10, bars, 16) ||
                !vmibridge_windows_read(bus, place >> 3, place & 7, 4, &command, 2)) {
                continue;
            }
            if (!(command & 2)) {
                /* A device without a driver may be off: memory. */
                command |= 2;
                number.u.AsULONG = 0;
                number.u.bits.DeviceNumber = place >> 3;
                number.u.bits.FunctionNumber = place & 7;
                HalSetBusDataByOffset(PCIConfiguration, bus, number.u.AsULONG, &command, 4, 2);
            }
            status = vmibridge_windows_take(way, kind, bars, index);
            if (status != STATUS_SUCCESS) {
                vmibridge_windows_close(way);
            }
            return status;
        }
    }
    return STATUS_NO_SUCH_DEVICE;
}

#endif
