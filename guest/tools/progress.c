#include "text.h"
#include "transfer.h"

bool is_quiet;

enum { INTERVAL = 200000 }; /* microseconds */

void progress_begin(struct progress *progress, const char *name, uint64_t size, uint64_t first)
{
    progress->name = name;
    progress->size = size;
    progress->first = first;
    progress->begun = progress->shown = platform_microseconds();
    progress->is_shown = false;
}

/* Mebibytes with one digit behind the point. */
static void add_size(struct text *text, uint64_t bytes)
{
    uint64_t tenths = bytes / 1024 * 10 / 1024;
    const uint32_t digit = divide(&tenths, 10);

    text_add(text, "%l.%u MiB", tenths, (unsigned)digit);
}

void progress_show(struct progress *progress, uint64_t done)
{
    const platform_file errors = platform_standard(PLATFORM_ERRORS);
    const uint64_t now = platform_microseconds();
    uint64_t milliseconds, rate;
    char line[256];
    struct text text;

    if (is_quiet || now - progress->shown < INTERVAL || !platform_is_terminal(errors)) {
        return;
    }
    progress->shown = now;
    milliseconds = now - progress->begun;
    divide(&milliseconds, 1000);
    rate = (done - progress->first) * 1000;
    divide(&rate, milliseconds ? (uint32_t)milliseconds : 1);
    text = text_in(line, sizeof line);
    add_size(&text, done);
    if (progress->size != UINT64_MAX) {
        text_add(&text, " of ");
        add_size(&text, progress->size);
    }
    text_add(&text, ", ");
    add_size(&text, rate);
    progress->is_shown = true;
    /* To the end of the line nothing else is left: CSI K. */
    print(errors, "\r%s: %s/s\033[K", progress->name, line);
}

void progress_end(struct progress *progress)
{
    if (progress->is_shown) {
        print(platform_standard(PLATFORM_ERRORS), "\r\033[K");
    }
}
