/*
 * The QEMU TCG plugin of vmibridge: traps CPUID, VMCALL and VMMCALL and asks a host.
 *
 * Each vCPU has a connection of its own to the host's unix socket, and its thread does all that is
 * on it: it sends a trap, serves the host's accesses to guest memory, and goes on with the answer.
 * Nothing is shared between vCPUs but the settings, which do not change. docs/qemu-plugin.md has
 * the arguments and the protocol.
 *
 * | file | holds |
 * |---|---|
 * | plugin.c | arguments, and what QEMU calls first |
 * | sites.c | translation: which instructions trap |
 * | trap.c | a trap, from the callback to the instruction behind |
 * | inside.c | what the plugin API lacks, by QEMU's own functions |
 * | registers.c | registers, by the plugin API |
 * | host.c | the connection, bounded in time |
 *
 * Needs QEMU 11.1 (plugin API 7): before, a plugin could not set the program counter.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "plugin.h"

#define EXPORT __attribute__((visibility("default")))
#define DAY 86400.0
EXPORT int qemu_plugin_version = API;

struct settings settings = {.kinds = 1 << CPUID | 1 << VMCALL | 1 << VMMCALL,
                            .patience = 30, .compat = 0x23, .ram = -1, .inside = true};
struct vcpu vcpus[MAX_VCPUS];

void say(const char *format, const char *what)
{
    char line[768];
    int length = snprintf(line, sizeof line, "vmibridge plugin: ");
    snprintf(line + length, sizeof line - (size_t)length, format, what);
    /* In one call: QEMU and other vCPUs write there, too. */
    fprintf(stderr, "%s\n", line);
}

double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static void on_vcpu(unsigned number, void *unused)
{
    (void)unused;
    if (number >= MAX_VCPUS) {
        say("%s", "has more vCPUs than this plugin serves; the others run natively");
        return;
    }
    struct vcpu *vcpu = &vcpus[number];
    /* A vCPU that was taken out and put in again is another one. */
    *vcpu = (struct vcpu){.number = number, .fd = -1};
    if (!find_registers(vcpu)) {
        return;
    }
    vcpu->memory = g_byte_array_new();
    vcpu->bytes = g_byte_array_new();
    connected(vcpu);
}

/* --- arguments --------------------------------------------------------------------- */

static bool wrong(const char *argument)
{
    say("wrong argument: %s", argument);
    return false;
}

static bool is_named(const char *argument, const char *name)
{
    size_t length = strlen(name);
    return !strncmp(argument, name, length) && argument[length] == '=';
}

static bool take_switch(const char *argument, const char *value, bool *into)
{
    *into = !strcmp(value, "on");
    return *into || !strcmp(value, "off") || wrong(argument);
}

static bool take_number(const char *argument, const char *value, uint64_t most, unsigned *into)
{
    char *end;
    unsigned long long number = strtoull(value, &end, 0);
    if (end == value || *end || number > most || strchr(value, '-')) {
        return wrong(argument);
    }
    *into = (unsigned)number;
    return true;
}

static bool take_absent(const char *argument, const char *value)
{
    static const char *const WORDS[] = {"native", "skip", "wait"};
    for (unsigned i = 0; i < 3; i++) {
        if (!strcmp(value, WORDS[i])) {
            settings.absent = (enum absent)i;
            return true;
        }
    }
    return wrong(argument);
}

static bool take_patience(const char *argument, const char *value)
{
    char *end;
    settings.patience = strtod(value, &end);
    /* So that a sum of moments cannot overflow, and nan is refused. */
    bool is_fine = end != value && !*end && settings.patience >= 0 && settings.patience <= DAY;
    return is_fine || wrong(argument);
}

static bool take_socket(const char *argument, const char *value)
{
    if (strlen(value) >= sizeof settings.path) {
        return wrong(argument);
    }
    strcpy(settings.path, value);
    return true;
}

static bool take_ram(const char *value)
{
    if (settings.ram >= 0) {
        close(settings.ram);
    }
    settings.ram = open(value, O_RDONLY | O_CLOEXEC);
    if (settings.ram < 0) {
        say("cannot open the file of ram=%s", value);
    }
    return settings.ram >= 0;
}

static bool take_magic(const char *argument, const char *value)
{
    if (settings.magic_count == MAX_MAGICS) {
        return wrong(argument);
    }
    return take_number(argument, value, UINT32_MAX, &settings.magics[settings.magic_count++]);
}

static bool take_kind(const char *argument, const char *value, unsigned kind)
{
    bool is_on;
    if (!take_switch(argument, value, &is_on)) {
        return false;
    }
    settings.kinds &= ~(1u << kind);
    settings.kinds |= (unsigned)is_on << kind;
    return true;
}

static bool take(const char *argument)
{
    const char *value = strchr(argument, '=');
    if (!value++) {
        return wrong(argument);
    }
    return is_named(argument, "socket") ? take_socket(argument, value)
         : is_named(argument, "ram") ? take_ram(value)
         : is_named(argument, "magic") ? take_magic(argument, value)
         : is_named(argument, "cpuid") ? take_kind(argument, value, CPUID)
         : is_named(argument, "vmcall") ? take_kind(argument, value, VMCALL)
         : is_named(argument, "vmmcall") ? take_kind(argument, value, VMMCALL)
         : is_named(argument, "absent") ? take_absent(argument, value)
         : is_named(argument, "patience") ? take_patience(argument, value)
         : is_named(argument, "compat") ? take_number(argument, value, 0xFFFF, &settings.compat)
         : is_named(argument, "inside") ? take_switch(argument, value, &settings.inside)
         : is_named(argument, "verbose") ? take_switch(argument, value, &settings.verbose)
         : wrong(argument);
}

static bool fits(const qemu_info_t *info)
{
    if (info->version.cur < API || info->version.min > API || !qemu_plugin_set_pc) {
        fprintf(stderr,
                "vmibridge plugin: this QEMU has plugin API %d to %d, and the plugin needs %d"
                " (QEMU 11.1 or later)\n",
                info->version.min, info->version.cur, API);
        return false;
    }
    const char *target = info->target_name;
    if (!info->system_emulation || (strcmp(target, "x86_64") && strcmp(target, "i386"))) {
        say("is for qemu-system-x86_64 and qemu-system-i386, not for %s", target);
        return false;
    }
    return true;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    if (!fits(info)) {
        return 1;
    }
    for (int i = 0; i < argc; i++) {
        if (!take(argv[i])) {
            return 1;
        }
    }
    if (!*settings.path) {
        say("%s", "needs socket=PATH, where the host listens");
        return 1;
    }
    if (!settings.magic_count) {
        settings.magics[settings.magic_count++] = 0x42494D56;
    }
    settings.vcpus = info->system.smp_vcpus;
    settings.register_size = strcmp(info->target_name, "i386") ? 8 : 4;
    snprintf(settings.target, sizeof settings.target, "%s", info->target_name);
    if (getrandom(&settings.process, sizeof settings.process, 0) != sizeof settings.process) {
        settings.process = (uint64_t)getpid() << 32 ^ (uint64_t)(now() * 1e9);
    }
    settings.inside = settings.inside && has_inside();
    if (!settings.inside) {
        deferred.score = qemu_plugin_scoreboard_new(sizeof(uint64_t));
    }
    qemu_plugin_register_vcpu_init_cb(id, on_vcpu, NULL);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation, NULL);
    return 0;
}
