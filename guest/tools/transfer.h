/* Files between the guest and the host's handler `files`: as a whole or not at all. */
#ifndef VMIB_TRANSFER_H
#define VMIB_TRANSFER_H

#include "platform.h"

/* A file of the guest, or standard input, becomes `name` on the host. Ends the program on failure. */
void put_file(const char *path, const char *name, bool replaces);

/* `name` of the host becomes a file of the guest, or goes to standard output. Likewise. */
void get_file(const char *name, const char *path);

/* A file of the guest under way: it gets its name when it is whole. */
struct own_file {
    platform_file file;
    bool is_stream; /* standard output, or a device: written in order, and as it comes */
    const char *path;
    char part[4352];
};

/* Where `path` is a folder, the file is in it, by the last part of `name`. */
void own_file_open(struct own_file *own, const char *path, const char *name);
void own_file_write(struct own_file *own, uint64_t offset, const void *data, size_t size);
void own_file_end(struct own_file *own, uint64_t size);

/* How far something is, on a terminal. */
struct progress {
    const char *name;
    uint64_t size;           /* UINT64_MAX: not known */
    uint64_t first;          /* bytes that were there already */
    uint64_t begun, shown;
    bool is_shown;
};

extern bool is_quiet;

void progress_begin(struct progress *progress, const char *name, uint64_t size, uint64_t first);
void progress_show(struct progress *progress, uint64_t done);
void progress_end(struct progress *progress);

#endif
