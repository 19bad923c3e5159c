/*
 * What the plugin API does not offer, from QEMU's own functions.
 *
 * Within a translated block RIP and the arithmetic flags are not up to date: QEMU keeps them as
 * facts of the translation, and finds them out when a block is left in its middle by an
 * exception. `cpu_restore_state` is what it does then, and it is what a trap needs. After it the
 * block must not go on: it counts on the RIP of its beginning.
 *
 * A QEMU that loads modules exports all of its functions (that of each distribution does). One
 * that does not has null pointers here, and traps do without: see `absent_inside` in
 * docs/qemu-plugin.md.
 *
 * Two things are in QEMU's state of the CPU and nowhere else: whether an STI or a MOV SS shields
 * the instruction from interrupts, and whether code is 64, 32 or 16 bits wide. Where that
 * state begins is found by what it must hold, and proved by a register that is written through
 * the API and seen to change there. What is not found is not used.
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "plugin.h"

/* include/hw/core/cpu.h, include/exec/cpu-common.h, target/i386/helper.h, include/system/runstate.h. */
extern void *qemu_get_cpu(int) __attribute__((weak));
extern bool cpu_restore_state(void *cpu, uintptr_t host_pc) __attribute__((weak));
extern void helper_single_step(void *env) __attribute__((noreturn, weak));
extern uint64_t helper_read_eflags(void *env) __attribute__((weak));
extern bool runstate_is_running(void) __attribute__((weak));
extern int runstate_get(void) __attribute__((weak));

/* qapi/run-state.json, in its order. */
enum { RUNNING = 9, SHUTDOWN = 11 };

enum { ARITHMETIC = 0x8D5, TF = 1 << 8, DF = 1 << 10, RF = 1 << 16, VM = 1 << 17 };
/* target/i386/cpu.h: HF_... */
enum { CPL = 3, SHADOW = 1 << 3, CS32 = 1 << 4, PE = 1 << 7, LMA = 1 << 14, CS64 = 1 << 15 };
enum { MAX_SEARCHES = 16, STEP = 16, SPAN = 48 };
/* target/i386/cpu.h: CC_OP_EFLAGS to CC_OP_ADCOX, whose first operand holds flags as they are. */
enum { OPERANDS = 2, FLAGS_AS_THEY_ARE = 4 };

/* In the order of QEMU's array of general registers. */
static const unsigned ORDER[] = {RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI};

bool has_inside(void)
{
    return qemu_get_cpu && cpu_restore_state;
}

bool restore_state(struct vcpu *vcpu, uintptr_t in_block)
{
    void *cpu = settings.inside ? qemu_get_cpu(vcpu->number) : NULL;
    return cpu && cpu_restore_state(cpu, in_block);
}

/* Behind the general registers: EIP, EFLAGS, three operands of the flags, which operation, DF, state. */
static uint64_t word_at(const char *env, unsigned room, unsigned which)
{
    uint64_t value = 0;
    memcpy(&value, env + (room + which) * settings.register_size, settings.register_size);
    return value;
}

static uint32_t half_at(const char *env, unsigned room, unsigned which)
{
    uint32_t value;
    memcpy(&value, env + (room + 5) * settings.register_size + 4 * which, sizeof value);
    return value;
}

static uint32_t state_of(const struct vcpu *vcpu)
{
    return half_at(vcpu->env, vcpu->room, 2);
}

static bool may_be(const char *env, unsigned room, const uint64_t *registers)
{
    for (unsigned i = 0; i < 8; i++) {
        uint32_t value;
        memcpy(&value, env + i * settings.register_size, sizeof value);
        if (value != (uint32_t)registers[ORDER[i]]) {
            return false;
        }
    }
    uint32_t flags = registers[EFLAGS], state = half_at(env, room, 2);
    uint32_t kept = ~(uint32_t)(ARITHMETIC | DF);
    bool is_protected = registers[CR0] & 1;
    unsigned ring = flags & VM ? 3 : is_protected ? registers[CS] & 3 : 0;
    return (word_at(env, room, 1) & kept) == (flags & kept) && (flags & 2) &&
           half_at(env, room, 0) < 256 && ((half_at(env, room, 1) + 1) & ~2u) == 0 &&
           !(state & PE) == !is_protected && !(state & LMA) == !(registers[EFER] & 1 << 10) &&
           (state & CPL) == ring;
}

/* What is written through the API has to appear there. */
static bool follows(struct vcpu *vcpu, char *env)
{
    uint64_t before = get_register(vcpu, RDX), whole = 0;
    uint32_t there, changed = (uint32_t)before ^ 0x5A5A5A5A;
    char *slot = env + 2 * settings.register_size;
    memcpy(&whole, slot, settings.register_size);
    set_register(vcpu, RDX, changed);
    memcpy(&there, slot, sizeof there);
    set_register(vcpu, RDX, before);
    if (there != changed) {
        return false;
    }
    /* In 32-bit code the API writes the lower half alone, and clears the upper one. */
    memcpy(slot, &whole, settings.register_size);
    return true;
}

static bool is_env(struct vcpu *vcpu, char *candidate, const uint64_t *registers)
{
    static const unsigned ROOMS[] = {16, 32};
    for (unsigned k = 0; k < 2; k++) {
        unsigned room = settings.register_size == 4 ? 8 : ROOMS[k];
        if (may_be(candidate, room, registers) && follows(vcpu, candidate)) {
            vcpu->room = room;
            vcpu->env = candidate;
            return true;
        }
    }
    return false;
}

static void get_registers(struct vcpu *vcpu, uint64_t *registers)
{
    for (unsigned i = 0; i < REGISTERS; i++) {
        registers[i] = get_register(vcpu, i);
    }
}

static void find_env(struct vcpu *vcpu)
{
    char *cpu = qemu_get_cpu(vcpu->number);
    size_t size = cpu ? malloc_usable_size(cpu) : 0, span = SPAN * settings.register_size;
    uint64_t registers[REGISTERS];
    get_registers(vcpu, registers);
    for (size_t at = 0; at + span <= size && at < 1 << 16; at += STEP) {
        if (is_env(vcpu, cpu + at, registers)) {
            return;
        }
    }
}

/* The candidate may be anything where translated code does not keep the state in that register. */
static bool is_readable(const char *start, size_t size)
{
    char copy[SPAN * sizeof(uint64_t)];
    struct iovec here = {copy, size}, there = {(void *)start, size};
    return process_vm_readv(getpid(), &here, 1, &there, 1, 0) == (ssize_t)size;
}

/* For a QEMU that does not tell where its state of a CPU is: what `on_trap` found is that, if it proves so. */
void take_env(struct vcpu *vcpu, char *candidate)
{
    if (settings.inside || vcpu->env || vcpu->searches == MAX_SEARCHES) {
        return;
    }
    uint64_t registers[REGISTERS];
    get_registers(vcpu, registers);
    vcpu->searches++;
    if (!candidate || !is_readable(candidate, SPAN * settings.register_size) ||
        !is_env(vcpu, candidate, registers)) {
        if (vcpu->searches == MAX_SEARCHES) {
            say("%s", "QEMU's state of a CPU is not where it was in 11.1: behind a VMCALL or VMMCALL "
                      "that has no jump right before it, flags may be anything");
        }
    }
}

static bool knows_env(struct vcpu *vcpu)
{
    if (!vcpu->env && settings.inside && vcpu->searches < MAX_SEARCHES) {
        vcpu->searches++;
        find_env(vcpu);
        if (!vcpu->env && vcpu->searches == MAX_SEARCHES) {
            say("%s", "QEMU's state of a CPU is not where it was in 11.1: a trap that is "
                      "stepped over, or behind STI or MOV SS, is not exact");
        }
    }
    return vcpu->env;
}

/* In bits; 0: not known. */
unsigned width_inside(struct vcpu *vcpu)
{
    if (!knows_env(vcpu)) {
        return 0;
    }
    uint32_t state = state_of(vcpu);
    return state & CS64 ? 64 : state & CS32 ? 32 : 16;
}

/*
 * General registers, RIP and EFLAGS as the API shows them, without a call for each; false: where
 * they are is not known.
 */
bool read_state(struct vcpu *vcpu, uint64_t *registers, uint64_t *rip)
{
    if (!vcpu->env) {
        return false;
    }
    bool is_long = state_of(vcpu) & CS64;
    unsigned word = settings.register_size, size = is_long ? 8 : 4;
    memset(registers, 0, R_COUNT * sizeof *registers);
    for (unsigned i = 0; i < (is_long ? R_COUNT : R8); i++) {
        memcpy(registers + (i < R8 ? ORDER[i] : i), vcpu->env + i * word, size);
    }
    *rip = 0;
    memcpy(rip, vcpu->env + vcpu->room * word, size);
    registers[EFLAGS] = (uint32_t)word_at(vcpu->env, vcpu->room, 1);
    return true;
}

/* RAX to RDX, as the API writes them; false as above. */
bool write_state(struct vcpu *vcpu, unsigned which, uint64_t value)
{
    static const unsigned PLACES[] = {0, 3, 1, 2};
    if (!vcpu->env) {
        return false;
    }
    if (!(state_of(vcpu) & CS64)) {
        value = (uint32_t)value;
    }
    memcpy(vcpu->env + PLACES[which] * settings.register_size, &value, settings.register_size);
    return true;
}

/* After `restore_state`: whether EFLAGS are known, which the plugin API shows without their arithmetic part. */
bool read_flags(struct vcpu *vcpu, uint64_t *flags)
{
    if (!helper_read_eflags || !knows_env(vcpu)) {
        return false;
    }
    uint32_t all = (uint32_t)helper_read_eflags(vcpu->env);
    *flags = all | (*flags & (RF | VM));
    return true;
}

/*
 * A block that is left in its middle has changed the operands of the flags, and not which
 * operation they are of. Where that is "flags as they are", an operand of the guest's code would
 * become flags, those of the system included, as soon as another thread wants something of the vCPU.
 */
static void keep_flags_of_the_system(struct vcpu *vcpu)
{
    static const uint64_t MASKS[] = {1, ARITHMETIC, 1};
    if (!vcpu->env || half_at(vcpu->env, vcpu->room, 0) >= FLAGS_AS_THEY_ARE) {
        return;
    }
    for (unsigned i = 0; i < 3; i++) {
        uint64_t operand = word_at(vcpu->env, vcpu->room, OPERANDS + i) & MASKS[i];
        memcpy(vcpu->env + (vcpu->room + OPERANDS + i) * settings.register_size, &operand,
               settings.register_size);
    }
}

/* Go on at `rip`, with what the hardware leaves behind an instruction that has ended. */
void leave_behind(struct vcpu *vcpu, uint64_t rip)
{
    if (settings.inside && knows_env(vcpu)) {
        unsigned word = settings.register_size;
        char *flags_at = vcpu->env + (vcpu->room + 1) * word;
        uint32_t flags, state = state_of(vcpu) & ~(uint32_t)SHADOW;
        memcpy(&flags, flags_at, sizeof flags);
        flags &= ~(uint32_t)RF;
        memcpy(flags_at, &flags, sizeof flags);
        memcpy(vcpu->env + (vcpu->room + 5) * word + 8, &state, sizeof state);
        if (flags & TF && helper_single_step) {
            memcpy(vcpu->env + vcpu->room * word, &rip, word);
            helper_single_step(vcpu->env);
        }
    }
    if (!settings.inside) {
        keep_flags_of_the_system(vcpu);
    }
    qemu_plugin_set_pc(rip);
}

/*
 * The main thread waits for all vCPUs then. What the numbers of states are is proved by that of a
 * running VM, so each trap looks before it waits.
 */
bool is_shutting_down(void)
{
    static _Atomic bool is_proved;
    if (!settings.inside || !runstate_is_running || !runstate_get) {
        return false;
    }
    if (runstate_is_running()) {
        is_proved = runstate_get() == RUNNING;
        return false;
    }
    return is_proved && runstate_get() == SHUTDOWN;
}
