/*
 * vmib: what a guest asks of its host, from a shell or a script.
 *
 * One static program without a library, for Linux (linux.c) and for Windows (windows.c). The
 * requests are those of the host's ready-made handlers, by their generated headers.
 */
#include "host.h"
#include "requests.h"
#include "text.h"
#include "transfer.h"

static const char USAGE[] =
    "Usage: vmib [OPTION...] COMMAND ...\n"
    "\n"
    "  ping                          whether a host is there, and what it says of itself\n"
    "  put FILE [NAME] [--replace]   a file to the host; - is standard input\n"
    "  get NAME [FILE]               a file of the host; - is standard output\n"
    "  cat NAME                      a file of the host to standard output\n"
    "  log [TEXT...]                 to the host's log; without TEXT the lines of standard input\n"
    "  env NAME                      a value that the host hands out\n"
    "  fetch URL [FILE]              what the host may download, to standard output or a file\n"
    "  exit STATUS [REASON]          how this guest ends, for the host\n"
    "  call REQUEST METHOD [V...]    one request with up to 4 values; prints those of the answer\n"
    "\n"
    "  --by HOW            cpuid, vmcall, vmmcall, or of the PCI device driver or sysfs; without it\n"
    "                      cpuid, which is defined everywhere, and if no host answers, the device\n"
    "  --timeout SECONDS   how long one request may be told to wait; 300; 0 is without end\n"
    "  --level LEVEL       of log: " LOG_LEVELS "; info\n"
    "  --magic MAGIC       of call; 0x42494d56\n"
    "  --quiet             show no progress\n"
    "  --                  what follows is no option\n"
    "\n"
    "Exit status: 0 done, 1 the host says that it failed, 2 usage, 3 no host answered, 4 the host\n"
    "did not answer this request, 5 it still told to wait, 6 something failed in the guest.\n";

/* The command line, without what options take away. */
struct line {
    enum way way;
    uint32_t magic, timeout;
    unsigned level;
    bool replaces;
    int count;
    char **operands;
};

static _Noreturn void misused(const char *what, const char *which)
{
    host.doing = "";
    fail(EXIT_USAGE, "%s%s; vmib --help says more", what, which);
}

static uint64_t number_of(const char *text, uint64_t limit, const char *what)
{
    uint64_t number = 0;

    if (!text_number(text, &number) || number > limit) {
        misused(what, text);
    }
    return number;
}

/* How many arguments an option takes away; 0: it is none. */
static int option(struct line *line, char **arguments, int count)
{
    const char *name = arguments[0], *value = count > 1 ? arguments[1] : NULL;

    if (text_is(name, "--replace")) {
        line->replaces = true;
        return 1;
    }
    if (text_is(name, "--quiet")) {
        is_quiet = true;
        return 1;
    }
    if (text_is(name, "--help")) {
        print(platform_standard(PLATFORM_OUTPUT), "%s", USAGE);
        platform_exit(EXIT_DONE);
    }
    if (name[0] != '-' || !name[1]) {
        return 0;
    }
    if (!text_is(name, "--by") && !text_is(name, "--timeout") && !text_is(name, "--level") &&
        !text_is(name, "--magic")) {
        misused("no option: ", name);
    }
    if (!value) {
        misused("takes a value: ", name);
    }
    if (text_is(name, "--by")) {
        line->way = BY_CPUID;
        while (!text_is(value, way_name(line->way))) {
            line->way = (enum way)(line->way + 1);
            if (!way_name(line->way)) {
                misused("--by is cpuid, vmcall, vmmcall, driver or sysfs, not ", value);
            }
        }
    } else if (text_is(name, "--timeout")) {
        line->timeout = 1000 * (uint32_t)number_of(value, 1000000, "--timeout is 0 to 1000000, not ");
    } else if (text_is(name, "--level")) {
        if (!log_level(value, &line->level)) {
            misused("--level is " LOG_LEVELS ", not ", value);
        }
    } else {
        line->magic = (uint32_t)number_of(value, UINT32_MAX, "--magic has 32 bits, not ");
    }
    return 2;
}

/* Options may be before the command and behind it, up to the first operand that is none. */
static void parse(struct line *line, int count, char **arguments)
{
    bool has_command = false;
    int at = 1, taken;

    line->operands = arguments;
    line->count = 0;
    while (at < count) {
        if (text_is(arguments[at], "--")) {
            at++;
            break;
        }
        taken = option(line, arguments + at, count - at);
        if (!taken && has_command) {
            break;
        }
        if (!taken) {
            has_command = true;
            arguments[line->count++] = arguments[at];
            taken = 1;
        }
        at += taken;
    }
    for (; at < count; at++) {
        /* `put FILE --replace` is what people write, and `log -v` is a text. */
        if (line->count && text_is(arguments[0], "put") && text_is(arguments[at], "--replace")) {
            line->replaces = true;
            continue;
        }
        arguments[line->count++] = arguments[at];
    }
}

static void run_put(const struct line *line)
{
    const char *path = line->operands[1];
    const char *name = line->count > 2 ? line->operands[2] : text_last_part(path);

    if (text_is(path, "-") && line->count < 3) {
        misused("put - takes a NAME", "");
    }
    put_file(path, name, line->replaces);
}

static void run_get(const struct line *line)
{
    const char *name = line->operands[1];
    const char *path = line->count > 2 ? line->operands[2] : text_last_part(name);

    if (line->count < 3 && (!*path || text_is(path, ".") || text_is(path, "..") || text_is(path, "-"))) {
        misused("get takes a FILE here: ", name);
    }
    get_file(name, path);
}

static void run_cat(const struct line *line)
{
    get_file(line->operands[1], "-");
}

static void run_log(const struct line *line)
{
    log_words(line->level, line->count - 1, line->operands + 1);
}

static void run_env(const struct line *line)
{
    print_environment(line->operands[1]);
}

static void run_fetch(const struct line *line)
{
    fetch(line->operands[1], line->count > 2 ? line->operands[2] : "-");
}

static void run_exit(const struct line *line)
{
    const uint64_t status = number_of(line->operands[1], UINT32_MAX, "a status has 32 bits, not ");

    tell_exit((uint32_t)status, line->count > 2 ? line->operands[2] : NULL);
}

static void run_call(const struct line *line)
{
    const uint64_t request = number_of(line->operands[1], UINT16_MAX, "a request has 16 bits, not ");
    const uint64_t number = number_of(line->operands[2], UINT16_MAX, "a method has 16 bits, not ");
    vmibridge_word values[4] = {0, 0, 0, 0};

    for (int i = 3; i < line->count; i++) {
        values[i - 3] = (vmibridge_word)number_of(line->operands[i], (vmibridge_word)-1,
                                                  "no value of this program's width: ");
    }
    call(line->magic, (uint16_t)request, (uint16_t)number, values);
}

static void run_ping(const struct line *line)
{
    (void)line;
    ping();
}

/* `least` and `most`: operands behind the command. */
static const struct command {
    const char *name;
    int least, most;
    void (*run)(const struct line *line);
} COMMANDS[] = {
    {"ping", 0, 0, run_ping},   {"put", 1, 2, run_put}, {"get", 1, 2, run_get},
    {"cat", 1, 1, run_cat},     {"log", 0, 1 << 20, run_log}, {"env", 1, 1, run_env},
    {"fetch", 1, 2, run_fetch}, {"exit", 1, 2, run_exit}, {"call", 2, 6, run_call},
};

int vmib(int count, char **arguments)
{
    static char doing[4352];
    struct line line = {BY_ANY, VMIBRIDGE_MAGIC, 300000, 1, false, 0, NULL};
    struct text text = text_in(doing, sizeof doing);
    const struct command *command = NULL;

    parse(&line, count, arguments);
    if (!line.count) {
        misused("no command", "");
    }
    for (size_t i = 0; i < sizeof COMMANDS / sizeof *COMMANDS; i++) {
        if (text_is(line.operands[0], COMMANDS[i].name)) {
            command = &COMMANDS[i];
        }
    }
    if (!command) {
        misused("no command: ", line.operands[0]);
    }
    if (line.count - 1 < command->least || line.count - 1 > command->most) {
        misused("too few or too many operands: ", command->name);
    }
    text_add(&text, "%s", command->name);
    if (command->least && command->run != run_exit) {
        text_add(&text, ": %s", line.operands[1]);
    }
    if (command->run == run_put && line.count > 2) {
        text_add(&text, " as %s", line.operands[2]);
    }
    host.doing = doing;
    host.way = line.way;
    host.timeout = line.timeout;
    host_begin();
    command->run(&line);
    return EXIT_DONE;
}
