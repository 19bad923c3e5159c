/*
 * Calls by a PCI device whose other end is vmibridge, for C11 and C++ without a library: GCC, Clang
 * and mingw-w64, 64-bit and 32-bit x86 code, in a program, in a kernel, or with nothing below it.
 *
 *   vmibridge_pci_find         the device, by ports or ECAM: ring 0; vmibridge_pci_kind for a driver
 *   vmibridge_device_open      its memory, once that is mapped: whether there is a host
 *   vmibridge_slot_open        one slot of it, which one thread at a time may use
 *   vmibridge_by_slot          a caller: for the functions of vmibridge.h and of generated headers
 *   vmibridge_slot_call        one request; vmibridge_slot_begin and vmibridge_slot_end are its halves
 *   vmibridge_slot_own_space   lets the host read the caller's memory by virtual address: ring 0
 *   vmibridge_pci_interrupt    the interrupt of a late answer, and vmibridge_slot_halt, which waits
 *                              for it: ring 0
 *
 * Two devices carry the same slots, in pages of 4096 bytes:
 *
 *                 vfio-user: BAR 0          ivshmem-doorbell: BAR 2, and BAR 0 for its registers
 *   page 0        header                    header
 *   page 1        spaces of slots           spaces of slots
 *   page 2 + 2n   doorbell of slot n        only the cell of a cancelled call
 *   page 3 + 2n   slot n                    slot n
 *
 * A call is written into the slot and rung for. Most answers are there when the doorbell returns
 * (vfio-user), or shortly after (ivshmem). So the slot is looked at some thousand times, and then
 * `wait` of the slot decides: sleep, yield, halt until the interrupt, or give up, which cancels the
 * call. A slot whose call was given up is of use again when the host has let go of it.
 *
 * The host of a vfio-user device that has died reads as all ones. That of ivshmem cannot be told from
 * one that is slow: give `wait` an end.
 */
#ifndef VMIBRIDGE_DEVICE_H
#define VMIBRIDGE_DEVICE_H

#include "vmibridge.h"

/* --- the memory of the device ---------------------------------------------------------------- */

#define VMIBRIDGE_DEVICE_VERSION 1u
#define VMIBRIDGE_DEVICE_PAGE 4096u

/* Vendor in bits 0-15, device in bits 16-31, as the first register of config space has them. */
#define VMIBRIDGE_DEVICE_VFIO_USER 0x564d1234u
#define VMIBRIDGE_DEVICE_IVSHMEM 0x11101af4u

/* Page 0. The guest only reads it. */
struct vmibridge_device_header {
    uint32_t magic, version;
    uint32_t slots, slot_size;
    uint32_t doorbell_at, slot_at; /* offsets of those of slot 0 */
    uint32_t stride;               /* bytes from one to the next */
    uint32_t payload_at;           /* offset in a slot */
    uint32_t generation;           /* another one after a reset, and of another host; 0: it has
                                      stopped */
    uint32_t hold;                 /* microseconds that a doorbell may take */
    uint32_t timeout;              /* milliseconds until QEMU gives an access up; 0: unknown */
    uint32_t vectors;              /* interrupts; slot n has n modulo these */
    uint32_t kernel_slots;         /* from slot 0: those whose spaces are believed */
    uint32_t unused[3];
};

/* An entry of page 1, for each slot: the space that the guest's kernel vouches for. */
struct vmibridge_device_space {
    uint64_t root; /* CR3; 0: none */
    uint32_t flags; /* VMIBRIDGE_SLOT_PAGING */
    uint32_t owner; /* of no meaning to the host */
};

/* A slot. */
struct vmibridge_slot_page {
    uint32_t magic;
    uint16_t request, method;
    uint64_t values[4];
    uint32_t state;    /* VMIBRIDGE_SLOT_IDLE and its like */
    uint32_t flags;    /* VMIBRIDGE_SLOT_NARROW and its like */
    uint64_t space;    /* VMIBRIDGE_SPACE_PHYSICAL or _SLOT, or CR3 */
    uint32_t number;   /* of the call */
    uint32_t answered; /* of the last answered call */
    uint8_t payload[VMIBRIDGE_DEVICE_PAGE - 64];
};

/* The state of a slot. A guest writes the second, and the host the others. */
#define VMIBRIDGE_SLOT_IDLE 0u
#define VMIBRIDGE_SLOT_CALLED 1u
#define VMIBRIDGE_SLOT_ANSWERED 2u
#define VMIBRIDGE_SLOT_TAKEN 3u     /* the answer comes later */
#define VMIBRIDGE_SLOT_UNMATCHED 4u /* there is no answer */

#define VMIBRIDGE_SLOT_NARROW 1u      /* values and addresses have 32 bits */
#define VMIBRIDGE_SLOT_INTERRUPT 2u   /* interrupt me when a late answer is there */
#define VMIBRIDGE_SLOT_PAGING (3u << 4) /* how the page tables of the space are walked: */
#define VMIBRIDGE_SLOT_PAGING_4 (0u << 4)
#define VMIBRIDGE_SLOT_PAGING_5 (1u << 4)
#define VMIBRIDGE_SLOT_PAGING_PAE (2u << 4)
#define VMIBRIDGE_SLOT_PAGING_32 (3u << 4)

/* What addresses are in. */
#define VMIBRIDGE_SPACE_PHYSICAL 0u /* physical; of a slot that is not the kernel's: in the space
                                       that the kernel has entered for it in page 1 */
#define VMIBRIDGE_SPACE_SLOT 1u     /* offsets in this slot */

/* --- a device and its slots ------------------------------------------------------------------ */

/* Compilers keep the order of accesses around it, and x86 keeps that of stores and of loads. */
#define VMIBRIDGE_DEVICE_ORDER() __asm__ volatile("" ::: "memory")

/* A device whose memory is mapped. */
struct vmibridge_device {
    volatile uint8_t *memory;      /* page 0 and on, as far as it is mapped */
    volatile uint32_t *registers;  /* of ivshmem; NULL: vfio-user */
    struct vmibridge_device_header header;
};

/* What became of a call. */
enum vmibridge_slot_result {
    VMIBRIDGE_CALL_ANSWERED,  /* see the stamps, as always */
    VMIBRIDGE_CALL_UNMATCHED, /* no handler, a policy denies it, or the host has stopped */
    VMIBRIDGE_CALL_TIMED_OUT, /* `wait` gave up */
    VMIBRIDGE_CALL_BUSY,      /* not sent: a call that was given up is not over */
    VMIBRIDGE_CALL_LOST,      /* the host was replaced meanwhile: it may have been done, or not */
    VMIBRIDGE_CALL_NO_HOST    /* nobody is there */
};

/* A slot, and how its calls are waited for. Everything behind `owner` may be set at any time. */
struct vmibridge_slot {
    volatile struct vmibridge_slot_page *page;
    volatile uint32_t *doorbell;   /* of vfio-user, a page; of ivshmem, register 3 */
    volatile uint32_t *cancel;     /* the cell that a call's number is written to */
    const volatile struct vmibridge_device_header *header; /* NULL: it is not mapped here */
    uint32_t ring;                 /* what is written to the doorbell */
    uint32_t generation, number;
    bool is_ivshmem;
    bool is_owed;                  /* the host may still be at a call that was given up */
    enum vmibridge_slot_result result; /* of the last call */

    uint64_t space;                /* VMIBRIDGE_SPACE_PHYSICAL at first */
    uint32_t flags;                /* VMIBRIDGE_SLOT_INTERRUPT, VMIBRIDGE_SLOT_PAGING_5 */
    uint32_t polls;                /* how often the slot is looked at between two waits */
    /* Sleep, yield or halt; `times` counts from 0 in each call. `false`: give up. NULL: never. */
    bool (*wait)(struct vmibridge_slot *slot, uint32_t times);
    /* Ring, where the doorbell is not mapped here. NULL: by a store. */
    void (*ring_by)(struct vmibridge_slot *slot);
    /* Between two requests while the host tells to wait, of vmibridge_by_slot. NULL: a pause. */
    void (*sleep)(struct vmibridge_slot *slot);
    void *state;                   /* of whoever has the slot */
};

/*
 * Look at a device whose memory begins at `memory`. `registers`: BAR 0 of ivshmem, else NULL. `false`:
 * there is no host, it has another version, or it is none of ours.
 */
static inline bool vmibridge_device_open(struct vmibridge_device *device, volatile void *memory,
                                         volatile void *registers)
{
    const volatile uint32_t *from = (const volatile uint32_t *)memory;
    struct vmibridge_device_header *header = &device->header;
    uint32_t *to = (uint32_t *)header;
    unsigned i;

    device->memory = (volatile uint8_t *)memory;
    device->registers = (volatile uint32_t *)registers;
    for (i = 0; i < sizeof *header / sizeof *to; i++) {
        to[i] = from[i];
    }
    return header->magic == VMIBRIDGE_MAGIC && header->version == VMIBRIDGE_DEVICE_VERSION &&
           header->generation && header->slots && header->slots <= 256 && header->slot_size == VMIBRIDGE_DEVICE_PAGE &&
           header->doorbell_at == 2 * VMIBRIDGE_DEVICE_PAGE &&
           header->slot_at == 3 * VMIBRIDGE_DEVICE_PAGE &&
           header->stride == 2 * VMIBRIDGE_DEVICE_PAGE && header->payload_at == 64;
}

/*
 * A slot by its doorbell page and its own page, where nothing else of the device is mapped: what a
 * driver gives. vfio-user only.
 */
static inline void vmibridge_slot_open_pages(struct vmibridge_slot *slot, volatile void *doorbell,
                                             volatile void *page)
{
    slot->page = (volatile struct vmibridge_slot_page *)page;
    slot->doorbell = (volatile uint32_t *)doorbell;
    slot->cancel = slot->doorbell + 1;
    slot->header = 0;
    slot->ring = 1;
    slot->generation = 0;
    slot->number = slot->page->number;
    slot->is_ivshmem = false;
    /* A program that had this slot before us may have ended in the middle of a call. */
    slot->is_owed = true;
    slot->result = VMIBRIDGE_CALL_NO_HOST;
    slot->space = VMIBRIDGE_SPACE_PHYSICAL;
    slot->flags = 0;
    slot->polls = 2000;
    slot->wait = 0;
    slot->sleep = 0;
    slot->ring_by = 0;
    slot->state = 0;
}

/*
 * Slot `index` of a device; `false`: it has fewer. Of two users of one slot at a time neither can
 * tell which answer is its own: a program takes one by a lock on a file, a kernel by a bit.
 */
static inline bool vmibridge_slot_open(const struct vmibridge_device *device, uint32_t index,
                                       struct vmibridge_slot *slot)
{
    volatile uint8_t *pages;

    if (index >= device->header.slots) {
        return false;
    }
    pages = device->memory + (2 + 2 * (size_t)index) * VMIBRIDGE_DEVICE_PAGE;
    vmibridge_slot_open_pages(slot, pages, pages + VMIBRIDGE_DEVICE_PAGE);
    slot->header = (const volatile struct vmibridge_device_header *)device->memory;
    slot->generation = slot->header->generation;
    if (device->registers) {
        /* The host is peer 1, and each slot has a vector: an eventfd tells nothing but its number. */
        slot->is_ivshmem = true;
        slot->doorbell = device->registers + 3;
        slot->ring = 1u << 16 | index;
    }
    return true;
}

/* Whether the host has replied, or cannot: the slot says so, or there is none any more. */
static inline bool vmibridge_slot_is_over(const struct vmibridge_slot *slot)
{
    const uint32_t state = slot->page->state;

    VMIBRIDGE_DEVICE_ORDER();
    return state != VMIBRIDGE_SLOT_CALLED && state != VMIBRIDGE_SLOT_TAKEN;
}

/* Whether the host that the slot was opened with is gone. */
static inline bool vmibridge_slot_is_replaced(const struct vmibridge_slot *slot)
{
    return slot->header && slot->header->generation != slot->generation;
}

/* Whether nobody is there any more; costs an exit. Of ivshmem that cannot be told. */
static inline bool vmibridge_slot_is_dead(const struct vmibridge_slot *slot)
{
    return !slot->is_ivshmem && *slot->doorbell == 0xffffffffu;
}

/* Tell the host to look at the slot. */
static inline void vmibridge_slot_ring(struct vmibridge_slot *slot)
{
    VMIBRIDGE_DEVICE_ORDER();
    if (slot->ring_by) {
        slot->ring_by(slot);
    } else {
        *slot->doorbell = slot->ring;
    }
    VMIBRIDGE_DEVICE_ORDER();
}

/* Look at the slot for a short time. */
static inline bool vmibridge_slot_poll(const struct vmibridge_slot *slot)
{
    uint32_t left;

    for (left = slot->polls;; left--) {
        if (vmibridge_slot_is_over(slot)) {
            return true;
        }
        if (!left) {
            return false;
        }
        __asm__ volatile("pause");
    }
}

/* Give up the call that was begun. The slot is of use again when the host has let go of it. */
static inline void vmibridge_slot_cancel(struct vmibridge_slot *slot)
{
    slot->is_owed = true;
    *slot->cancel = slot->number;
    if (slot->is_ivshmem) {
        vmibridge_slot_ring(slot);
    }
}

/*
 * Send a request, and do not wait: vmibridge_slot_end takes its answer. Returns
 * VMIBRIDGE_CALL_ANSWERED when it was sent, which says nothing of an answer.
 */
static inline enum vmibridge_slot_result vmibridge_slot_begin(struct vmibridge_slot *slot,
                                                              const struct vmibridge_packet *packet)
{
    volatile struct vmibridge_slot_page *page = slot->page;

    if (slot->header &&
        (slot->header->magic != VMIBRIDGE_MAGIC || !slot->header->generation)) {
        return slot->result = VMIBRIDGE_CALL_NO_HOST;
    }
    if (vmibridge_slot_is_replaced(slot)) {
        /* The new one has wiped all slots, and knows no number. */
        slot->generation = slot->header->generation;
        slot->is_owed = false;
    }
    if (slot->is_owed && !vmibridge_slot_is_over(slot)) {
        if (page->state == VMIBRIDGE_SLOT_CALLED) {
            vmibridge_slot_ring(slot); /* nobody may have */
        }
        vmibridge_slot_cancel(slot);
        if (!vmibridge_slot_poll(slot)) {
            return slot->result =
                       vmibridge_slot_is_dead(slot) ? VMIBRIDGE_CALL_NO_HOST : VMIBRIDGE_CALL_BUSY;
        }
    }
    slot->is_owed = false;
    slot->number++;
    if (slot->number == page->answered) {
        slot->number++;
    }
    page->magic = packet->magic;
    page->request = packet->request;
    page->method = packet->method;
    page->values[0] = packet->value1;
    page->values[1] = packet->value2;
    page->values[2] = packet->value3;
    page->values[3] = packet->value4;
    page->flags = slot->flags | (sizeof(vmibridge_word) == 4 ? VMIBRIDGE_SLOT_NARROW : 0u);
    page->space = slot->space;
    page->number = slot->number;
    VMIBRIDGE_DEVICE_ORDER();
    page->state = VMIBRIDGE_SLOT_CALLED;
    vmibridge_slot_ring(slot);
    return slot->result = VMIBRIDGE_CALL_ANSWERED;
}

/* Wait for the answer to the call that was begun, and take it. Without one, all of it is 0. */
static inline enum vmibridge_slot_result vmibridge_slot_end(struct vmibridge_slot *slot,
                                                            struct vmibridge_response *response)
{
    volatile struct vmibridge_slot_page *page = slot->page;
    uint32_t times;

    response->value1 = response->value2 = response->value3 = response->value4 = 0;
    for (times = 0; !vmibridge_slot_poll(slot); times++) {
        if (vmibridge_slot_is_replaced(slot)) {
            return slot->result = VMIBRIDGE_CALL_LOST;
        }
        if (vmibridge_slot_is_dead(slot)) {
            slot->is_owed = true;
            return slot->result = VMIBRIDGE_CALL_NO_HOST;
        }
        if (slot->wait && !slot->wait(slot, times)) {
            vmibridge_slot_cancel(slot);
            return slot->result = VMIBRIDGE_CALL_TIMED_OUT;
        }
    }
    if (page->state == VMIBRIDGE_SLOT_UNMATCHED) {
        return slot->result = VMIBRIDGE_CALL_UNMATCHED;
    }
    if (page->state != VMIBRIDGE_SLOT_ANSWERED || page->answered != slot->number) {
        /* Wiped by a reset, or unmapped. */
        return slot->result =
                   vmibridge_slot_is_dead(slot) ? VMIBRIDGE_CALL_NO_HOST : VMIBRIDGE_CALL_LOST;
    }
    response->value1 = (vmibridge_word)page->values[0];
    response->value2 = (vmibridge_word)page->values[1];
    response->value3 = (vmibridge_word)page->values[2];
    response->value4 = (vmibridge_word)page->values[3];
    return slot->result = VMIBRIDGE_CALL_ANSWERED;
}

/*
 * Send one request, and wait for its answer. Without one, all of the response is 0. A slot with a
 * `wait` is waited for, too, while the host is still at a call that was given up.
 */
static inline enum vmibridge_slot_result vmibridge_slot_call(struct vmibridge_slot *slot,
                                                             const struct vmibridge_packet *packet,
                                                             struct vmibridge_response *response)
{
    enum vmibridge_slot_result result;
    uint32_t times;

    /* A host with other work may end a cancelled call of the slot's last user late. */
    for (times = 0; (result = vmibridge_slot_begin(slot, packet)) == VMIBRIDGE_CALL_BUSY; times++) {
        if (!slot->wait || !slot->wait(slot, times)) {
            break;
        }
    }
    if (result != VMIBRIDGE_CALL_ANSWERED) {
        response->value1 = response->value2 = response->value3 = response->value4 = 0;
        return result;
    }
    return vmibridge_slot_end(slot, response);
}

/* `send` and `sleep` of a caller whose state is a slot. */
static inline void vmibridge_slot_send(void *state, const struct vmibridge_packet *packet,
                                       struct vmibridge_response *response)
{
    (void)vmibridge_slot_call((struct vmibridge_slot *)state, packet, response);
}

static inline void vmibridge_slot_sleep(void *state)
{
    struct vmibridge_slot *slot = (struct vmibridge_slot *)state;

    if (slot->sleep) {
        slot->sleep(slot);
    } else {
        vmibridge_pause();
    }
}

/*
 * Call by this slot, as long as it is kept: for the functions of vmibridge.h whose names end with
 * `_by`, and for those of generated headers. Set the space of the slot before: with
 * VMIBRIDGE_SPACE_SLOT buffers are copied through the payload, and have 4032 bytes in all. A slot
 * carries four values in 32-bit code, too, as CPUID does. What became of a call that was not
 * answered is in `result` of the slot.
 */
static inline struct vmibridge_caller vmibridge_by_slot(struct vmibridge_slot *slot)
{
    struct vmibridge_caller caller = vmibridge_by(VMIBRIDGE_CPUID);

    caller.send = vmibridge_slot_send;
    caller.sleep = vmibridge_slot_sleep;
    caller.state = slot;
    if (slot->space == VMIBRIDGE_SPACE_SLOT) {
        caller.room = (void *)(uintptr_t)slot->page->payload;
        caller.room_size = sizeof slot->page->payload;
        caller.room_address = VMIBRIDGE_DEVICE_PAGE - sizeof slot->page->payload;
    }
    return caller;
}

/* --- ring 0 ---------------------------------------------------------------------------------- */

/*
 * Give the addresses of this slot's calls the meaning that they have for the caller: ring 0 only.
 * The host believes it of the header's `kernel_slots` first slots.
 */
static inline void vmibridge_slot_own_space(struct vmibridge_slot *slot)
{
    uintptr_t cr0, cr3, cr4;

    __asm__ volatile("mov %%cr0, %0" : "=r"(cr0));
    __asm__ volatile("mov %%cr3, %0" : "=r"(cr3));
    __asm__ volatile("mov %%cr4, %0" : "=r"(cr4));
    slot->flags &= ~VMIBRIDGE_SLOT_PAGING;
    slot->space = VMIBRIDGE_SPACE_PHYSICAL;
    if (!(cr0 >> 31 & 1)) {
        return;
    }
#ifdef __x86_64__
    slot->space = cr3 & 0x000ffffffffff000ull;
    slot->flags |= cr4 & 1u << 12 ? VMIBRIDGE_SLOT_PAGING_5 : VMIBRIDGE_SLOT_PAGING_4;
#else
    slot->space = cr3 & (cr4 & 1u << 5 ? 0xffffffe0u : 0xfffff000u);
    slot->flags |= cr4 & 1u << 5 ? VMIBRIDGE_SLOT_PAGING_PAE : VMIBRIDGE_SLOT_PAGING_32;
#endif
}

/*
 * `wait` of a slot whose interrupt is set up: halt until one comes. Interrupts are on afterwards. A
 * machine without any other interrupt waits for ever if the host dies.
 */
static inline bool vmibridge_slot_halt(struct vmibridge_slot *slot, uint32_t times)
{
    (void)times;
    __asm__ volatile("cli" ::: "memory");
    if (vmibridge_slot_is_over(slot)) {
        __asm__ volatile("sti" ::: "memory");
    } else {
        /* No interrupt comes between the two. */
        __asm__ volatile("sti\n\thlt" ::: "memory");
    }
    return true;
}

/* How config space is reached. */
struct vmibridge_pci {
    volatile uint8_t *ecam; /* where it is mapped; NULL: by the ports 0xcf8 and 0xcfc */
    uint8_t buses;          /* how many of them there are in it, less 1 */
    uint64_t assign;        /* where BARs are put that no firmware has assigned, a multiple of 4 MiB
                               below 4 GiB; 0: such a device is not taken */
};

/* A device in config space. Addresses are physical. */
struct vmibridge_pci_place {
    uint32_t function;  /* bus in bits 8-15, device in bits 3-7, function in bits 0-2 */
    uint32_t kind;      /* VMIBRIDGE_DEVICE_VFIO_USER or VMIBRIDGE_DEVICE_IVSHMEM */
    uint64_t memory;    /* for vmibridge_device_open */
    uint64_t registers; /* of ivshmem, 256 bytes; else 0 */
    uint64_t vectors;   /* of ivshmem, its table of MSI-X; else 0 */
};

static inline void vmibridge_out32(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port) : "memory");
}

static inline uint32_t vmibridge_in32(uint16_t port)
{
    uint32_t value;

    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port) : "memory");
    return value;
}

/* A register of 32 bits of config space. */
static inline uint32_t vmibridge_pci_read(const struct vmibridge_pci *pci, uint32_t function,
                                          uint32_t at)
{
    if (pci->ecam) {
        return *(volatile uint32_t *)(pci->ecam + ((size_t)function << 12) + at);
    }
    vmibridge_out32(0xcf8, 0x80000000u | function << 8 | (at & 0xfc));
    return vmibridge_in32(0xcfc);
}

static inline void vmibridge_pci_write(const struct vmibridge_pci *pci, uint32_t function,
                                       uint32_t at, uint32_t value)
{
    if (pci->ecam) {
        *(volatile uint32_t *)(pci->ecam + ((size_t)function << 12) + at) = value;
        return;
    }
    vmibridge_out32(0xcf8, 0x80000000u | function << 8 | (at & 0xfc));
    vmibridge_out32(0xcfc, value);
}

/* The kind of a device by the first register of its config space; 0: it is none of ours. */
static inline uint32_t vmibridge_pci_kind(uint32_t identity)
{
    return identity == VMIBRIDGE_DEVICE_VFIO_USER || identity == VMIBRIDGE_DEVICE_IVSHMEM ? identity
                                                                                          : 0;
}

/* The address of a BAR, assigned here if nobody did; 0: it has none. */
static inline uint64_t vmibridge_pci_bar(struct vmibridge_pci *pci, uint32_t function, unsigned bar)
{
    const uint32_t at = 0x10 + 4 * bar;
    uint32_t low = vmibridge_pci_read(pci, function, at), size;
    uint64_t address = low & ~15u;
    const bool is_wide = (low & 7) == 4;

    if (low & 1) {
        return 0;
    }
    if (is_wide) {
        address |= (uint64_t)vmibridge_pci_read(pci, function, at + 4) << 32;
    }
    if (address || !pci->assign) {
        return address;
    }
    vmibridge_pci_write(pci, function, at, 0xffffffffu);
    size = ~(vmibridge_pci_read(pci, function, at) & ~15u) + 1;
    if (!size) {
        return 0;
    }
    address = (pci->assign + size - 1) & ~(uint64_t)(size - 1);
    vmibridge_pci_write(pci, function, at, (uint32_t)address);
    if (is_wide) {
        vmibridge_pci_write(pci, function, at + 4, (uint32_t)(address >> 32));
    }
    pci->assign = address + size;
    return address;
}

/* Turn a device on, and say where it is. `false`: its BARs have no address. */
static inline bool vmibridge_pci_take(struct vmibridge_pci *pci, uint32_t function, uint32_t kind,
                                      struct vmibridge_pci_place *place)
{
    place->function = function;
    place->kind = kind;
    place->registers = place->vectors = 0;
    if (kind == VMIBRIDGE_DEVICE_IVSHMEM) {
        place->registers = vmibridge_pci_bar(pci, function, 0);
        place->vectors = vmibridge_pci_bar(pci, function, 1);
        place->memory = vmibridge_pci_bar(pci, function, 2);
    } else {
        place->memory = vmibridge_pci_bar(pci, function, 0);
    }
    /* Memory, and bus master, without which no interrupt comes. */
    vmibridge_pci_write(pci, function, 4, (vmibridge_pci_read(pci, function, 4) & 0xffffu) | 6u);
    return place->memory && (place->registers || kind != VMIBRIDGE_DEVICE_IVSHMEM);
}

/*
 * Find the device that is number `index` among ours, from 0, and turn it on. Ring 0, and nobody else
 * uses config space meanwhile: under an operating system take its own functions instead. `false`:
 * there are fewer.
 */
static inline bool vmibridge_pci_find(struct vmibridge_pci *pci, unsigned index,
                                      struct vmibridge_pci_place *place)
{
    uint32_t last_bus = 0, function, identity, header, behind, kind;

    for (function = 0; function >> 8 <= last_bus; function++) {
        identity = vmibridge_pci_read(pci, function, 0);
        header = vmibridge_pci_read(pci, function, 0x0c) >> 16;
        if ((identity & 0xffff) == 0xffff) {
            if (!(function & 7)) {
                function |= 7; /* without its function 0 a device has none */
            }
            continue;
        }
        kind = vmibridge_pci_kind(identity);
        if (kind && !index--) {
            return vmibridge_pci_take(pci, function, kind, place);
        }
        if ((header & 0x7f) == 1) {
            /* A bridge: the buses behind it. */
            behind = vmibridge_pci_read(pci, function, 0x18) >> 16 & 0xff;
            behind = pci->ecam && behind > pci->buses ? pci->buses : behind;
            last_bus = behind > last_bus ? behind : last_bus;
        }
        if (!(function & 7) && !(header & 0x80)) {
            function |= 7; /* it has one function */
        }
    }
    return false;
}

/*
 * Let late answers of a slot interrupt: `address` and `data` are a message of MSI, such as 0xfee00000
 * for the APIC with id 0, and the vector. `vectors` is where the place's table is mapped, NULL where
 * it has none. MSI of vfio-user has one message for all slots here. `false`: the device cannot.
 */
static inline bool vmibridge_pci_interrupt(const struct vmibridge_pci *pci,
                                           const struct vmibridge_pci_place *place,
                                           volatile uint32_t *vectors, struct vmibridge_slot *slot,
                                           uint64_t address, uint32_t data)
{
    enum { MSI = 5, MSIX = 0x11 };
    const uint32_t function = place->function;
    uint32_t at = vmibridge_pci_read(pci, function, 0x34) & 0xfc, control, left;

    for (left = 48; at && left; left--) {
        control = vmibridge_pci_read(pci, function, at);
        if ((control & 0xff) == MSI) {
            const uint32_t is_wide = control >> 23 & 1;

            vmibridge_pci_write(pci, function, at + 4, (uint32_t)address);
            if (is_wide) {
                vmibridge_pci_write(pci, function, at + 8, (uint32_t)(address >> 32));
            }
            vmibridge_pci_write(pci, function, at + 8 + 4 * is_wide, data);
            /* Enabled, with one message. */
            vmibridge_pci_write(pci, function, at, (control & ~(7u << 20)) | 1u << 16);
            slot->flags |= VMIBRIDGE_SLOT_INTERRUPT;
            return true;
        }
        if ((control & 0xff) == MSIX && vectors) {
            volatile uint32_t *entry = vectors + 4 * (slot->ring & 0xffff);

            if ((slot->ring & 0xffff) > (control >> 16 & 0x7ff)) {
                return false;
            }
            entry[0] = (uint32_t)address;
            entry[1] = (uint32_t)(address >> 32);
            entry[2] = data;
            entry[3] = 0;
            vmibridge_pci_write(pci, function, at, (control & ~(1u << 30)) | 1u << 31);
            slot->flags |= VMIBRIDGE_SLOT_INTERRUPT;
            return true;
        }
        at = control >> 8 & 0xfc;
    }
    return false;
}

#endif
