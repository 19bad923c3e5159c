/* System calls of Linux, x64 and x86, without a C library. Each returns what the kernel does: -errno if it failed. */
#ifndef VMIB_LINUX_CALLS_H
#define VMIB_LINUX_CALLS_H

#include "platform.h"

#ifdef __x86_64__

enum {
    SYS_READ = 0, SYS_WRITE = 1, SYS_OPEN = 2, SYS_CLOSE = 3, SYS_STAT = 4, SYS_LSEEK = 8, SYS_MMAP = 9,
    SYS_SIGACTION = 13, SYS_IOCTL = 16, SYS_PREAD = 17, SYS_PWRITE = 18, SYS_NANOSLEEP = 35,
    SYS_FCNTL = 72, SYS_FLOCK = 73, SYS_TRUNCATE = 77, SYS_RENAME = 82, SYS_FOLDER = 217, SYS_CLOCK = 228,
    SYS_EXIT = 231, SYS_MEMFD = 319
};

static inline long call6(long number, long first, long second, long third, long fourth, long fifth,
                  long sixth)
{
    long result;
    register long r10 __asm__("r10") = fourth;
    register long r8 __asm__("r8") = fifth;
    register long r9 __asm__("r9") = sixth;

    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(first), "S"(second), "d"(third), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static inline long call3(long number, long first, long second, long third)
{
    return call6(number, first, second, third, 0, 0, 0);
}

static inline long call4(long number, long first, long second, long third, long fourth)
{
    return call6(number, first, second, third, fourth, 0, 0);
}

static inline long seek(platform_file file, int whence, uint64_t *place)
{
    long result = call3(SYS_LSEEK, file, 0, whence);

    *place = (uint64_t)result;
    return result < 0 ? result : 0;
}

static inline long at_offset(long number, platform_file file, const void *data, size_t size,
                      uint64_t offset)
{
    return call6(number, file, (long)data, (long)size, (long)offset, 0, 0);
}

static inline long resize(platform_file file, uint64_t size)
{
    return call3(SYS_TRUNCATE, file, (long)size, 0);
}

static inline long map(size_t size, long rights, long flags, platform_file file)
{
    return call6(SYS_MMAP, 0, (long)size, rights, flags, file, 0);
}

/* The kernel's struct, and where it has the mode and the size of the file. */
enum { STAT_SIZE = 144, STAT_MODE = 24, STAT_LENGTH = 48 };

#else

/* MMAP is the old one, which takes its arguments in memory; TRUNCATE and FCNTL are of 64 bits. */
enum {
    SYS_READ = 3, SYS_WRITE = 4, SYS_OPEN = 5, SYS_CLOSE = 6, SYS_RENAME = 38, SYS_IOCTL = 54,
    SYS_MMAP = 90, SYS_LLSEEK = 140, SYS_FLOCK = 143, SYS_NANOSLEEP = 162, SYS_SIGACTION = 174,
    SYS_PREAD = 180, SYS_PWRITE = 181, SYS_TRUNCATE = 194, SYS_STAT = 195, SYS_FOLDER = 220, SYS_FCNTL = 221,
    SYS_EXIT = 252, SYS_CLOCK = 265, SYS_MEMFD = 356
};

static inline long call5(long number, long first, long second, long third, long fourth, long fifth)
{
    long result;

    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "a"(number), "b"(first), "c"(second), "d"(third), "S"(fourth), "D"(fifth)
                     : "memory");
    return result;
}

static inline long call3(long number, long first, long second, long third)
{
    return call5(number, first, second, third, 0, 0);
}

static inline long call4(long number, long first, long second, long third, long fourth)
{
    return call5(number, first, second, third, fourth, 0);
}

static inline long seek(platform_file file, int whence, uint64_t *place)
{
    return call5(SYS_LLSEEK, file, 0, 0, (long)place, whence);
}

static inline long at_offset(long number, platform_file file, const void *data, size_t size,
                      uint64_t offset)
{
    return call5(number, file, (long)data, (long)size, (long)(uint32_t)offset,
                 (long)(uint32_t)(offset >> 32));
}

static inline long resize(platform_file file, uint64_t size)
{
    return call3(SYS_TRUNCATE, file, (long)(uint32_t)size, (long)(uint32_t)(size >> 32));
}

static inline long map(size_t size, long rights, long flags, platform_file file)
{
    const long arguments[6] = {0, (long)size, rights, flags, file, 0};

    return call3(SYS_MMAP, (long)arguments, 0, 0);
}

enum { STAT_SIZE = 96, STAT_MODE = 16, STAT_LENGTH = 44 };

#endif

/* asm-generic/fcntl.h, and linux/fcntl.h of x86. */
enum {
    READ_ONLY = 0, WRITE_ONLY = 1, READ_WRITE = 2, CREATE = 0100, LARGE_FILE = 0100000,
    CLOSE_ON_EXEC = 02000000
};
enum { SEEK_TO_START = 0, SEEK_TO_END = 2 };
/* linux/mman.h: readable and writable; private, anonymous, populated; of a file, seen by others. */
enum { MAP_RIGHTS = 1 | 2, MAP_FLAGS = 0x02 | 0x20 | 0x8000, MAP_SHARED = 0x01 };
enum { MAX_ERRNO = 4095 };

/* Whether `map` failed: an address may have its highest bit set in 32-bit code. */
static inline bool is_error(long result)
{
    return (unsigned long)result >= -(unsigned long)MAX_ERRNO;
}

#endif
