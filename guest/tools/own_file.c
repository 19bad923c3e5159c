#include "host.h"
#include "text.h"
#include "transfer.h"

void own_file_open(struct own_file *own, const char *path, const char *name)
{
    static char in_folder[4096];
    struct text text = text_in(in_folder, sizeof in_folder);

    own->is_stream = text_is(path, "-");
    own->path = path;
    if (own->is_stream) {
        own->file = platform_standard(PLATFORM_OUTPUT);
        return;
    }
    switch (platform_kind_of(path)) {
    case PLATFORM_DEVICE:
        own->is_stream = true;
        if (!platform_open_device(path, &own->file)) {
            fail(EXIT_LOCAL, "%s: %s", path, platform_why());
        }
        return;
    case PLATFORM_FOLDER:
        name = text_last_part(name);
        if (!*name || text_is(name, ".") || text_is(name, "..")) {
            fail(EXIT_USAGE, "name a file: %s is a folder", path);
        }
        text_add(&text, "%s/%s", path, name);
        own->path = in_folder;
        break;
    default:
        break;
    }
    text = text_in(own->part, sizeof own->part);
    text_add(&text, "%s.vmib-part", own->path);
    if (text.length + 1 == text.size) {
        fail(EXIT_LOCAL, "%s: the name is too long", own->path);
    }
    if (!platform_open_own(own->part, &own->file)) {
        fail(EXIT_LOCAL, "%s: %s", own->part, platform_why());
    }
}

void own_file_write(struct own_file *own, uint64_t offset, const void *data, size_t size)
{
    const bool done = own->is_stream ? platform_write(own->file, data, size)
                                     : platform_write_at(own->file, offset, data, size);

    if (!done) {
        fail(EXIT_LOCAL, "%s: %s", own->is_stream ? own->path : own->part, platform_why());
    }
}

void own_file_end(struct own_file *own, uint64_t size)
{
    if (own->is_stream) {
        return;
    }
    if (!platform_resize(own->file, size) || !platform_give_name(own->file, own->part, own->path)) {
        fail(EXIT_LOCAL, "%s: %s", own->path, platform_why());
    }
}
