/* The platform layer for Linux, x64 and x86: system calls, without a C library. */
#include "linux_calls.h"
#include "numbers.h"
#include "platform.h"
#include "text.h"

#ifdef __x86_64__

__asm__(".globl _start\n"
        "_start:\n"
        "    xorl %ebp, %ebp\n"
        "    movq %rsp, %rdi\n"
        "    andq $-16, %rsp\n"
        "    call vmib_begin\n");

#else

__asm__(".globl _start\n"
        "_start:\n"
        "    xorl %ebp, %ebp\n"
        "    movl %esp, %eax\n"
        "    andl $-16, %esp\n"
        "    subl $12, %esp\n"
        "    pushl %eax\n"
        "    call vmib_begin\n");

#endif

enum { EINTR = 4, EAGAIN = 11, TCGETS = 0x5401, LOCK_ALONE = 2 | 4 };
enum { MAX_AT_ONCE = 1 << 30 };

static long error_number;

const char platform_separator = 0;

/* The stack of a new process: how many arguments, and the arguments. */
__attribute__((used, noreturn)) void vmib_begin(long *stack);
void vmib_begin(long *stack)
{
    platform_exit(vmib((int)stack[0], (char **)(stack + 1)));
}

void platform_exit(int status)
{
    for (;;) {
        call3(SYS_EXIT, status, 0, 0);
    }
}

static bool done(long result)
{
    if (result < 0) {
        error_number = -result;
    }
    return result >= 0;
}

void *platform_pages(size_t size)
{
    const long result = map(size, MAP_RIGHTS, MAP_FLAGS, -1);

    return is_error(result) ? NULL : (void *)result;
}

struct timespan { long seconds, nanoseconds; };

uint64_t platform_microseconds(void)
{
    struct timespan span = {0, 0};

    call3(SYS_CLOCK, 1, (long)&span, 0);
    return (uint64_t)(unsigned long)span.seconds * 1000000 + (unsigned long)span.nanoseconds / 1000;
}

void platform_sleep(uint32_t milliseconds)
{
    struct timespan span = {(long)(milliseconds / 1000), (long)(milliseconds % 1000 * 1000000)};

    while (call3(SYS_NANOSLEEP, (long)&span, (long)&span, 0) == -EINTR) {
    }
}

platform_file platform_standard(enum platform_stream stream)
{
    return stream;
}

bool platform_is_terminal(platform_file file)
{
    char settings[64];

    return call3(SYS_IOCTL, file, TCGETS, (long)settings) == 0;
}

static bool opened(const char *path, long flags, platform_file *file)
{
    *file = call3(SYS_OPEN, (long)path, flags | LARGE_FILE | CLOSE_ON_EXEC, 0666);
    return done(*file);
}

enum platform_kind platform_kind_of(const char *path)
{
    enum { KINDS = 0170000, REGULAR = 0100000, FOLDER = 0040000 };
    uint32_t mode;
    char found[STAT_SIZE];

    if (call3(SYS_STAT, (long)path, (long)found, 0) < 0) {
        return PLATFORM_NONE;
    }
    memcpy(&mode, found + STAT_MODE, sizeof mode);
    switch (mode & KINDS) {
    case REGULAR:
        return PLATFORM_FILE;
    case FOLDER:
        return PLATFORM_FOLDER;
    default:
        return PLATFORM_DEVICE;
    }
}

bool platform_open_device(const char *path, platform_file *file)
{
    return opened(path, WRITE_ONLY, file);
}

bool platform_open(const char *path, platform_file *file)
{
    return opened(path, READ_ONLY, file);
}

bool platform_open_own(const char *path, platform_file *file)
{
    if (!opened(path, READ_WRITE | CREATE, file)) {
        return false;
    }
    if (!done(call3(SYS_FLOCK, *file, LOCK_ALONE, 0))) {
        platform_close(*file);
        return false;
    }
    return true;
}

bool platform_open_unnamed(platform_file *file)
{
    *file = call3(SYS_MEMFD, (long)"vmib", 1, 0);
    return done(*file);
}

bool platform_size(platform_file file, uint64_t *size)
{
    uint64_t start;

    return done(seek(file, SEEK_TO_END, size)) && done(seek(file, SEEK_TO_START, &start));
}

bool platform_resize(platform_file file, uint64_t size)
{
    return done(resize(file, size));
}

ptrdiff_t platform_read(platform_file file, void *into, size_t size)
{
    long result;

    size = size > MAX_AT_ONCE ? MAX_AT_ONCE : size;
    do {
        result = call3(SYS_READ, file, (long)into, (long)size);
    } while (result == -EINTR);
    return done(result) ? result : -1;
}

ptrdiff_t platform_read_at(platform_file file, uint64_t offset, void *into, size_t size)
{
    long result;

    size = size > MAX_AT_ONCE ? MAX_AT_ONCE : size;
    do {
        result = at_offset(SYS_PREAD, file, into, size, offset);
    } while (result == -EINTR);
    return done(result) ? result : -1;
}

bool platform_write(platform_file file, const void *data, size_t size)
{
    const char *at = data;
    long result;

    while (size) {
        result = call3(SYS_WRITE, file, (long)at, (long)(size > MAX_AT_ONCE ? MAX_AT_ONCE : size));
        if (result == -EINTR) {
            continue;
        }
        if (!done(result)) {
            return false;
        }
        at += result;
        size -= (size_t)result;
    }
    return true;
}

bool platform_write_at(platform_file file, uint64_t offset, const void *data, size_t size)
{
    const char *at = data;
    long result;

    while (size) {
        result = at_offset(SYS_PWRITE, file, at, size > MAX_AT_ONCE ? MAX_AT_ONCE : size, offset);
        if (result == -EINTR) {
            continue;
        }
        if (!done(result)) {
            return false;
        }
        at += result;
        offset += (uint64_t)result;
        size -= (size_t)result;
    }
    return true;
}

void platform_close(platform_file file)
{
    call3(SYS_CLOSE, file, 0, 0);
}

bool platform_rename(const char *from, const char *to)
{
    return done(call3(SYS_RENAME, (long)from, (long)to, 0));
}

bool platform_give_name(platform_file file, const char *from, const char *to)
{
    /* Closed behind it: until then it is locked. */
    const bool has_name = done(call3(SYS_RENAME, (long)from, (long)to, 0));

    platform_close(file);
    return has_name;
}

const char *platform_why(void)
{
    static char unknown[32];
    const char *known = number_text((uint32_t)error_number);

    if (error_number == EAGAIN) {
        return "another program is at it";
    }
    if (!known) {
        struct text text = text_in(unknown, sizeof unknown);

        text_add(&text, "error %u", (unsigned)error_number);
        known = unknown;
    }
    return known;
}

static void (*on_fault)(void);

static void fault(int number)
{
    (void)number;
    on_fault();
}

void platform_on_fault(void (*told)(void))
{
    /* The kernel's struct. x64 wants a restorer, also for a handler that does not return. */
    struct { void (*handler)(int); unsigned long flags; void (*restorer)(int); uint64_t mask; } action;
    enum { SIGILL = 4, SIGSEGV = 11, HAS_RESTORER = 0x04000000 };

    on_fault = told;
    action.handler = fault;
    action.flags = HAS_RESTORER;
    action.restorer = fault;
    action.mask = 0;
    call4(SYS_SIGACTION, SIGILL, (long)&action, 0, sizeof action.mask);
    /* KVM writes the other vendor's instruction over a VMCALL: where it cannot, that is a fault. */
    call4(SYS_SIGACTION, SIGSEGV, (long)&action, 0, sizeof action.mask);
}
