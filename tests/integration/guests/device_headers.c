/*
 * Calls the methods of `Called` (tests/helpers/called_methods.py) by its generated header and the
 * device: all of them with addresses of the caller's own, and those whose buffers fit through the slot.
 *
 *   -DSPACE=OWN|PHYSICAL|IN_SLOT
 */
#include "device_start.h"

#include "called_methods.h"

enum { PHYSICAL, OWN, IN_SLOT };

static unsigned char ours[ROOM + 1], theirs[ROOM + 1];

static void ask_at_once(struct vmibridge_slot *slot)
{
    (void)slot;
}

static unsigned by_the_slot(const struct vmibridge_caller *caller)
{
    enum { SMALL = 1000 };
    unsigned passed;
    uint64_t total;
    uint32_t size, i;

    passed = called_numbers(caller);
    passed = passed == PASSED ? called_members(caller) : passed;
    passed = passed == PASSED ? called_texts(caller) : passed;
    if (passed != PASSED) {
        return passed;
    }
    for (i = 0; i < SMALL; i++) {
        ours[i] = (unsigned char)(7 * i + i / 256);
    }
    theirs[SMALL] = 0xee;
    CHECK(!vmibridge_called_reverse(caller, ours, SMALL, theirs, SMALL, &size) && size == SMALL);
    for (i = 0; i < SMALL; i++) {
        CHECK(theirs[i] == ours[SMALL - 1 - i]);
    }
    CHECK(theirs[SMALL] == 0xee);
    CHECK(!vmibridge_called_reverse(caller, 0, 9, 0, 9, &size) && size == 3);
    CHECK(vmibridge_called_total(caller, 5, ours, ROOM, &total) == VMIBRIDGE_NO_ROOM && !total);
    CHECK(vmibridge_called_fill(caller, 1, theirs, 3993, &size) == VMIBRIDGE_NO_ROOM && !size);
    CHECK(!vmibridge_called_fill(caller, 1, theirs, 3992, &size) && size == 3992);
    CHECK(theirs[3991] == 1 && theirs[3992] == 0);
    CHECK(vmibridge_code_of(vmibridge_called_total(caller, 5, ours, ROOM + 1, &total)) == 2);
    return PASSED;
}

static const char *guest(void)
{
    static const char digits[] = "0123456789";
    static char line[] = "line 0000";
    struct vmibridge_pci pci = {0, 255, 0};
    struct called_buffers buffers = {ours, theirs};
    struct vmibridge_device device;
    struct vmibridge_pci_place place;
    struct vmibridge_slot slot;
    struct vmibridge_caller caller;
    unsigned passed;

    if (!vmibridge_pci_find(&pci, 0, &place) ||
        !vmibridge_device_open(&device, (volatile void *)(uintptr_t)place.memory,
                               (volatile void *)(uintptr_t)place.registers) ||
        !vmibridge_slot_open(&device, 0, &slot)) {
        return "no device";
    }
    slot.sleep = ask_at_once;
    if (SPACE == OWN) {
        vmibridge_slot_own_space(&slot);
    } else if (SPACE == IN_SLOT) {
        slot.space = VMIBRIDGE_SPACE_SLOT;
    }
    caller = vmibridge_by_slot(&slot);
    passed = SPACE == IN_SLOT ? by_the_slot(&caller) : call_all(&caller, &buffers);
    if (passed == PASSED) {
        return NULL;
    }
    for (unsigned at = 0; at < 4; at++, passed /= 10) {
        line[8 - at] = digits[passed % 10];
    }
    return line;
}
