/*
 * One trap: which are ours, what is sent to the host, and how the vCPU goes on.
 *
 * | with | RIP and flags of a trap | how the answer is written |
 * |---|---|---|
 * | QEMU's own functions | `restore_state` | at once; the block is left behind the trap |
 * | the plugin API alone | RIP by that of the block's beginning; flags when nothing in the block has changed them | VMCALL, VMMCALL: the same, and arithmetic flags that the block has changed are lost. CPUID runs natively, and the answer is written over it when the next instruction begins: its flags and single steps are the processor's own |
 *
 * After `restore_state` a block must not go on. So what has to run natively is run by leaving for
 * the trap itself, and letting it pass when the vCPU comes there: `native`.
 */
#define _GNU_SOURCE
#include <unistd.h>

#include "plugin.h"

enum { LOOK_AGAIN = 20000 };
/* Microseconds between looks for a host. */
#define FORGOTTEN 1.0
/* Seconds after which a vCPU that waited and did not come back has given up that trap. */
enum { EFLAGS_VM = 1 << 17, LMA_EFER = 1 << 10 };

qemu_plugin_u64 deferred;
/* Not 0 where a vCPU has an answer that is written when the next instruction begins. */

static bool is_long(struct vcpu *vcpu)
{
    /* QEMU shows R8 to R15 in 64-bit code, and zeros elsewhere; what is written there then is lost. */
    uint64_t before = get_register(vcpu, R15);
    if (before) {
        return true;
    }
    set_register(vcpu, R15, 1);
    bool is_seen = get_register(vcpu, R15) == 1;
    if (is_seen) {
        set_register(vcpu, R15, 0);
    }
    return is_seen;
}

/* In bits. 0: it cannot be known. */
static unsigned width_at(struct vcpu *vcpu, uint64_t ip)
{
    unsigned width = settings.inside ? width_inside(vcpu) : 0;
    if (width) {
        return width;
    }
    if (!(get_register(vcpu, CR0) & 1) || get_register(vcpu, EFLAGS) & EFLAGS_VM) {
        return 16;
    }
    if (get_register(vcpu, EFER) & LMA_EFER && is_long(vcpu)) {
        return 64;
    }
    return ip > 0xFFFF || get_register(vcpu, CS) == settings.compat ? 32 : 0;
}

/* Whether a hypercall has its magic in RCX, and not in EBP. */
static bool is_64(struct vcpu *vcpu)
{
    unsigned width = settings.inside ? width_inside(vcpu) : 0;
    return width ? width == 64 : get_register(vcpu, EFER) & LMA_EFER && is_long(vcpu);
}

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

static bool is_wanted(struct vcpu *vcpu, const struct site *site)
{
    unsigned at = site->kind == CPUID ? RAX : is_64(vcpu) ? RCX : RBP;
    uint32_t magic = get_register(vcpu, at);
    if (is_ours(vcpu, site->kind, magic)) {
        return true;
    }
    /* Whether it is may have changed with a host that has come since. */
    return vcpu->fd < 0 && connected(vcpu) && is_ours(vcpu, site->kind, magic);
}

/* Whether the vCPU has been sent here to run this very instruction natively. */
static bool is_let_pass(struct vcpu *vcpu, const struct site *site)
{
    if (!vcpu->native.set) {
        return false;
    }
    bool is_it = site->is_first && get_rip(vcpu) == vcpu->native.ip &&
                 get_register(vcpu, CR3) == vcpu->native.cr3;
    vcpu->native.set = false;
    return is_it;
}

/* How the vCPU goes on when the trap is not answered; returns when the block may go on. */
static void run_natively(struct vcpu *vcpu, const struct trap *trap, bool is_restored)
{
    if (!is_restored) {
        return;
    }
    vcpu->native = (struct place){true, trap->ip, trap->registers[CR3]};
    qemu_plugin_set_pc(trap->ip);
}

static uint64_t behind(const struct trap *trap)
{
    uint64_t next = trap->ip + trap->length;
    return trap->width == 64 ? next : trap->width == 32 ? (uint32_t)next : (uint16_t)next;
}

static void write_one(struct vcpu *vcpu, unsigned which, uint64_t value)
{
    if (!settings.inside || !write_state(vcpu, which, value)) {
        set_register(vcpu, RAX + which, value);
    }
}

static void write_answer(struct vcpu *vcpu, const struct answer *answer)
{
    for (unsigned i = 0; i < 4; i++) {
        if (answer->mask >> i & 1) {
            write_one(vcpu, i, answer->values[i]);
        }
    }
}

/* Returns when CPUID is to run, and the answer waits for its end. */
static void take_answer(struct vcpu *vcpu, const struct trap *trap, const struct answer *answer)
{
    if (settings.inside || trap->kind != CPUID) {
        write_answer(vcpu, answer);
        leave_behind(vcpu, answer->rip);
    }
    vcpu->deferred = *answer;
    for (unsigned i = 0; i < 4; i++) {
        if (!(answer->mask >> i & 1)) {
            vcpu->deferred.values[i] = trap->registers[RAX + i];
        }
    }
    vcpu->deferred.mask = 15;
    qemu_plugin_u64_set(deferred, vcpu->number, 1);
}

static void skip(struct vcpu *vcpu, const struct trap *trap)
{
    struct answer answer = {.rip = behind(trap)};
    take_answer(vcpu, trap, &answer);
}

static bool refuse(_Atomic bool *is_said, const char *why)
{
    if (!*is_said) {
        *is_said = true;
        say("%s", why);
    }
    return false;
}

/* Whether all is known of the trap that a host must have; if not, that is said once. */
static bool describe(struct vcpu *vcpu, const struct site *site, bool is_restored,
                     struct trap *trap)
{
    static _Atomic bool said_width, said_place;
    bool is_right = is_restored || site->is_first;
    if (!is_right && settings.inside) {
        return refuse(&said_place, "QEMU does not say where in its block a trap is: it runs natively");
    }
    trap->kind = site->kind;
    trap->length = site->length;
    bool is_read = is_restored && read_state(vcpu, trap->registers, &trap->ip);
    for (unsigned i = is_read ? CR0 : RAX; i < REGISTERS; i++) {
        trap->registers[i] = get_register(vcpu, i);
    }
    if (!is_read) {
        trap->ip = is_right ? get_rip(vcpu) : vcpu->block_ip + site->distance;
    }
    unsigned width = width_at(vcpu, trap->ip);
    if (!width) {
        return refuse(&said_width,
                      "whether the code of a trap is 32 or 16 bits wide cannot be known here: it "
                      "runs natively (compat=SELECTOR says which selector is 32-bit)");
    }
    if (width != 64) {
        trap->ip = (uint32_t)trap->ip;
    }
    trap->width = width;
    bool is_virtual = trap->registers[EFLAGS] & EFLAGS_VM;
    trap->ring = is_virtual ? 3 : trap->registers[CR0] & 1 ? trap->registers[CS] & 3 : 0;
    bool are_known = is_restored && read_flags(vcpu, &trap->registers[EFLAGS]);
    trap->flags = are_known ? 0 : FLAGS_UNKNOWN;
    return true;
}

/*
 * Wait for a host. The vCPU leaves its block and comes back, so that what QEMU wants of it in the
 * meantime is done: a stop, a reset, the end, interrupts. Without QEMU's own functions it cannot,
 * and waits here. Whether there is time left.
 */
static bool wait_for_host(struct vcpu *vcpu, const struct trap *trap, bool is_restored)
{
    double time = now();
    if (!vcpu->waits_until || time - vcpu->waited_at > FORGOTTEN) {
        vcpu->waits_until = time + settings.patience;
    }
    if (vcpu->refused || time >= vcpu->waits_until) {
        vcpu->waits_until = 0;
        return false;
    }
    usleep(LOOK_AGAIN);
    vcpu->waited_at = now();
    if (is_restored) {
        qemu_plugin_set_pc(trap->ip);
    }
    return true;
}

/* Ask the host, which is there. Returns when the block may go on; else whether to look for another. */
static enum result ask_host(struct vcpu *vcpu, struct trap *trap, struct answer *answer)
{
    double began = now();
    is_shutting_down();
    if (vcpu->lost.set) {
        bool is_it = vcpu->lost.ip == trap->ip && vcpu->lost.cr3 == trap->registers[CR3];
        trap->flags |= is_it ? AGAIN : 0;
        vcpu->lost.set = false;
    }
    enum result result = ask(vcpu, trap, began + settings.patience, answer);
    if (result != LOST) {
        vcpu->waits_until = 0;
        return result;
    }
    vcpu->lost = (struct place){true, trap->ip, trap->registers[CR3]};
    if (!vcpu->waits_until) {
        vcpu->waits_until = began + settings.patience;
    }
    vcpu->waited_at = now();
    return LOST;
}

/*
 * Translated code keeps the state of its CPU in one register of the host (TCG_AREG0 in QEMU's
 * tcg/x86_64/tcg-target.h and tcg/aarch64/tcg-target.h), which has to be read before a compiler
 * uses it for something else. On other hosts the state is not known to a QEMU without functions.
 */
#if defined(__x86_64__)
__asm__(".text\n.hidden on_trap\n.globl on_trap\n.type on_trap, @function\n"
        "on_trap:\n endbr64\n mov %rbp, %rdx\n jmp on_trap_of\n.size on_trap, . - on_trap\n");
#elif defined(__aarch64__)
__asm__(".text\n.hidden on_trap\n.globl on_trap\n.type on_trap, %function\n"
        "on_trap:\n mov x2, x19\n b on_trap_of\n.size on_trap, . - on_trap\n");
#else
void on_trap(unsigned number, void *data)
{
    on_trap_of(number, data, NULL);
}
#endif

void on_trap_of(unsigned number, void *data, char *env)
{
    /* Where in the translated block this is, as QEMU counts: 2 bytes before the return address. */
    uintptr_t in_block = (uintptr_t)__builtin_return_address(0) - 2;
    struct site site = unpacked(data);
    struct vcpu *vcpu = &vcpus[number];
    if (number >= MAX_VCPUS || !vcpu->bytes || is_let_pass(vcpu, &site) ||
        !is_wanted(vcpu, &site)) {
        return;
    }
    if (settings.absent == RUNS_NATIVELY && !connected(vcpu)) {
        return;
    }
    bool is_restored = restore_state(vcpu, in_block);
    take_env(vcpu, env);
    struct trap trap = {0};
    if (!describe(vcpu, &site, is_restored, &trap)) {
        run_natively(vcpu, &trap, is_restored);
        return;
    }
    for (;;) {
        struct answer answer;
        enum result result = connected(vcpu) ? ask_host(vcpu, &trap, &answer) : LOST;
        if (result == ANSWERED) {
            take_answer(vcpu, &trap, &answer);
            return;
        }
        if (result == RUN_NATIVELY) {
            run_natively(vcpu, &trap, is_restored);
            return;
        }
        if (is_restored && is_shutting_down()) {
            qemu_plugin_set_pc(trap.ip);
        }
        if (settings.absent == IS_SKIPPED) {
            skip(vcpu, &trap);
            return;
        }
        if (settings.absent == RUNS_NATIVELY || !wait_for_host(vcpu, &trap, is_restored)) {
            run_natively(vcpu, &trap, is_restored);
            return;
        }
    }
}

/* --- without QEMU's own functions -------------------------------------------------- */

void on_block(unsigned number, void *unused)
{
    (void)unused;
    if (number < MAX_VCPUS && vcpus[number].bytes) {
        vcpus[number].block_ip = get_rip(&vcpus[number]);
    }
}

void on_deferred(unsigned number, void *unused)
{
    (void)unused;
    qemu_plugin_u64_set(deferred, number, 0);
    write_answer(&vcpus[number], &vcpus[number].deferred);
}
