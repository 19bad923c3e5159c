#include "host.h"

#include "numbers.h"
#include "text.h"

struct host host = {BY_ANY, false, 0, 0, 300000, ""};

static struct vmibridge_slot slot;
static char refusal[512];     /* why there is no slot, where there is a device */

static uint64_t told_to_wait; /* since when; 0: not yet */
static uint32_t pause;        /* milliseconds that come next */

static void failed(enum exit_status status, const char *form, va_list list) __attribute__((noreturn));
static void failed(enum exit_status status, const char *form, va_list list)
{
    static char line[8192];
    struct text text = text_in(line, sizeof line);

    text_add_list(&text, form, list);
    print(platform_standard(PLATFORM_ERRORS), "vmib: %s%s%s\n", host.doing, *host.doing ? ": " : "",
          line);
    platform_exit(status);
}

void fail(enum exit_status status, const char *form, ...)
{
    va_list list;

    va_start(list, form);
    failed(status, form, list);
}

const char *way_name(enum way way)
{
    static const char *const NAMES[] = {
        [BY_CPUID] = "cpuid",   [BY_VMCALL] = "vmcall", [BY_VMMCALL] = "vmmcall",
        [BY_DRIVER] = "driver", [BY_SYSFS] = "sysfs",
    };

    return (size_t)way < sizeof NAMES / sizeof *NAMES ? NAMES[way] : NULL;
}

static bool is_by_slot(void)
{
    return host.way == BY_DRIVER || host.way == BY_SYSFS;
}

static void cannot_be_executed(void)
{
    fail(EXIT_NO_HOST, "no host answered: %s cannot be executed here", way_name(host.way));
}

/* What is done before a request is sent again. Short at first: most answers are nearly there. */
static void wait_a_little(void *unused)
{
    const uint64_t now = platform_microseconds();
    uint64_t waited;

    (void)unused;
    if (!told_to_wait) {
        told_to_wait = now;
    }
    waited = now - told_to_wait;
    divide(&waited, 1000);
    if (host.timeout && waited >= host.timeout) {
        if (is_by_slot() && !vmibridge_slot_is_over(&slot)) {
            vmibridge_slot_cancel(&slot);
        }
        fail(EXIT_WAITING, "after %u s the host still tells to wait: see --timeout",
             (unsigned)(host.timeout / 1000));
    }
    platform_sleep(pause);
    pause = pause < 100 ? 2 * pause : pause;
}

/* `wait` of the slot: for an answer that comes later. */
static bool wait_for_slot(struct vmibridge_slot *unused, uint32_t times)
{
    (void)times;
    wait_a_little(unused);
    return true;
}

const struct vmibridge_caller *by(void)
{
    static struct vmibridge_caller caller;

    caller = is_by_slot() ? vmibridge_by_slot(&slot) : vmibridge_by((enum vmibridge_how)host.way);
    caller.sleep = wait_a_little;
    told_to_wait = 0;
    pause = 1;
    return &caller;
}

static void shake_hands(void)
{
    host.is_there = vmibridge_handshake_by(by(), &host.version, &host.features);
}

/* Call by the device, if there is a slot; else why not is in `refusal`, as far as there is a device. */
static bool open_slot(enum way way)
{
    struct text why = text_in(refusal, sizeof refusal);

    if (!platform_open_slot(way == BY_DRIVER ? PLATFORM_DRIVER : PLATFORM_SYSFS, &slot, &why)) {
        return false;
    }
    slot.wait = wait_for_slot;
    host.way = way;
    shake_hands();
    return true;
}

void host_begin(void)
{
    switch (host.way) {
    case BY_DRIVER:
    case BY_SYSFS:
        if (!open_slot(host.way)) {
            fail(EXIT_NO_HOST, "no host answered: %s",
                 *refusal                 ? refusal
                 : host.way == BY_DRIVER ? "there is no driver of the PCI device"
                                          : "there is no PCI device of vmibridge");
        }
        break;
    case BY_ANY:
        /* CPUID does no harm anywhere. */
        host.way = BY_CPUID;
        shake_hands();
        if (!host.is_there && !host.version && !open_slot(BY_DRIVER) && !*refusal) {
            /* What has a driver is not to be had by sysfs. */
            open_slot(BY_SYSFS);
        }
        break;
    default:
        if (host.way != BY_CPUID) {
            platform_on_fault(cannot_be_executed);
        }
        shake_hands();
    }
    if (!host.is_there && host.version) {
        fail(EXIT_NO_ANSWER, "the host has version %u of the bridge protocol, and vmib has %u",
             (unsigned)(host.version >> 16), VMIBRIDGE_VERSION_MAJOR);
    }
}

void host_did_not_answer(void)
{
    if (is_by_slot() && slot.result == VMIBRIDGE_CALL_NO_HOST) {
        fail(EXIT_NO_HOST, "no host answered: none is at the device any more");
    }
    if (!host.is_there) {
        fail(EXIT_NO_HOST, "no host answered%s%s", *refusal ? ": " : "", refusal);
    }
    fail(EXIT_NO_ANSWER, "the host did not answer this request: it has no such handler or method, "
                         "denies it, or failed at it");
}

struct shared host_memory(size_t words_size)
{
    enum { ROOM = 64 << 10 };
    static unsigned char words[ROOM] __attribute__((aligned(4096)));
    static unsigned char buffer[ROOM] __attribute__((aligned(4096)));
    struct shared shared = {words, buffer, sizeof words, sizeof buffer};

    if (is_by_slot()) {
        shared.words = (unsigned char *)(uintptr_t)slot.page->payload;
        shared.words_size = words_size;
        shared.buffer = shared.words + words_size;
        shared.buffer_size = sizeof slot.page->payload - words_size;
    }
    return shared;
}

vmibridge_word host_address(const void *at)
{
    return is_by_slot() ? (vmibridge_word)((uintptr_t)at - (uintptr_t)slot.page) : VMIBRIDGE_ADDRESS(at);
}

uint32_t error_of(vmibridge_status status)
{
    if (status == VMIBRIDGE_NOT_ANSWERED || status == VMIBRIDGE_NO_ROOM ||
        vmibridge_kind_of(status) != VMIBRIDGE_KIND_FAILED) {
        return 0;
    }
    return vmibridge_code_of(status);
}

void expect(vmibridge_status status)
{
    const unsigned code = vmibridge_code_of(status);
    const uint32_t native = vmibridge_native_of(status);
    const char *text;

    if (status == VMIBRIDGE_NOT_ANSWERED) {
        host_did_not_answer();
    }
    if (status == VMIBRIDGE_NO_ROOM) {
        fail(EXIT_LOCAL, "a name or a text does not fit into the slot of the device");
    }
    switch (vmibridge_kind_of(status)) {
    case VMIBRIDGE_KIND_SUCCESS:
        return;
    case VMIBRIDGE_KIND_WAITING:
        fail(EXIT_WAITING, "the host still tells to wait");
    case VMIBRIDGE_KIND_TOUCH:
        fail(EXIT_FAILED, "the host says: touch: a page is not present, however often it is touched");
    case VMIBRIDGE_KIND_INVALID_PARAMETERS:
        fail(EXIT_FAILED, "the host says: invalid parameters, code %u", code);
    case VMIBRIDGE_KIND_FAILED:
        text = number_text(native ? native : code);
        fail(EXIT_FAILED, "the host says: failed, code %u, native code %u%s%s", code,
             (unsigned)native, text ? ": " : "", text ? text : "");
    case VMIBRIDGE_KIND_ABORTED:
        fail(EXIT_FAILED, "the host says: aborted, code %u, native code %u", code, (unsigned)native);
    default:
        fail(EXIT_FAILED, "the host says: status 0x%x, of a kind that vmib does not know",
             (uint64_t)status);
    }
}
