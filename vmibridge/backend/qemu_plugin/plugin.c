/*
 * The QEMU TCG plugin of vmibridge: traps CPUID, VMCALL and VMMCALL and asks a host.
 *
 * Each vCPU has a connection of its own to the host's unix socket, and its thread does all
 * that is on it: it sends a trap, serves the host's accesses to guest memory, and goes on
 * with the answer. So nothing here is shared between vCPUs but the settings, which do not
 * change, and the table of sites, which has a lock. The protocol is in docs/qemu-plugin.md.
 *
 * Arguments: socket=PATH, magic=NUMBER (again for more), cpuid=on|off, vmcall=on|off,
 * vmmcall=on|off, absent=native|wait, patience=SECONDS, compat=SELECTOR, ram=PATH,
 * verbose=on|off.
 *
 * Needs QEMU 11.1 (plugin API 7): before, a plugin could not set the program counter. No
 * header of QEMU or GLib is needed; what is used of them is declared here.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* --- what QEMU and GLib offer ---------------------------------------------------- */

enum { API = 7 };
enum { CB_RW_REGS_PC = 3 };

typedef uint64_t qemu_plugin_id_t;
typedef struct { uint8_t *data; unsigned len; } GByteArray;
typedef struct { char *data; unsigned len; } GArray;
typedef struct {
    const char *target_name;
    struct { int min, cur; } version;
    bool system_emulation;
    struct { int smp_vcpus, max_vcpus; } system;
} qemu_info_t;
typedef struct {
    void *handle;
    const char *name;
    const char *feature;
    bool is_readonly;
} qemu_plugin_reg_descriptor;

extern GByteArray *g_byte_array_new(void);
extern GByteArray *g_byte_array_set_size(GByteArray *, unsigned);
extern void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t, void (*)(unsigned, void *), void *);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(void *, void *), void *);
extern void qemu_plugin_register_vcpu_insn_exec_cb(void *, void (*)(unsigned, void *), int, void *);
extern size_t qemu_plugin_tb_n_insns(void *);
extern void *qemu_plugin_tb_get_insn(void *, size_t);
extern size_t qemu_plugin_insn_data(void *, void *, size_t);
extern uint64_t qemu_plugin_insn_vaddr(void *);
extern GArray *qemu_plugin_get_registers(void);
extern bool qemu_plugin_read_register(void *, GByteArray *);
extern bool qemu_plugin_write_register(void *, GByteArray *);
extern void qemu_plugin_set_pc(uint64_t) __attribute__((noreturn, weak));
extern int qemu_plugin_read_memory_hwaddr(uint64_t, GByteArray *, size_t);
extern int qemu_plugin_write_memory_hwaddr(uint64_t, GByteArray *);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = API;

/* --- the protocol ----------------------------------------------------------------- */

enum { PROTOCOL = 1, MOST_MAGICS = 64, MOST_VCPUS = 1024, MOST_ACCESS = 16 << 20 };
enum { HELLO = 1, TRAP = 2, MEMORY = 3 };
enum { WELCOME = 16, REFUSED = 17, ANSWER = 18, NATIVE = 19, READ = 20, WRITE = 21 };
enum { CPUID = 1, VMCALL = 2, VMMCALL = 3 };
enum { ANY_HYPERCALL = 1, ANY_CPUID = 2 };

static const char *const NAMES[] = {
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8",  "r9", "r10", "r11",
    "r12", "r13", "r14", "r15", "eflags", "cr0", "cr3", "cr4", "efer", "cs",
};
enum { RAX, RBX, RCX, RDX, RBP = 6, R8 = 8, EFLAGS = 16, CR0, CR3, CR4, EFER, CS };
enum { REGISTERS = sizeof NAMES / sizeof *NAMES };

struct frame { uint32_t type, length; };
struct hello {
    uint32_t protocol, api;
    uint64_t process;
    uint32_t vcpu, vcpus;
    char target[16];
};
struct trap {
    uint64_t ip;
    uint8_t kind, length, width, ring;
    uint32_t again;
    uint64_t registers[REGISTERS];
};
struct answer { uint64_t rip; uint32_t mask, unused; uint64_t values[4]; };
struct access { uint64_t address; uint32_t size, unused; };
struct welcome { uint32_t protocol, kinds, any, count; };

/* --- settings --------------------------------------------------------------------- */

static struct {
    char path[sizeof ((struct sockaddr_un *)0)->sun_path];
    int ram;
    uint32_t magics[MOST_MAGICS];
    unsigned magic_count, kinds, compat;
    bool wait, verbose;
    double patience;
    uint64_t process;
    int vcpus;
    unsigned register_size;
    char target[16];
} settings = {.kinds = 1 << CPUID | 1 << VMCALL | 1 << VMMCALL, .patience = 30, .compat = 0x23,
              .ram = -1};

struct vcpu {
    int fd;
    bool ready, refused;
    double retry_at;
    uint32_t magics[MOST_MAGICS];
    unsigned magic_count, kinds, any;
    void *handles[REGISTERS];
    GByteArray *bytes, *memory;
};
static struct vcpu vcpus[MOST_VCPUS];

static void say(const char *format, const char *what)
{
    fprintf(stderr, "vmibridge plugin: ");
    fprintf(stderr, format, what);
    fputc('\n', stderr);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

/* --- the connection of one vCPU ---------------------------------------------------- */

static bool read_all(int fd, void *to, size_t size)
{
    for (char *at = to; size;) {
        ssize_t got = recv(fd, at, size, 0);
        if (got < 0 && errno == EINTR) {
            continue;
        }
        if (got <= 0) {
            return false;
        }
        at += got;
        size -= got;
    }
    return true;
}

static bool send_all(int fd, const void *from, size_t size)
{
    for (const char *at = from; size;) {
        ssize_t sent = send(fd, at, size, MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR) {
            continue;
        }
        if (sent <= 0) {
            return false;
        }
        at += sent;
        size -= sent;
    }
    return true;
}

static bool send_frame(int fd, uint32_t type, const void *body, uint32_t length)
{
    char small[512];
    struct frame frame = {type, length};
    if (length > sizeof small - sizeof frame) {
        return send_all(fd, &frame, sizeof frame) && send_all(fd, body, length);
    }
    memcpy(small, &frame, sizeof frame);
    memcpy(small + sizeof frame, body, length);
    return send_all(fd, small, sizeof frame + length);
}

/* A frame with a file descriptor: that of the guest's memory, where QEMU shares it. */
static bool send_with(int fd, int passed, struct iovec *parts, int count)
{
    union { struct cmsghdr head; char room[CMSG_SPACE(sizeof passed)]; } control = {{0}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
    size_t size = 0;
    for (int i = 0; i < count; i++) {
        size += parts[i].iov_len;
    }
    if (passed >= 0) {
        message.msg_control = &control;
        message.msg_controllen = sizeof control;
        control.head.cmsg_level = SOL_SOCKET;
        control.head.cmsg_type = SCM_RIGHTS;
        control.head.cmsg_len = CMSG_LEN(sizeof passed);
        memcpy(CMSG_DATA(&control.head), &passed, sizeof passed);
    }
    return sendmsg(fd, &message, MSG_NOSIGNAL) == (ssize_t)size;
}

static void hang_up(struct vcpu *vcpu)
{
    if (vcpu->fd >= 0) {
        close(vcpu->fd);
    }
    vcpu->fd = -1;
}

static bool shake_hands(struct vcpu *vcpu, unsigned number)
{
    struct {
        struct hello hello;
        char names[256];
    } body = {{PROTOCOL, API, settings.process, number, settings.vcpus, ""}, ""};
    memcpy(body.hello.target, settings.target, sizeof body.hello.target);
    size_t at = 0;
    for (unsigned i = 0; i < REGISTERS; i++) {
        at += snprintf(body.names + at, sizeof body.names - at, "%s%s", i ? "," : "", NAMES[i]);
    }
    struct frame frame = {HELLO, sizeof body.hello + at};
    struct welcome welcome;
    struct iovec parts[] = {{&frame, sizeof frame}, {&body, frame.length}};
    if (!send_with(vcpu->fd, settings.ram, parts, 2) ||
        !read_all(vcpu->fd, &frame, sizeof frame)) {
        return false;
    }
    if (frame.type == REFUSED && frame.length < 512) {
        char why[512] = "";
        read_all(vcpu->fd, why, frame.length);
        say("the host refuses this plugin: %s", why);
        vcpu->refused = true;
        return false;
    }
    if (frame.type != WELCOME || frame.length < sizeof welcome ||
        !read_all(vcpu->fd, &welcome, sizeof welcome) || welcome.protocol != PROTOCOL ||
        welcome.count > MOST_MAGICS || frame.length != sizeof welcome + 4 * welcome.count ||
        !read_all(vcpu->fd, vcpu->magics, 4 * welcome.count)) {
        say("%s", "the host speaks another protocol");
        return false;
    }
    vcpu->magic_count = welcome.count;
    vcpu->kinds = welcome.kinds & settings.kinds;
    vcpu->any = welcome.any;
    return true;
}

/* Whether there is a host. A unix socket that nobody listens at refuses at once. */
static bool connected(struct vcpu *vcpu, unsigned number)
{
    if (vcpu->fd >= 0) {
        return true;
    }
    if (!*settings.path || vcpu->refused || now() < vcpu->retry_at) {
        return false;
    }
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, settings.path, sizeof address.sun_path);
    vcpu->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    /* A host that takes the connection and then says nothing holds no vCPU for ever. */
    struct timeval patience = {5, 0}, none = {0, 0};
    setsockopt(vcpu->fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (vcpu->fd < 0 || connect(vcpu->fd, (void *)&address, sizeof address) ||
        !shake_hands(vcpu, number)) {
        hang_up(vcpu);
        vcpu->retry_at = now() + 0.05;
        return false;
    }
    setsockopt(vcpu->fd, SOL_SOCKET, SO_RCVTIMEO, &none, sizeof none);
    if (settings.verbose) {
        fprintf(stderr, "vmibridge plugin: vCPU %u has a host\n", number);
    }
    return true;
}

/* --- registers --------------------------------------------------------------------- */

static uint64_t get_register(struct vcpu *vcpu, unsigned which)
{
    uint64_t value = 0;
    g_byte_array_set_size(vcpu->bytes, 0);
    if (vcpu->handles[which] && qemu_plugin_read_register(vcpu->handles[which], vcpu->bytes)) {
        memcpy(&value, vcpu->bytes->data, vcpu->bytes->len < 8 ? vcpu->bytes->len : 8);
    }
    return value;
}

static void set_register(struct vcpu *vcpu, unsigned which, uint64_t value)
{
    g_byte_array_set_size(vcpu->bytes, settings.register_size);
    memcpy(vcpu->bytes->data, &value, settings.register_size);
    qemu_plugin_write_register(vcpu->handles[which], vcpu->bytes);
}

/* --- sites: the instructions that may trap ------------------------------------------ */

struct site {
    struct site *next;
    uint64_t ip;
    uint8_t kind, length, code_width;
};
static struct site *sites[4096];
static pthread_mutex_t sites_lock = PTHREAD_MUTEX_INITIALIZER;

/* The same instruction is translated again and again: it has one record for all. */
static struct site *site_of(uint64_t ip, uint8_t kind, uint8_t length, uint8_t code_width)
{
    struct site **bucket = &sites[(ip ^ ip >> 12) % 4096], *site;
    pthread_mutex_lock(&sites_lock);
    for (site = *bucket; site; site = site->next) {
        if (site->ip == ip && site->kind == kind && site->length == length &&
            site->code_width == code_width) {
            break;
        }
    }
    if (!site && (site = malloc(sizeof *site))) {
        *site = (struct site){*bucket, ip, kind, length, code_width};
        *bucket = site;
    }
    pthread_mutex_unlock(&sites_lock);
    return site;
}

/*
 * Whether code is 64-bit is in the descriptor of CS, which QEMU does not show to plugins. In
 * order: what QEMU's own decoder made of the code around (a byte 0x40 to 0x4F begins a longer
 * instruction in 64-bit code, and is one by itself in 32-bit code); an address beyond 32 bits;
 * the selector that Linux and Windows give to 32-bit programs.
 */
static unsigned width_of(const struct site *site, uint64_t cr0, uint64_t efer, uint64_t cs)
{
    if (!(cr0 & 1)) {
        return 16;
    }
    if (!(efer & 1 << 10)) {
        return 32;
    }
    if (site->code_width) {
        return site->code_width;
    }
    return site->ip >> 32 || cs != settings.compat ? 64 : 32;
}

/* --- one trap ------------------------------------------------------------------------ */

static bool is_ours(const struct vcpu *vcpu, unsigned kind, uint32_t magic)
{
    unsigned count = vcpu->magic_count;
    const uint32_t *magics = vcpu->magics;
    if (vcpu->fd < 0 && !vcpu->ready) {
        /* No host has said which: those of the arguments. */
        count = settings.magic_count;
        magics = settings.magics;
    } else if (!(vcpu->kinds >> kind & 1)) {
        return false;
    } else if (vcpu->any & (kind == CPUID ? ANY_CPUID : ANY_HYPERCALL)) {
        return true;
    }
    for (unsigned i = 0; i < count; i++) {
        if (magics[i] == magic) {
            return true;
        }
    }
    return false;
}

static bool serve_read(struct vcpu *vcpu, const struct access *access)
{
    bool done = access->size <= MOST_ACCESS &&
                !qemu_plugin_read_memory_hwaddr(access->address, vcpu->memory, access->size);
    struct frame frame = {MEMORY, 4 + (done ? access->size : 0)};
    uint32_t failed = !done;
    struct { struct frame frame; uint32_t failed; } head = {frame, failed};
    return send_all(vcpu->fd, &head, sizeof head) &&
           (!done || send_all(vcpu->fd, vcpu->memory->data, access->size));
}

static bool serve_write(struct vcpu *vcpu, const struct access *access)
{
    if (access->size > MOST_ACCESS) {
        return false;
    }
    g_byte_array_set_size(vcpu->memory, access->size);
    if (!read_all(vcpu->fd, vcpu->memory->data, access->size)) {
        return false;
    }
    uint32_t failed = qemu_plugin_write_memory_hwaddr(access->address, vcpu->memory) != 0;
    return send_frame(vcpu->fd, MEMORY, &failed, sizeof failed);
}

enum result { LOST, ANSWERED, RUN_NATIVELY };

static enum result ask(struct vcpu *vcpu, const struct trap *trap, struct answer *answer)
{
    if (!send_frame(vcpu->fd, TRAP, trap, sizeof *trap)) {
        return LOST;
    }
    for (;;) {
        struct frame frame;
        struct access access;
        if (!read_all(vcpu->fd, &frame, sizeof frame)) {
            return LOST;
        }
        switch (frame.type) {
        case ANSWER:
            return frame.length == sizeof *answer && read_all(vcpu->fd, answer, sizeof *answer)
                       ? ANSWERED
                       : LOST;
        case NATIVE:
            return frame.length ? LOST : RUN_NATIVELY;
        case READ:
            if (frame.length != sizeof access || !read_all(vcpu->fd, &access, sizeof access) ||
                !serve_read(vcpu, &access)) {
                return LOST;
            }
            break;
        case WRITE:
            if (frame.length < sizeof access || !read_all(vcpu->fd, &access, sizeof access) ||
                frame.length != sizeof access + access.size || !serve_write(vcpu, &access)) {
                return LOST;
            }
            break;
        default:
            return LOST;
        }
    }
}

static void on_site(unsigned number, void *data)
{
    const struct site *site = data;
    struct vcpu *vcpu = &vcpus[number];
    uint64_t cr0 = 0, efer = 0, cs = 0;
    unsigned width = 64, magic_at = RAX;
    if (number >= MOST_VCPUS || !vcpu->bytes) {
        return;
    }
    if (site->kind != CPUID) {
        cr0 = get_register(vcpu, CR0);
        efer = get_register(vcpu, EFER);
        cs = get_register(vcpu, CS);
        width = width_of(site, cr0, efer, cs);
        magic_at = width == 64 ? RCX : RBP;
    }
    if (!is_ours(vcpu, site->kind, (uint32_t)get_register(vcpu, magic_at))) {
        /* Whether it is may have changed with a host that has come since. */
        if (vcpu->fd >= 0 || !connected(vcpu, number) ||
            !is_ours(vcpu, site->kind, (uint32_t)get_register(vcpu, magic_at))) {
            return;
        }
    }
    struct trap trap = {.ip = site->ip, .kind = site->kind, .length = site->length};
    for (unsigned i = 0; i < REGISTERS; i++) {
        trap.registers[i] = get_register(vcpu, i);
    }
    trap.width =
        width_of(site, trap.registers[CR0], trap.registers[EFER], trap.registers[CS]);
    bool virtual_8086 = trap.registers[EFLAGS] & 1 << 17;
    trap.ring = virtual_8086 ? 3 : trap.width == 16 ? 0 : trap.registers[CS] & 3;
    double until = now() + settings.patience;
    for (;;) {
        struct answer answer;
        if (connected(vcpu, number)) {
            vcpu->ready = true;
            switch (ask(vcpu, &trap, &answer)) {
            case RUN_NATIVELY:
                return;
            case ANSWERED:
                for (unsigned i = 0; i < 4; i++) {
                    if (answer.mask >> i & 1) {
                        set_register(vcpu, RAX + i, answer.values[i]);
                    }
                }
                qemu_plugin_set_pc(answer.rip);
            case LOST:
                hang_up(vcpu);
                vcpu->retry_at = 0;
                trap.again = 1;
            }
        }
        if (!settings.wait || vcpu->refused || now() >= until) {
            return;
        }
        usleep(20000);
    }
}

/* --- translation ----------------------------------------------------------------------- */

static size_t prefixes_of(const uint8_t *code, size_t size)
{
    size_t count = 0;
    while (count < size && strchr("\x66\x67\xf2\xf3\x2e\x36\x3e\x26\x64\x65\xf0", code[count]) &&
           code[count]) {
        count++;
    }
    return count;
}

static void on_translation(void *tb, void *unused)
{
    (void)unused;
    size_t count = qemu_plugin_tb_n_insns(tb);
    unsigned code_width = 0;
    bool any = false;
    uint8_t kinds[512] = {0}, lengths[512] = {0};
    for (size_t i = 0; i < count && i < 512; i++) {
        uint8_t code[16];
        size_t size = qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i), code, sizeof code);
        size_t at = prefixes_of(code, size);
        if (at < size && code[at] >= 0x40 && code[at] <= 0x4F) {
            code_width = size > at + 1 ? 64 : 32;
            at += code_width == 64;
        }
        const uint8_t *rest = code + at;
        size_t left = size - at;
        unsigned kind = 0;
        if (left == 2 && rest[0] == 0x0F && rest[1] == 0xA2) {
            kind = CPUID;
        } else if (left == 3 && rest[0] == 0x0F && rest[1] == 0x01) {
            kind = rest[2] == 0xC1 ? VMCALL : rest[2] == 0xD9 ? VMMCALL : 0;
        }
        if (kind && settings.kinds >> kind & 1) {
            kinds[i] = kind;
            lengths[i] = size;
            any = true;
        }
    }
    for (size_t i = 0; any && i < count && i < 512; i++) {
        if (kinds[i]) {
            void *insn = qemu_plugin_tb_get_insn(tb, i);
            struct site *site =
                site_of(qemu_plugin_insn_vaddr(insn), kinds[i], lengths[i], code_width);
            if (site) {
                qemu_plugin_register_vcpu_insn_exec_cb(insn, on_site, CB_RW_REGS_PC, site);
            }
        }
    }
}

static void on_vcpu(unsigned number, void *unused)
{
    (void)unused;
    if (number >= MOST_VCPUS) {
        say("%s", "has more vCPUs than this plugin serves; the others run natively");
        return;
    }
    struct vcpu *vcpu = &vcpus[number];
    vcpu->fd = -1;
    vcpu->memory = g_byte_array_new();
    GArray *found = qemu_plugin_get_registers();
    const qemu_plugin_reg_descriptor *each = (void *)found->data;
    for (unsigned i = 0; i < REGISTERS; i++) {
        for (unsigned k = 0; k < found->len; k++) {
            /* A 32-bit QEMU says EAX for RAX, and has no R8. */
            const char *name = each[k].name;
            if (!strcmp(name, NAMES[i]) ||
                (i < R8 && *name == 'e' && !strcmp(name + 1, NAMES[i] + 1))) {
                vcpu->handles[i] = each[k].handle;
            }
        }
        if (!vcpu->handles[i] && !(settings.register_size == 4 && i >= R8 && i < EFLAGS)) {
            say("QEMU has no register %s; this vCPU runs natively", NAMES[i]);
            return;
        }
    }
    vcpu->bytes = g_byte_array_new();
    connected(vcpu, number);
}

/* --- arguments --------------------------------------------------------------------------- */

static int wrong(const char *argument)
{
    say("wrong argument: %s", argument);
    return 1;
}

static int take(const char *argument)
{
    const char *value = strchr(argument, '=');
    if (!value++) {
        return wrong(argument);
    }
    size_t length = value - argument - 1;
    char *end = NULL;
    bool on = !strcmp(value, "on");
#define IS(name) (length == strlen(name) && !strncmp(argument, name, length))
    static const struct { const char *name; unsigned kind; } KINDS[] = {
        {"cpuid", CPUID}, {"vmcall", VMCALL}, {"vmmcall", VMMCALL}};
    for (unsigned i = 0; i < 3; i++) {
        if (IS(KINDS[i].name)) {
            settings.kinds &= ~(1u << KINDS[i].kind);
            settings.kinds |= (unsigned)on << KINDS[i].kind;
            return on || !strcmp(value, "off") ? 0 : wrong(argument);
        }
    }
    if (IS("socket")) {
        if (strlen(value) >= sizeof settings.path) {
            return wrong(argument);
        }
        strcpy(settings.path, value);
    } else if (IS("ram")) {
        settings.ram = open(value, O_RDONLY | O_CLOEXEC);
        if (settings.ram < 0) {
            say("cannot open the file of ram=%s", value);
            return 1;
        }
    } else if (IS("magic")) {
        if (settings.magic_count == MOST_MAGICS) {
            return wrong(argument);
        }
        settings.magics[settings.magic_count++] = strtoul(value, &end, 0);
    } else if (IS("compat")) {
        settings.compat = strtoul(value, &end, 0);
    } else if (IS("patience")) {
        settings.patience = strtod(value, &end);
    } else if (IS("absent")) {
        settings.wait = !strcmp(value, "wait");
        return settings.wait || !strcmp(value, "native") ? 0 : wrong(argument);
    } else if (IS("verbose")) {
        settings.verbose = on;
        return on || !strcmp(value, "off") ? 0 : wrong(argument);
    } else {
        return wrong(argument);
    }
    return end && (end == value || *end) ? wrong(argument) : 0;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const qemu_info_t *info, int argc, char **argv)
{
    if (info->version.cur < API || info->version.min > API || !qemu_plugin_set_pc) {
        fprintf(stderr,
                "vmibridge plugin: this QEMU has plugin API %d to %d, and the plugin needs %d"
                " (QEMU 11.1 or later)\n",
                info->version.min, info->version.cur, API);
        return 1;
    }
    if (!info->system_emulation || (strcmp(info->target_name, "x86_64") && strcmp(info->target_name, "i386"))) {
        say("is for qemu-system-x86_64 and qemu-system-i386, not for %s", info->target_name);
        return 1;
    }
    for (int i = 0; i < argc; i++) {
        if (take(argv[i])) {
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
    qemu_plugin_register_vcpu_init_cb(id, on_vcpu, NULL);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation, NULL);
    return 0;
}
