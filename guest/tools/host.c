#include "host.h"

#include "numbers.h"
#include "text.h"

struct host host = {VMIBRIDGE_CPUID, false, 0, 0, 300000, ""};

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

const char *how_name(enum vmibridge_how how)
{
    switch (how) {
    case VMIBRIDGE_CPUID:
        return "cpuid";
    case VMIBRIDGE_VMCALL:
        return "vmcall";
    default:
        return "vmmcall";
    }
}

static void cannot_be_executed(void)
{
    fail(EXIT_NO_HOST, "no host answered: %s cannot be executed here", how_name(host.how));
}

void host_begin(void)
{
    /* CPUID does no harm anywhere. The others were asked for by --by. */
    if (host.how != VMIBRIDGE_CPUID) {
        platform_on_fault(cannot_be_executed);
    }
    host.is_there = vmibridge_handshake(host.how, &host.version, &host.features);
    if (!host.is_there && host.version) {
        fail(EXIT_NO_ANSWER, "the host has version %u of the bridge protocol, and vmib has %u",
             (unsigned)(host.version >> 16), VMIBRIDGE_VERSION_MAJOR);
    }
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
        fail(EXIT_WAITING, "after %u s the host still tells to wait: see --timeout",
             (unsigned)(host.timeout / 1000));
    }
    platform_sleep(pause);
    pause = pause < 100 ? 2 * pause : pause;
}

const struct vmibridge_caller *by(void)
{
    static struct vmibridge_caller caller;

    caller = vmibridge_by(host.how);
    caller.sleep = wait_a_little;
    told_to_wait = 0;
    pause = 1;
    return &caller;
}

void host_did_not_answer(void)
{
    if (!host.is_there) {
        fail(EXIT_NO_HOST, "no host answered");
    }
    fail(EXIT_NO_ANSWER, "the host did not answer this request: it has no such handler or method, "
                         "denies it, or failed at it");
}

uint32_t error_of(vmibridge_status status)
{
    if (status == VMIBRIDGE_NOT_ANSWERED || vmibridge_kind_of(status) != VMIBRIDGE_KIND_FAILED) {
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
