/*
 * The platform layer for Windows, x64 and x86: kernel32 alone, without a C library.
 *
 * Paths and arguments are UTF-16 here and UTF-8 elsewhere, converted by hand: a lone surrogate, which
 * a name of Windows may have, becomes three bytes and comes back, where MultiByteToWideChar would
 * make another name of it.
 */
#include "platform.h"
#include "text.h"

#define WIN32_LEAN_AND_MEAN
#include <windows.h>

enum { MAX_PATH_UNITS = 32768, MAX_ARGUMENTS = 4096, MAX_AT_ONCE = 1 << 30 };

const char platform_separator = '\\';

static DWORD error_number;

static bool done(bool is_done)
{
    if (!is_done) {
        error_number = GetLastError();
    }
    return is_done;
}

/* --- UTF-16 and UTF-8 ------------------------------------------------------------------------ */

/* Returns how many units that is, without the NUL; 0: it has no room. */
static size_t to_wide(const char *text, WCHAR *wide, size_t room)
{
    const unsigned char *at = (const unsigned char *)text;
    size_t length = 0;
    uint32_t point;
    unsigned more;

    while (*at) {
        point = *at++;
        more = point >= 0xf0 ? 3 : point >= 0xe0 ? 2 : point >= 0xc0 ? 1 : 0;
        point &= more ? 0x3fu >> more : 0x7fu;
        for (; more && (*at & 0xc0) == 0x80; more--) {
            point = point << 6 | (*at++ & 0x3fu);
        }
        if (length + 3 > room) {
            return 0;
        }
        if (point >= 0x10000) {
            wide[length++] = (WCHAR)(0xd800 + ((point - 0x10000) >> 10 & 0x3ff));
            wide[length++] = (WCHAR)(0xdc00 + (point & 0x3ff));
        } else {
            wide[length++] = (WCHAR)point;
        }
    }
    wide[length] = 0;
    return length;
}

/* Bytes that this takes, without a NUL; they are put at `text`, where that is not NULL. */
static size_t from_wide(const WCHAR *wide, size_t units, char *text)
{
    unsigned char *at = (unsigned char *)text;
    size_t length = 0, size;
    uint32_t point;

    for (size_t i = 0; i < units; i++) {
        point = wide[i];
        if (point >> 10 == 0xd800 >> 10 && i + 1 < units && wide[i + 1] >> 10 == 0xdc00 >> 10) {
            point = 0x10000 + ((point & 0x3ff) << 10 | (wide[++i] & 0x3ffu));
        }
        size = point < 0x80 ? 1 : point < 0x800 ? 2 : point < 0x10000 ? 3 : 4;
        if (at) {
            for (size_t n = size - 1; n; n--) {
                at[length + n] = (unsigned char)(0x80 | (point & 0x3f));
                point >>= 6;
            }
            at[length] = (unsigned char)(size == 1 ? point : (0xf00u >> size & 0xf0u) | point);
        }
        length += size;
    }
    return length;
}

static const WCHAR *path_of(const char *path)
{
    static WCHAR wide[2][MAX_PATH_UNITS];
    static unsigned turn;

    turn ^= 1;
    if (!to_wide(path, wide[turn], MAX_PATH_UNITS)) {
        wide[turn][0] = 0;
    }
    return wide[turn];
}

/* --- the program ----------------------------------------------------------------------------- */

/*
 * Split the command line as Microsoft's C library does ("Parsing C command-line arguments"): 2n
 * backslashes before a quotation mark are n of them, 2n+1 are n and the mark; two marks within
 * marks are one. The first argument, the program, knows marks alone.
 */
static int split(WCHAR *line, WCHAR **arguments)
{
    WCHAR *to = line;
    int count = 0;
    bool is_quoted;
    size_t backslashes;

    while (count < MAX_ARGUMENTS) {
        while (*line == ' ' || *line == '\t') {
            line++;
        }
        if (!*line) {
            break;
        }
        arguments[count++] = to;
        is_quoted = false;
        while (*line && (is_quoted || (*line != ' ' && *line != '\t'))) {
            for (backslashes = 0; count > 1 && *line == '\\'; line++) {
                backslashes++;
            }
            if (*line == '"') {
                for (size_t n = backslashes / 2; n; n--) {
                    *to++ = '\\';
                }
                if (backslashes % 2) {
                    *to++ = *line++;
                } else if (is_quoted && count > 1 && line[1] == '"') {
                    *to++ = *line;
                    line += 2;
                } else {
                    is_quoted = !is_quoted;
                    line++;
                }
                continue;
            }
            for (; backslashes; backslashes--) {
                *to++ = '\\';
            }
            if (*line && (is_quoted || (*line != ' ' && *line != '\t'))) {
                *to++ = *line++;
            }
        }
        if (*line) {
            line++;
        }
        *to++ = 0;
    }
    return count;
}

/* Where the program begins, instead of a C library's start. */
void vmib_begin(void);
void vmib_begin(void)
{
    static WCHAR line[MAX_PATH_UNITS];
    static WCHAR *wide[MAX_ARGUMENTS];
    static char *arguments[MAX_ARGUMENTS + 1];
    const WCHAR *given = GetCommandLineW();
    size_t units, size = 0;
    char *room;
    int count, i;

    for (units = 0; given[units] && units + 1 < MAX_PATH_UNITS; units++) {
        line[units] = given[units];
    }
    count = split(line, wide);
    for (i = 0; i < count; i++) {
        size += from_wide(wide[i], (size_t)lstrlenW(wide[i]), NULL) + 1;
    }
    room = platform_pages(size + 1);
    for (i = 0; room && i < count; i++) {
        arguments[i] = room;
        room += from_wide(wide[i], (size_t)lstrlenW(wide[i]), room);
        *room++ = 0;
    }
    platform_exit(room ? vmib(count, arguments) : 6);
}

void platform_exit(int status)
{
    ExitProcess((UINT)status);
}

void *platform_pages(size_t size)
{
    char *pages = VirtualAlloc(NULL, size, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);

    for (size_t at = 0; pages && at < size; at += 4096) {
        *(volatile char *)(pages + at) = 0;
    }
    return pages;
}

uint64_t platform_microseconds(void)
{
    LARGE_INTEGER ticks, frequency;
    uint64_t seconds;
    uint32_t rest, rate;

    QueryPerformanceCounter(&ticks);
    QueryPerformanceFrequency(&frequency);
    /* A rate that has more than 32 bits is halved until it has not, and so are the ticks. */
    while (frequency.QuadPart >> 32) {
        frequency.QuadPart >>= 1;
        ticks.QuadPart >>= 1;
    }
    rate = (uint32_t)frequency.QuadPart;
    seconds = (uint64_t)ticks.QuadPart;
    rest = divide(&seconds, rate);
    uint64_t part = (uint64_t)rest * 1000000;
    divide(&part, rate);
    return seconds * 1000000 + part;
}

void platform_sleep(uint32_t milliseconds)
{
    Sleep(milliseconds);
}

/* --- files ----------------------------------------------------------------------------------- */

platform_file platform_standard(enum platform_stream stream)
{
    static const DWORD NAMES[] = {STD_INPUT_HANDLE, STD_OUTPUT_HANDLE, STD_ERROR_HANDLE};

    return (platform_file)GetStdHandle(NAMES[stream]);
}

bool platform_is_terminal(platform_file file)
{
    DWORD mode;

    return GetConsoleMode((HANDLE)file, &mode);
}

static bool opened(const char *path, DWORD access, DWORD share, DWORD how, DWORD flags,
                   platform_file *file)
{
    const HANDLE handle = CreateFileW(path_of(path), access, share, NULL, how, flags, NULL);

    *file = (platform_file)handle;
    return done(handle != INVALID_HANDLE_VALUE);
}

enum platform_kind platform_kind_of(const char *path)
{
    const DWORD attributes = GetFileAttributesW(path_of(path));
    platform_file file;
    DWORD type;

    if (attributes == INVALID_FILE_ATTRIBUTES) {
        return PLATFORM_NONE;
    }
    if (attributes & FILE_ATTRIBUTE_DIRECTORY) {
        return PLATFORM_FOLDER;
    }
    if (!opened(path, 0, FILE_SHARE_READ | FILE_SHARE_WRITE, OPEN_EXISTING, 0, &file)) {
        return PLATFORM_FILE;
    }
    type = GetFileType((HANDLE)file);
    platform_close(file);
    return type == FILE_TYPE_DISK ? PLATFORM_FILE : PLATFORM_DEVICE;
}

bool platform_open_device(const char *path, platform_file *file)
{
    return opened(path, GENERIC_WRITE, FILE_SHARE_READ | FILE_SHARE_WRITE, OPEN_EXISTING, 0, file);
}

bool platform_open(const char *path, platform_file *file)
{
    return opened(path, GENERIC_READ, FILE_SHARE_READ | FILE_SHARE_WRITE | FILE_SHARE_DELETE,
                  OPEN_EXISTING, FILE_FLAG_SEQUENTIAL_SCAN, file);
}

bool platform_open_own(const char *path, platform_file *file)
{
    return opened(path, GENERIC_READ | GENERIC_WRITE | DELETE, 0, OPEN_ALWAYS, FILE_ATTRIBUTE_NORMAL,
                  file);
}

bool platform_open_unnamed(platform_file *file)
{
    WCHAR folder[MAX_PATH + 1], path[MAX_PATH + 1];
    HANDLE handle;

    if (!done(GetTempPathW(MAX_PATH, folder)) || !done(GetTempFileNameW(folder, L"vmi", 0, path))) {
        return false;
    }
    handle = CreateFileW(path, GENERIC_READ | GENERIC_WRITE, 0, NULL, CREATE_ALWAYS,
                         FILE_ATTRIBUTE_TEMPORARY | FILE_FLAG_DELETE_ON_CLOSE, NULL);
    *file = (platform_file)handle;
    return done(handle != INVALID_HANDLE_VALUE);
}

bool platform_size(platform_file file, uint64_t *size)
{
    LARGE_INTEGER found;

    if (GetFileType((HANDLE)file) != FILE_TYPE_DISK) {
        error_number = ERROR_BAD_FILE_TYPE;
        return false;
    }
    if (!done(GetFileSizeEx((HANDLE)file, &found))) {
        return false;
    }
    *size = (uint64_t)found.QuadPart;
    return true;
}

bool platform_resize(platform_file file, uint64_t size)
{
    LARGE_INTEGER place;

    place.QuadPart = (LONGLONG)size;
    return done(SetFilePointerEx((HANDLE)file, place, NULL, FILE_BEGIN)) &&
           done(SetEndOfFile((HANDLE)file));
}

static ptrdiff_t read_some(platform_file file, OVERLAPPED *place, void *into, size_t size)
{
    DWORD count;

    size = size > MAX_AT_ONCE ? MAX_AT_ONCE : size;
    if (ReadFile((HANDLE)file, into, (DWORD)size, &count, place)) {
        return (ptrdiff_t)count;
    }
    done(false);
    /* The ends of a file that is read at an offset, and of a pipe. */
    return error_number == ERROR_HANDLE_EOF || error_number == ERROR_BROKEN_PIPE ? 0 : -1;
}

static OVERLAPPED at(uint64_t offset)
{
    OVERLAPPED place;

    memset(&place, 0, sizeof place);
    place.Offset = (DWORD)offset;
    place.OffsetHigh = (DWORD)(offset >> 32);
    return place;
}

ptrdiff_t platform_read(platform_file file, void *into, size_t size)
{
    return read_some(file, NULL, into, size);
}

ptrdiff_t platform_read_at(platform_file file, uint64_t offset, void *into, size_t size)
{
    OVERLAPPED place = at(offset);

    return read_some(file, &place, into, size);
}

/* A console takes UTF-16, whatever its code page is. */
static bool write_console(platform_file file, const char *data, size_t size)
{
    static WCHAR wide[4096];
    static char part[1024];
    size_t count;
    DWORD written;

    while (size) {
        count = size < sizeof part - 1 ? size : sizeof part - 1;
        /* No character is cut in two. */
        while (count < size && count > 1 && ((unsigned char)data[count] & 0xc0) == 0x80) {
            count--;
        }
        memcpy(part, data, count);
        part[count] = 0;
        if (!done(WriteConsoleW((HANDLE)file, wide,
                                (DWORD)to_wide(part, wide, sizeof wide / sizeof *wide), &written,
                                NULL))) {
            return false;
        }
        data += count;
        size -= count;
    }
    return true;
}

bool platform_write(platform_file file, const void *data, size_t size)
{
    const char *at = data;
    DWORD count;

    if (platform_is_terminal(file)) {
        return write_console(file, data, size);
    }
    while (size) {
        if (!done(WriteFile((HANDLE)file, at, (DWORD)(size > MAX_AT_ONCE ? MAX_AT_ONCE : size),
                            &count, NULL))) {
            return false;
        }
        at += count;
        size -= count;
    }
    return true;
}

bool platform_write_at(platform_file file, uint64_t offset, const void *data, size_t size)
{
    const char *from = data;
    OVERLAPPED place;
    DWORD count;

    while (size) {
        place = at(offset);
        if (!done(WriteFile((HANDLE)file, from, (DWORD)(size > MAX_AT_ONCE ? MAX_AT_ONCE : size),
                            &count, &place))) {
            return false;
        }
        from += count;
        offset += count;
        size -= count;
    }
    return true;
}

void platform_close(platform_file file)
{
    CloseHandle((HANDLE)file);
}

bool platform_give_name(platform_file file, const char *from, const char *to)
{
    /* Nobody else may have it open, so it is closed before. */
    platform_close(file);
    return done(MoveFileExW(path_of(from), path_of(to), MOVEFILE_REPLACE_EXISTING));
}

const char *platform_why(void)
{
    static WCHAR wide[512];
    static char told[2048];
    struct text text = text_in(told, sizeof told);
    DWORD units;

    if (error_number == ERROR_SHARING_VIOLATION) {
        return "another program is at it";
    }
    units = FormatMessageW(FORMAT_MESSAGE_FROM_SYSTEM | FORMAT_MESSAGE_IGNORE_INSERTS, NULL,
                           error_number, 0, wide, sizeof wide / sizeof *wide, NULL);
    while (units && (wide[units - 1] <= ' ' || wide[units - 1] == '.')) {
        units--;
    }
    if (!units) {
        text_add(&text, "error %u", (unsigned)error_number);
        return told;
    }
    told[from_wide(wide, units, told)] = 0;
    return told;
}

/* --- the PCI device -------------------------------------------------------------------------- */

bool platform_open_slot(enum platform_way way, struct vmibridge_slot *slot, struct text *why)
{
    /* There is no driver that would hand slots to programs. */
    (void)way, (void)slot, (void)why;
    return false;
}

/* --- instructions ---------------------------------------------------------------------------- */

static void (*on_fault)(void);

static LONG WINAPI fault(EXCEPTION_POINTERS *unused)
{
    (void)unused;
    on_fault();
    return EXCEPTION_EXECUTE_HANDLER;
}

void platform_on_fault(void (*told)(void))
{
    on_fault = told;
    SetUnhandledExceptionFilter(fault);
}
