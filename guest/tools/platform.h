/*
 * What vmib needs of an operating system: linux.c has it by system calls, windows.c by kernel32.
 *
 * - Texts are UTF-8. windows.c makes UTF-16 of them and of UTF-16 them, also where that is no text
 *   (a lone surrogate), so that every file can be named.
 * - What can fail returns false, or -1. `platform_why` then says why, until the next call.
 * - There is no C library. `memcpy`, `memset` and `memcmp` are here, since compilers call them.
 */
#ifndef VMIB_PLATFORM_H
#define VMIB_PLATFORM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The program, in vmib.c. What it returns is the exit status. */
int vmib(int count, char **arguments);

_Noreturn void platform_exit(int status);

/* --- memory and time ---------------------------------------------------------------------- */

void *memcpy(void *target, const void *source, size_t size);
void *memset(void *target, int value, size_t size);
int memcmp(const void *one, const void *other, size_t size);

/* Whole pages, all there and zero; NULL: no memory. They are never given back. */
void *platform_pages(size_t size);

/* Of a clock that only goes forward. */
uint64_t platform_microseconds(void);
void platform_sleep(uint32_t milliseconds);

/* --- files -------------------------------------------------------------------------------- */

typedef intptr_t platform_file;

enum platform_stream { PLATFORM_INPUT = 0, PLATFORM_OUTPUT = 1, PLATFORM_ERRORS = 2 };

platform_file platform_standard(enum platform_stream stream);
bool platform_is_terminal(platform_file file);

enum platform_kind { PLATFORM_NONE, PLATFORM_FILE, PLATFORM_FOLDER, PLATFORM_DEVICE };

/* What has this name. A device is what is written to and not replaced: a pipe, a terminal. */
enum platform_kind platform_kind_of(const char *path);

/* A file or a device to write to as it is. */
bool platform_open_device(const char *path, platform_file *file);

/* A file to read. */
bool platform_open(const char *path, platform_file *file);

/* A file to read and write, which is made if there is none, and is locked: who has it already lets
   this fail. It keeps what is in it. */
bool platform_open_own(const char *path, platform_file *file);

/* A file without a name, which is gone when the program ends, however it ends. */
bool platform_open_unnamed(platform_file *file);

/* How many bytes it has. false: it has no size, as a pipe. */
bool platform_size(platform_file file, uint64_t *size);
bool platform_resize(platform_file file, uint64_t size);

/* Bytes that were read, at most 1 GiB: 0 at the end, -1 if it failed. */
ptrdiff_t platform_read(platform_file file, void *into, size_t size);
ptrdiff_t platform_read_at(platform_file file, uint64_t offset, void *into, size_t size);

/* All of it, or it failed. */
bool platform_write(platform_file file, const void *data, size_t size);
bool platform_write_at(platform_file file, uint64_t offset, const void *data, size_t size);

void platform_close(platform_file file);

/* Give an open file another name in its folder, in the place of what has it, and close the file. */
bool platform_give_name(platform_file file, const char *from, const char *to);

/* What separates the parts of a path, beside `/`; 0: nothing. */
extern const char platform_separator;

/* Why the last call failed: a text for a message. */
const char *platform_why(void);

/* --- instructions ------------------------------------------------------------------------- */

/* From now on an instruction that is undefined or faults ends the program by `told`, which does not
   return. */
void platform_on_fault(void (*told)(void));

/* --- the PCI device --------------------------------------------------------------------------- */

struct text;
struct vmibridge_slot;

enum platform_way { PLATFORM_DRIVER, PLATFORM_SYSFS };

/* Take a slot, which is kept to the end of the program; its buffers are in the slot. If it failed, `why` has
   the reason, and is left alone where there is no such device. */
bool platform_open_slot(enum platform_way way, struct vmibridge_slot *slot, struct text *why);

#endif
