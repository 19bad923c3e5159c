/*
 * Both directions go in pieces, each of which may be sent again, and end with the SHA-256 of what
 * this end has. A program that was killed goes on where it was:
 *
 *   put   the host has what came; LENGTH says how much, and the same is read here for the hash
 *   get   the guest has what came, beside the file, in FILE.vmib-part
 *
 * What was there may be of another file by now. Then the hashes differ at the end, and everything
 * is sent once more.
 */
#include "transfer.h"

#include "handlers/files.h"
#include "host.h"
#include "numbers.h"
#include "sha256.h"
#include "text.h"

/* Bytes of a piece, unless the host takes less; no more than PUT and GET carry, and a slot of the device has
   room for beside the other values of the request. */
static uint32_t piece_size(void)
{
    const struct vmibridge_caller *caller = by();
    uint32_t limit, size = VMIBRIDGE_FILES_PUT_DATA_LIMIT;

    if (caller->room) {
        size = (uint32_t)(caller->room_size - sizeof ((struct vmibridge_method_call *)0)->block);
    }
    if (vmibridge_limit_by(caller, VMIBRIDGE_LIMIT_ACCESS, &limit) && limit && limit < size) {
        size = limit;
    }
    return size;
}

static void *pages(size_t size)
{
    void *found = platform_pages(size);

    if (!found) {
        fail(EXIT_LOCAL, "no memory");
    }
    return found;
}

/* Fill a buffer as far as the file goes. */
static size_t read_whole(platform_file file, const char *path, uint64_t offset, void *into,
                         size_t size)
{
    size_t done = 0;
    ptrdiff_t count;

    while (done < size) {
        count = platform_read_at(file, offset + done, (char *)into + done, size - done);
        if (count < 0) {
            fail(EXIT_LOCAL, "%s: %s", path, platform_why());
        }
        if (!count) {
            break;
        }
        done += (size_t)count;
    }
    return done;
}

/* Hash the first bytes of a file; returns how many were there. */
static uint64_t hash_first(struct sha256 *hash, platform_file file, const char *path, uint64_t size,
                           void *piece, uint32_t room)
{
    uint64_t offset = 0;
    size_t count;

    while (offset < size) {
        count = read_whole(file, path, offset, piece,
                           size - offset < room ? (size_t)(size - offset) : room);
        if (!count) {
            break;
        }
        sha256_add(hash, piece, count);
        offset += count;
    }
    return offset;
}

/* --- put ---------------------------------------------------------------------------------- */

/* A file that has a size. What has none, and what says 0 as files of /proc do, is read first. */
static void open_input(const char *path, platform_file *file, uint64_t *size, void *piece,
                       uint32_t room)
{
    platform_file from = platform_standard(PLATFORM_INPUT);
    ptrdiff_t count;

    if (!text_is(path, "-")) {
        if (!platform_open(path, &from) || platform_kind_of(path) == PLATFORM_FOLDER) {
            fail(EXIT_LOCAL, "%s: %s", path,
                 platform_kind_of(path) == PLATFORM_FOLDER ? "it is a folder" : platform_why());
        }
        if (platform_size(from, size) && *size) {
            *file = from;
            return;
        }
    }
    *size = 0;
    if (!platform_open_unnamed(file)) {
        fail(EXIT_LOCAL, "%s: cannot be kept: %s", path, platform_why());
    }
    while ((count = platform_read(from, piece, room)) > 0) {
        if (!platform_write_at(*file, *size, piece, (size_t)count)) {
            fail(EXIT_LOCAL, "%s: cannot be kept: %s", path, platform_why());
        }
        *size += (uint64_t)count;
    }
    if (count < 0) {
        fail(EXIT_LOCAL, "%s: %s", path, platform_why());
    }
}

static vmibridge_status put_once(const char *path, platform_file file, uint64_t size,
                                 const char *name, vmibridge_files_mode mode, void *piece,
                                 uint32_t room, bool *is_resumed)
{
    unsigned char digest[SHA256_SIZE];
    uint64_t offset = 0;
    uint32_t handle, taken;
    struct progress progress;
    struct sha256 hash;
    size_t count;

    expect(vmibridge_files_begin(by(), name, size, mode | VMIBRIDGE_FILES_MODE_HASH, &handle));
    expect(vmibridge_files_length(by(), handle, &offset));
    *is_resumed = offset != 0;
    sha256_begin(&hash);
    offset = hash_first(&hash, file, path, offset, piece, room);
    progress_begin(&progress, name, size, offset);
    while (offset < size) {
        count = read_whole(file, path, offset, piece,
                           size - offset < room ? (size_t)(size - offset) : room);
        if (!count) {
            vmibridge_files_abort(by(), handle);
            fail(EXIT_LOCAL, "%s: became shorter meanwhile", path);
        }
        expect(vmibridge_files_put(by(), handle, offset, piece, count, &taken));
        sha256_add(&hash, piece, count);
        offset += count;
        progress_show(&progress, offset);
    }
    progress_end(&progress);
    sha256_end(&hash, digest);
    return vmibridge_files_end(by(), handle, digest, sizeof digest);
}

void put_file(const char *path, const char *name, bool replaces)
{
    const vmibridge_files_mode mode =
        replaces ? VMIBRIDGE_FILES_MODE_REPLACE : VMIBRIDGE_FILES_MODE_CREATE;
    const uint32_t room = piece_size();
    void *piece = pages(room);
    vmibridge_status status;
    platform_file file;
    uint64_t size;
    bool is_resumed;

    open_input(path, &file, &size, piece, room);
    status = put_once(path, file, size, name, mode, piece, room, &is_resumed);
    if (is_resumed && error_of(status) == NUMBER_EBADMSG) {
        /* The host had part of another file of this name and size. It is gone now. */
        status = put_once(path, file, size, name, mode, piece, room, &is_resumed);
    }
    expect(status);
}

/* --- get ---------------------------------------------------------------------------------- */

/* Begin to get a file; returns its size. */
static uint64_t begin_get(const char *name, uint32_t *handle)
{
    const vmibridge_files_mode mode = VMIBRIDGE_FILES_MODE_READ | VMIBRIDGE_FILES_MODE_HASH;
    uint64_t size;

    /* A program before us may have had the same address space, and been killed: its transfer would
       be ours, with the file as it was then. So the first one is ended. */
    expect(vmibridge_files_begin(by(), name, 0, mode, handle));
    expect(vmibridge_files_abort(by(), *handle));
    expect(vmibridge_files_begin(by(), name, 0, mode, handle));
    expect(vmibridge_files_length(by(), *handle, &size));
    return size;
}

/* From an offset on; what is before it is in the guest already. */
static vmibridge_status get_rest(const char *name, struct own_file *own, uint32_t handle,
                                 uint64_t size, uint64_t offset, void *piece, uint32_t room)
{
    unsigned char digest[SHA256_SIZE];
    struct progress progress;
    struct sha256 hash;
    uint32_t count;

    sha256_begin(&hash);
    offset = hash_first(&hash, own->file, own->part, offset, piece, room);
    progress_begin(&progress, name, size, offset);
    while (offset < size) {
        expect(vmibridge_files_get(by(), handle, offset, piece, room, &count));
        if (!count || count > room || count > size - offset) {
            fail(EXIT_FAILED, "the host has put %u bytes at %l of a file that has %l", count,
                 offset, size);
        }
        own_file_write(own, offset, piece, count);
        sha256_add(&hash, piece, count);
        offset += count;
        progress_show(&progress, offset);
    }
    progress_end(&progress);
    sha256_end(&hash, digest);
    return vmibridge_files_end(by(), handle, digest, sizeof digest);
}

void get_file(const char *name, const char *path)
{
    static struct own_file own;
    const uint32_t room = piece_size();
    void *piece = pages(room);
    vmibridge_status status;
    uint64_t size, first = 0;
    uint32_t handle;

    /* Before there is a file here: the host may have none. */
    size = begin_get(name, &handle);
    own_file_open(&own, path, name);
    if (!own.is_stream && !platform_size(own.file, &first)) {
        fail(EXIT_LOCAL, "%s: %s", own.part, platform_why());
    }
    first = first > size ? 0 : first;
    status = get_rest(name, &own, handle, size, first, piece, room);
    if (first && error_of(status) == NUMBER_EBADMSG) {
        /* What was there was of another file. */
        size = begin_get(name, &handle);
        status = get_rest(name, &own, handle, size, 0, piece, room);
    }
    expect(status);
    own_file_end(&own, size);
}
