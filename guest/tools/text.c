#include "text.h"

struct text text_in(char *start, size_t size)
{
    struct text text = {start, size, 0};

    start[0] = 0;
    return text;
}

static void add_char(struct text *text, char character)
{
    if (text->length + 1 < text->size) {
        text->start[text->length++] = character;
        text->start[text->length] = 0;
    }
}

static void add_number(struct text *text, uint64_t value, uint32_t base)
{
    char digits[24];
    size_t count = 0;

    do {
        digits[count++] = "0123456789abcdef"[divide(&value, base)];
    } while (value);
    while (count) {
        add_char(text, digits[--count]);
    }
}

void text_add_list(struct text *text, const char *form, va_list list)
{
    const char *part;

    for (; *form; form++) {
        if (*form != '%') {
            add_char(text, *form);
            continue;
        }
        switch (*++form) {
        case 's':
            for (part = va_arg(list, const char *); *part; part++) {
                add_char(text, *part);
            }
            break;
        case 'u':
            add_number(text, va_arg(list, unsigned), 10);
            break;
        case 'l':
            add_number(text, va_arg(list, uint64_t), 10);
            break;
        case 'x':
            add_number(text, va_arg(list, uint64_t), 16);
            break;
        default:
            add_char(text, *form);
            break;
        }
    }
}

void text_add(struct text *text, const char *form, ...)
{
    va_list list;

    va_start(list, form);
    text_add_list(text, form, list);
    va_end(list);
}

void print(platform_file file, const char *form, ...)
{
    static char line[8192];
    struct text text = text_in(line, sizeof line);
    va_list list;

    va_start(list, form);
    text_add_list(&text, form, list);
    va_end(list);
    /* There is no one to say to that this cannot be said. */
    (void)platform_write(file, line, text.length);
}

size_t text_length(const char *text)
{
    size_t length = 0;

    while (text[length]) {
        length++;
    }
    return length;
}

bool text_is(const char *one, const char *other)
{
    while (*one && *one == *other) {
        one++;
        other++;
    }
    return *one == *other;
}

const char *text_last_part(const char *path)
{
    const char *last = path;

    for (; *path; path++) {
        if (*path == '/' || (platform_separator && (*path == platform_separator || *path == ':'))) {
            last = path + 1;
        }
    }
    return last;
}

bool text_number(const char *text, uint64_t *number)
{
    const bool is_hex = text[0] == '0' && (text[1] == 'x' || text[1] == 'X');
    const unsigned base = is_hex ? 16 : 10;
    uint64_t value = 0, limit;
    unsigned digit;

    text += is_hex ? 2 : 0;
    if (!*text) {
        return false;
    }
    for (; *text; text++) {
        if (*text >= '0' && *text <= '9') {
            digit = (unsigned)(*text - '0');
        } else if ((*text | 0x20) >= 'a' && (*text | 0x20) <= 'f') {
            digit = (unsigned)((*text | 0x20) - 'a') + 10;
        } else {
            return false;
        }
        limit = UINT64_MAX - digit;
        divide(&limit, base);
        if (digit >= base || value > limit) {
            return false;
        }
        value = value * base + digit;
    }
    *number = value;
    return true;
}

uint32_t divide(uint64_t *value, uint32_t by)
{
    const uint32_t low = (uint32_t)*value, high = (uint32_t)(*value >> 32);
    uint32_t quotient, rest;

    /* What is left of the upper half is less than the divisor, so the quotient fits. */
    __asm__("divl %4" : "=a"(quotient), "=d"(rest) : "0"(low), "1"(high % by), "r"(by) : "cc");
    *value = (uint64_t)(high / by) << 32 | quotient;
    return rest;
}
