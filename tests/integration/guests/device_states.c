/*
 * Calls by the device that do not end well, for the handler `Patient` of test_device_header.py.
 *
 *   -DGONE=1   instead waits until the host has stopped
 */
#include "device_start.h"

enum { REQUEST = 0x0100, ANSWERS = 1, HANGS = 2, COUNTS = 3, NO_SUCH_REQUEST = 0x0199 };

#define CHECK(condition)                                                                     \
    do {                                                                                     \
        if (!(condition)) {                                                                  \
            return #condition;                                                               \
        }                                                                                    \
    } while (0)

static unsigned waits;

/* Give up at the third time. */
static bool wait_shortly(struct vmibridge_slot *slot, uint32_t times)
{
    waits += slot->state == &waits;
    return times < 2;
}

static bool wait_on(struct vmibridge_slot *slot, uint32_t times)
{
    (void)slot;
    (void)times;
    vmibridge_pause();
    return true;
}

static const char *states(struct vmibridge_slot *slot)
{
    struct vmibridge_packet packet = {VMIBRIDGE_MAGIC, REQUEST, ANSWERS, 20, 22, 3, 4};
    struct vmibridge_response response;
    enum vmibridge_slot_result result;
    uint32_t number;

    CHECK(vmibridge_slot_call(slot, &packet, &response) == VMIBRIDGE_CALL_ANSWERED);
    CHECK(response.value1 == 42 && vmibridge_stamped(&response));
    /* Values that an answer does not have stay as they were. */
    CHECK(response.value2 == 22);

    /* To ring again for what was answered changes nothing. */
    packet.method = COUNTS;
    CHECK(vmibridge_slot_call(slot, &packet, &response) == VMIBRIDGE_CALL_ANSWERED);
    CHECK(response.value1 == 1);
    *slot->doorbell = slot->ring;
    CHECK(vmibridge_slot_call(slot, &packet, &response) == VMIBRIDGE_CALL_ANSWERED);
    CHECK(response.value1 == 2);

    /* The two halves of a call. */
    number = slot->number;
    CHECK(vmibridge_slot_begin(slot, &packet) == VMIBRIDGE_CALL_ANSWERED);
    CHECK(slot->number == number + 1);
    CHECK(vmibridge_slot_end(slot, &response) == VMIBRIDGE_CALL_ANSWERED && response.value1 == 3);

    /* A call of nobody's has no stamps, whatever stands in its values. */
    packet.magic = 0x12345678;
    packet.value3 = (vmibridge_word)VMIBRIDGE_STAMP3;
    packet.value4 = (vmibridge_word)VMIBRIDGE_STAMP4;
    CHECK(vmibridge_slot_call(slot, &packet, &response) == VMIBRIDGE_CALL_UNMATCHED);
    CHECK(slot->result == VMIBRIDGE_CALL_UNMATCHED && !vmibridge_stamped(&response));

    /* One that is given up frees its slot, soon or later. */
    packet.magic = VMIBRIDGE_MAGIC;
    packet.method = HANGS;
    slot->wait = wait_shortly;
    slot->state = &waits;
    CHECK(vmibridge_slot_call(slot, &packet, &response) == VMIBRIDGE_CALL_TIMED_OUT);
    CHECK(waits == 3 && !vmibridge_stamped(&response));
    packet.method = ANSWERS;
    slot->wait = 0;
    do {
        result = vmibridge_slot_call(slot, &packet, &response);
    } while (result == VMIBRIDGE_CALL_BUSY);
    CHECK(result == VMIBRIDGE_CALL_ANSWERED && response.value1 == 42);
    return NULL;
}

/* Another user of a slot whose last one ended in the middle of a call. */
static const char *left_behind(const struct vmibridge_device *device)
{
    struct vmibridge_packet packet = {VMIBRIDGE_MAGIC, REQUEST, HANGS, 20, 22, 0, 0};
    struct vmibridge_slot slot, next;
    struct vmibridge_response response;
    enum vmibridge_slot_result result;

    CHECK(vmibridge_slot_open(device, 1, &slot));
    CHECK(vmibridge_slot_begin(&slot, &packet) == VMIBRIDGE_CALL_ANSWERED);
    packet.method = ANSWERS;
    CHECK(vmibridge_slot_open(device, 1, &next));
    do {
        result = vmibridge_slot_call(&next, &packet, &response);
    } while (result == VMIBRIDGE_CALL_BUSY);
    CHECK(result == VMIBRIDGE_CALL_ANSWERED && response.value1 == 42);

    /* And in the middle of writing one: the state is the last, but nobody has rung. */
    next.page->state = VMIBRIDGE_SLOT_CALLED;
    CHECK(vmibridge_slot_open(device, 1, &slot));
    do {
        result = vmibridge_slot_call(&slot, &packet, &response);
    } while (result == VMIBRIDGE_CALL_BUSY);
    CHECK(result == VMIBRIDGE_CALL_ANSWERED && response.value1 == 42);

    /* One that waits need not ask again. */
    packet.method = HANGS;
    CHECK(vmibridge_slot_begin(&slot, &packet) == VMIBRIDGE_CALL_ANSWERED);
    packet.method = ANSWERS;
    CHECK(vmibridge_slot_open(device, 1, &next));
    next.wait = wait_on;
    CHECK(vmibridge_slot_call(&next, &packet, &response) == VMIBRIDGE_CALL_ANSWERED);
    CHECK(response.value1 == 42);
    return NULL;
}

static inline const char *gone(struct vmibridge_slot *slot)
{
    struct vmibridge_packet packet = {VMIBRIDGE_MAGIC, REQUEST, HANGS, 0, 0, 0, 0};
    struct vmibridge_caller caller = vmibridge_by_slot(slot);
    struct vmibridge_response response;
    uint32_t version, features;

    /* The host stops meanwhile: a call without an answer, and no more of them. */
    response = vmibridge_send(&caller, &packet);
    CHECK(!vmibridge_stamped(&response));
    while (vmibridge_slot_call(slot, &packet, &response) != VMIBRIDGE_CALL_NO_HOST) {
    }
    CHECK(!vmibridge_handshake_by(&caller, &version, &features));
    CHECK(slot->result == VMIBRIDGE_CALL_NO_HOST);
    return NULL;
}

static const char *guest(void)
{
    struct vmibridge_pci pci = {0, 255, 0};
    struct vmibridge_device device;
    struct vmibridge_pci_place place;
    struct vmibridge_slot slot;
    const char *wrong;

    CHECK(vmibridge_pci_find(&pci, 0, &place));
    CHECK(vmibridge_device_open(&device, (volatile void *)(uintptr_t)place.memory,
                                (volatile void *)(uintptr_t)place.registers));
    CHECK(vmibridge_slot_open(&device, 0, &slot));
#ifdef GONE
    (void)wrong;
    (void)states;
    (void)left_behind;
    return gone(&slot);
#else
    wrong = states(&slot);
    return wrong ? wrong : left_behind(&device);
#endif
}
