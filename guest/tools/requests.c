#include "requests.h"

#include "handlers/environment.h"
#include "handlers/exit.h"
#include "handlers/fetch.h"
#include "handlers/log.h"
#include "host.h"
#include "text.h"
#include "transfer.h"

enum { MAX_LINE = 4096, TOUCHES = 8 };
enum { WORDS = 2016 }; /* bytes for a name or a URL in a slot of the device: half of it */
/* Of the handlers log, environment and fetch, which have no typed methods. */
enum { INVALID = VMIBRIDGE_KIND_INVALID_PARAMETERS };

static struct shared shared;

/* What the host reads or writes: these pages are written to, so they are there. */
static void touch(void)
{
    vmibridge_touch_pages((uintptr_t)shared.buffer, shared.buffer_size, true);
    vmibridge_touch_pages((uintptr_t)shared.words, shared.words_size, true);
}

/* A method of the host that takes and gives values. */
typedef vmibridge_status method(const struct vmibridge_caller *, vmibridge_word, vmibridge_word,
                                vmibridge_word, vmibridge_word, struct vmibridge_response *);

/*
 * Call one that is not typed: its status is in value1. To it a page that is not present is an
 * invalid parameter, so a request is sent again a few times, in case the system took pages away.
 */
static vmibridge_status ask(method *function, vmibridge_word first, vmibridge_word second,
                            vmibridge_word third, struct vmibridge_response *response)
{
    vmibridge_status status;
    unsigned touches = 0;

    do {
        touch();
        status = function(by(), first, second, third, 0, response);
        if (status) {
            return status;
        }
        status = response->value1 & ~(uint64_t)0xff0000ffu;
        touches++;
    } while (vmibridge_kind_of(status) == INVALID && touches < TOUCHES);
    return status;
}

static void to_words(const char *text)
{
    const size_t size = text_length(text) + 1;

    shared = host_memory(WORDS);
    if (size > shared.words_size) {
        fail(EXIT_USAGE, "a text of more than %u bytes", (unsigned)shared.words_size - 1);
    }
    memcpy(shared.words, text, size);
}

static void output(const void *data, size_t size)
{
    if (!platform_write(platform_standard(PLATFORM_OUTPUT), data, size)) {
        fail(EXIT_LOCAL, "standard output: %s", platform_why());
    }
}

/* --- log ---------------------------------------------------------------------------------- */

static method *const LEVELS[] = {vmibridge_log_debug, vmibridge_log_info, vmibridge_log_warning,
                                 vmibridge_log_error};

bool log_level(const char *text, unsigned *level)
{
    static const char *const NAMES[] = {"debug", "info", "warning", "error"};

    for (unsigned i = 0; i < sizeof NAMES / sizeof *NAMES; i++) {
        if (text_is(text, NAMES[i])) {
            *level = i;
            return true;
        }
    }
    return false;
}

/* Log bytes of the buffer, in pieces that the host takes: none ends within a character. */
static void log_line(unsigned level, size_t start, size_t size)
{
    struct vmibridge_response response;
    const unsigned char *buffer = shared.buffer;
    size_t part;

    do {
        part = size < MAX_LINE ? size : MAX_LINE;
        if (part < size) {
            /* Bytes within a character of UTF-8 are 0x80 to 0xbf; there are three at the most. */
            for (size_t back = 0; back < 3 && (buffer[start + part] & 0xc0) == 0x80; back++) {
                part--;
            }
        }
        expect(ask(LEVELS[level], host_address(buffer + start), part, 0, &response));
        start += part;
        size -= part;
    } while (size);
}

static void log_input(unsigned level)
{
    const platform_file input = platform_standard(PLATFORM_INPUT);
    unsigned char *buffer = shared.buffer;
    size_t start, length = 0, size;
    ptrdiff_t count;

    for (;;) {
        count = platform_read(input, buffer + length, shared.buffer_size - length);
        if (count < 0) {
            fail(EXIT_LOCAL, "standard input: %s", platform_why());
        }
        if (!count) {
            break;
        }
        length += (size_t)count;
        start = 0;
        for (size_t at = length - (size_t)count; at < length; at++) {
            if (buffer[at] == '\n') {
                size = at - start;
                log_line(level, start, size && buffer[at - 1] == '\r' ? size - 1 : size);
                start = at + 1;
            }
        }
        if (!start && length == shared.buffer_size) {
            log_line(level, 0, length);
            start = length;
        }
        length -= start;
        for (size_t at = 0; at < length; at++) {
            buffer[at] = buffer[start + at];
        }
    }
    if (length) {
        log_line(level, 0, length);
    }
}

void log_words(unsigned level, int count, char **given)
{
    struct text text;

    shared = host_memory(0);
    text = text_in((char *)shared.buffer, shared.buffer_size);
    if (!count) {
        log_input(level);
        return;
    }
    for (int i = 0; i < count; i++) {
        text_add(&text, "%s%s", i ? " " : "", given[i]);
    }
    if (text.length + 1 == text.size) {
        fail(EXIT_USAGE, "a text of more than %u bytes", (unsigned)shared.buffer_size - 2);
    }
    log_line(level, 0, text.length);
}

/* --- env ---------------------------------------------------------------------------------- */

void print_environment(const char *name)
{
    struct vmibridge_response response;
    unsigned char *room;
    vmibridge_word size;
    vmibridge_status status;

    to_words(name);
    room = shared.buffer;
    size = shared.buffer_size;
    for (;;) {
        status = ask(vmibridge_environment_get, host_address(shared.words), host_address(room),
                     size, &response);
        /* value2 is the capacity that it takes: the native code is not there in 32-bit code. */
        if (vmibridge_kind_of(status) != VMIBRIDGE_KIND_FAILED || response.value2 <= size) {
            break;
        }
        if (by()->room) {
            fail(EXIT_LOCAL, "a value of %l bytes, and the slot of the device has room for %l",
                 (uint64_t)response.value2 - 1, (uint64_t)size - 1);
        }
        size = response.value2;
        room = platform_pages(size);
        if (!room) {
            fail(EXIT_LOCAL, "no memory");
        }
    }
    if (sizeof(vmibridge_word) == 4 && vmibridge_kind_of(status) == VMIBRIDGE_KIND_FAILED) {
        fail(EXIT_FAILED, "the host says: failed: it hands out no value of this name");
    }
    expect(status);
    if (response.value2 >= size) {
        fail(EXIT_FAILED, "the host has put %l bytes where there is room for %l",
             (uint64_t)response.value2, (uint64_t)size);
    }
    room[response.value2] = '\n';
    output(room, response.value2 + 1);
}

/* --- fetch -------------------------------------------------------------------------------- */

/* Code 1 has an HTTP status as its native code. */
static void expect_fetched(vmibridge_status status)
{
    if (status != VMIBRIDGE_NOT_ANSWERED && vmibridge_kind_of(status) == VMIBRIDGE_KIND_FAILED) {
        if (vmibridge_code_of(status) == 1) {
            fail(EXIT_FAILED, "the host says: failed, code 1: the server answered %s%u",
                 sizeof(vmibridge_word) == 4 ? "other than 200; its status is not there in 32-bit code, but " : "",
                 (unsigned)vmibridge_native_of(status));
        }
        if (sizeof(vmibridge_word) == 4) {
            fail(EXIT_FAILED, "the host says: failed: the URL is not allowed, or the network failed");
        }
    }
    expect(status);
}

void fetch(const char *url, const char *path)
{
    static struct own_file own;
    struct vmibridge_response response;
    struct progress progress;
    vmibridge_word handle;
    uint64_t size = UINT64_MAX, done = 0;

    to_words(url);
    expect_fetched(ask(vmibridge_fetch_open, host_address(shared.words), 0, 0, &response));
    handle = response.value2;
    expect_fetched(ask(vmibridge_fetch_length, handle, 0, 0, &response));
    /* An unknown length has all bits set, in each width. */
    if (response.value2 != (vmibridge_word)-1) {
        size = response.value2;
    }
    own_file_open(&own, path, url);
    progress_begin(&progress, url, size, 0);
    for (;;) {
        expect_fetched(ask(vmibridge_fetch_read, handle, host_address(shared.buffer),
                           shared.buffer_size, &response));
        if (!response.value2) {
            break;
        }
        if (response.value2 > shared.buffer_size) {
            fail(EXIT_FAILED, "the host has put %l bytes where there is room for %u",
                 (uint64_t)response.value2, (unsigned)shared.buffer_size);
        }
        own_file_write(&own, done, shared.buffer, response.value2);
        done += response.value2;
        progress_show(&progress, done);
    }
    progress_end(&progress);
    expect(ask(vmibridge_fetch_close, handle, 0, 0, &response));
    own_file_end(&own, done);
}

/* --- exit, ping, call --------------------------------------------------------------------- */

void tell_exit(uint32_t status, const char *reason)
{
    expect(vmibridge_exit_exit(by(), status, reason));
}

static void print_time(const char *name, uint32_t milliseconds)
{
    if (milliseconds == VMIBRIDGE_NO_END) {
        print(platform_standard(PLATFORM_OUTPUT), "%s without end", name);
    } else {
        print(platform_standard(PLATFORM_OUTPUT), "%s %u ms", name, milliseconds);
    }
}

void ping(void)
{
    static const struct { uint32_t bit; const char *name; } FEATURES[] = {
        {VMIBRIDGE_FEATURE_WAIT, " wait"},
        {VMIBRIDGE_FEATURE_POLICY, " policy"},
        {VMIBRIDGE_FEATURE_QUOTA, " quota"},
    };
    enum { ROUNDS = 16 };
    const platform_file out = platform_standard(PLATFORM_OUTPUT);
    struct vmibridge_response response;
    uint32_t soft, hard, limit;
    uint64_t begun, took, least = UINT64_MAX;
    bool has_features = false;

    if (!host.is_there) {
        host_did_not_answer();
    }
    print(out, "vmibridge: version %u.%u by %s, %s\n", (unsigned)(host.version >> 16),
          (unsigned)(host.version & 0xffff), way_name(host.way), sizeof(void *) == 8 ? "x64" : "x86");
    print(out, "features:");
    for (unsigned i = 0; i < sizeof FEATURES / sizeof *FEATURES; i++) {
        if (host.features & FEATURES[i].bit) {
            print(out, "%s", FEATURES[i].name);
            has_features = true;
        }
    }
    print(out, "%s\n", has_features ? "" : " none");
    if (vmibridge_deadlines_by(by(), &soft, &hard)) {
        print(out, "deadlines: ");
        if (soft) {
            print_time("soft", soft);
            print(out, ", ");
        }
        print_time("hard", hard);
        print(out, "\n");
    }
    if (vmibridge_limit_by(by(), VMIBRIDGE_LIMIT_ACCESS, &limit)) {
        print(out, "limits: %u bytes in one piece", limit);
        if (vmibridge_limit_by(by(), VMIBRIDGE_LIMIT_IN_FLIGHT, &limit)) {
            print(out, ", %u requests in flight", limit);
        }
        if (vmibridge_limit_by(by(), VMIBRIDGE_LIMIT_RESULT_TIMEOUT, &limit)) {
            print_time(", results kept for", limit);
        }
        print(out, "\n");
    }
    if (!vmibridge_self_test_by(by())) {
        fail(EXIT_NO_ANSWER, "a register does not get through: %s cannot be used",
             way_name(host.way));
    }
    for (unsigned i = 0; i < ROUNDS; i++) {
        begun = platform_microseconds();
        vmibridge_ask_host_by(by(), VMIBRIDGE_HOST_VERSION, 0, &response);
        took = platform_microseconds() - begun;
        least = took < least ? took : least;
    }
    print(out, "round trip: %l us, the least of %u\n", least, (unsigned)ROUNDS);
}

void call(uint32_t magic, uint16_t request, uint16_t number, const vmibridge_word values[4])
{
    const struct vmibridge_packet packet = {magic,     request,   number,   values[0],
                                            values[1], values[2], values[3]};
    const struct vmibridge_response response = vmibridge_send(by(), &packet);
    const bool is_stamped = vmibridge_stamped(&response);

    print(platform_standard(PLATFORM_OUTPUT), "0x%x 0x%x 0x%x 0x%x %s\n", (uint64_t)response.value1,
          (uint64_t)response.value2, (uint64_t)response.value3, (uint64_t)response.value4,
          is_stamped ? "stamped" : "unstamped");
    if (!is_stamped) {
        platform_exit(host.is_there ? EXIT_NO_ANSWER : EXIT_NO_HOST);
    }
}
