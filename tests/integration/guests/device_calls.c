/*
 * Calls the handler `exchange` of guest/linux by the device, and checks every answer.
 *
 *   -DCOUNT=100      calls
 *   -DSLOT=0         by this slot
 *   -DSPACE=OWN      what addresses are in: OWN, PHYSICAL, IN_SLOT, or NONE for no buffer
 *   -DUSER=1         the calls are made in ring 3
 *   -DINTERRUPT=1    waits by halting until the interrupt, and wants to have seen one
 *   -DECAM=0xe0000000 -DASSIGN=0xc0000000   config space is there, and nobody has assigned BARs
 *   -DLAST_BUS=255   how far it looks
 */
#include "device_start.h"

static void sleep_a_little(void *unused)
{
    (void)unused;
    vmibridge_pause();
}

#include "exchange.h"

enum { NONE, PHYSICAL, OWN, IN_SLOT };

#ifndef COUNT
#define COUNT 100
#endif
#ifndef SLOT
#define SLOT 0
#endif
#ifndef SPACE
#define SPACE OWN
#endif
#ifndef USER
#define USER 0
#endif
#ifndef INTERRUPT
#define INTERRUPT 0
#endif
#ifndef ECAM
#define ECAM 0
#endif
#ifndef ASSIGN
#define ASSIGN 0
#endif
#ifndef LAST_BUS
#define LAST_BUS 255
#endif

static unsigned char bytes[2 * EXCHANGE_SIZE];
static struct vmibridge_slot slot;

static const char *calls(void)
{
    struct exchange_buffer buffer = {bytes, VMIBRIDGE_ADDRESS(bytes), EXCHANGE_SIZE};
    struct vmibridge_caller caller = vmibridge_by_slot(&slot);
    const char *wrong;
    bool nobody;

    switch (SPACE) {
    case OWN:
        vmibridge_slot_own_space(&slot);
        break;
    case IN_SLOT:
        slot.space = VMIBRIDGE_SPACE_SLOT;
        buffer.bytes = (unsigned char *)(uintptr_t)slot.page->payload;
        buffer.address = 64;
        buffer.size = 2016;
        break;
    case NONE:
        buffer.size = 0;
        break;
    default:
        break;
    }
    wrong = exchange(&caller, COUNT, &buffer, &nobody);
    return !wrong && INTERRUPT && !interrupts ? "no interrupt came" : wrong;
}

#if USER
static void in_ring_3(void)
{
    leave(calls());
}
#endif

static volatile void *at(uint64_t address)
{
    return (volatile void *)(uintptr_t)address;
}

static const char *guest(void)
{
    struct vmibridge_pci pci = {(volatile uint8_t *)(uintptr_t)ECAM, LAST_BUS, ASSIGN};
    struct vmibridge_device device;
    struct vmibridge_pci_place place;

    if (vmibridge_pci_find(&pci, 1, &place)) {
        return "there is another device";
    }
    if (!vmibridge_pci_find(&pci, 0, &place)) {
        return "no device";
    }
    if (!vmibridge_device_open(&device, at(place.memory), at(place.registers))) {
        return "no host";
    }
    if (vmibridge_slot_open(&device, device.header.slots, &slot)) {
        return "there is a slot too many";
    }
    if (!vmibridge_slot_open(&device, SLOT, &slot)) {
        return "no slot";
    }
#if INTERRUPT
    take_interrupts();
    slot.wait = vmibridge_slot_halt;
    slot.polls = 0;
    if (!vmibridge_pci_interrupt(&pci, &place, (volatile uint32_t *)at(place.vectors), &slot,
                                 (uint32_t)APIC, INTERRUPT_VECTOR)) {
        return "no interrupt";
    }
#endif
#if USER
    leave_ring_0(in_ring_3);
#else
    return calls();
#endif
}
