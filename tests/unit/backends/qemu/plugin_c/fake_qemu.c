/*
 * A fake of QEMU for the plugin's C code: one vCPU without a guest, so that the plugin runs under
 * sanitizers, against hosts that do what they must not.
 *
 *     fake_qemu ARGUMENT...          the arguments of the plugin
 *
 * Each line of standard input is a trap: KIND (1 CPUID, 2 VMCALL, 3 VMMCALL), the address, EFLAGS.
 * KIND 0 is no trap: the address is how many blocks are translated, each at an address of its own, and
 * the line says how many different things the plugin has left with them.
 * RAX to RDX are 0x1000, 0x2000, 0x3000, 0x4000, but for the magic. Each gives a line of standard output: how the
 * vCPU goes on (behind, native, step), RIP, RAX, RBX, RCX, RDX.
 *
 * With -DNO_INSIDE it exports no functions beyond the plugin API.
 */
#include <setjmp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REGISTERS = 24, RIP = 22, EFLAGS = 16, CR0 = 17, EFER = 20, CS = 21, MEMORY = 1 << 20 };
static const char *const NAMES[REGISTERS] = {
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15", "eflags", "cr0", "cr3", "cr4", "efer", "cs", "rip", "ds",
};
/* Where QEMU has RAX to RSP; then R8 to R15 in their order. */
static const unsigned PLACES[] = {0, 3, 1, 2, 6, 7, 5, 4};

struct state {
    uint64_t before[16];
    uint64_t general[16], rip, flags, operands[3];
    uint32_t operation;
    int32_t direction;
    uint32_t state, state2;
    uint64_t after[64];
};
static struct state *cpu;
static uint64_t others[REGISTERS];
static uint8_t memory[MEMORY];
static jmp_buf left;
static uint64_t left_for;

typedef struct { uint8_t *data; unsigned len; } GByteArray;
typedef struct { char *data; unsigned len; } GArray;
struct descriptor { void *handle; const char *name, *feature; bool is_readonly; };

GByteArray *g_byte_array_new(void) { return calloc(1, sizeof(GByteArray)); }

GByteArray *g_byte_array_set_size(GByteArray *array, unsigned size)
{
    /* In a block of just this size: a byte too far is found. */
    array->data = realloc(array->data, size ? size : 1);
    array->len = size;
    return array;
}

void *g_array_free(GArray *array, int with_data)
{
    if (with_data) {
        free(array->data);
    }
    free(array);
    return NULL;
}

static uint64_t *slot(size_t which)
{
    if (which < 8) {
        return &cpu->general[PLACES[which]];
    }
    return which < 16 ? &cpu->general[which] : which == RIP ? &cpu->rip
         : which == EFLAGS ? &cpu->flags : &others[which];
}

GArray *qemu_plugin_get_registers(void)
{
    GArray *array = calloc(1, sizeof *array);
    struct descriptor *each = calloc(REGISTERS, sizeof *each);
    for (size_t i = 0; i < REGISTERS; i++) {
        each[i] = (struct descriptor){(void *)(i + 1), NAMES[i], "core", i == RIP};
    }
    array->data = (char *)each;
    array->len = REGISTERS;
    return array;
}

bool qemu_plugin_read_register(void *handle, GByteArray *bytes)
{
    g_byte_array_set_size(bytes, 8);
    memcpy(bytes->data, slot((size_t)handle - 1), 8);
    return true;
}

bool qemu_plugin_write_register(void *handle, GByteArray *bytes)
{
    memcpy(slot((size_t)handle - 1), bytes->data, 8);
    return true;
}

int qemu_plugin_read_memory_hwaddr(uint64_t address, GByteArray *bytes, size_t size)
{
    if (address > MEMORY || size > MEMORY - address) {
        return 2;
    }
    g_byte_array_set_size(bytes, (unsigned)size);
    memcpy(bytes->data, memory + address, size);
    return 0;
}

int qemu_plugin_write_memory_hwaddr(uint64_t address, GByteArray *bytes)
{
    if (address > MEMORY || bytes->len > MEMORY - address) {
        return 2;
    }
    memcpy(memory + address, bytes->data, bytes->len);
    return 0;
}

/* --- translation: a block of a NOP, the trap, and a NOP --------------------------------- */

typedef void (*callback)(unsigned, void *);
struct registered { callback call; void *data; bool is_conditional; };
static struct { uint8_t code[16]; size_t size; uint64_t address; struct registered calls[4]; size_t count; } insns[3];
static size_t insn_count;
static callback on_vcpu;
static void (*on_translation)(void *, void *);
static uint64_t deferred;

void qemu_plugin_register_vcpu_init_cb(uint64_t id, callback call, void *data)
{
    (void)id, (void)data;
    on_vcpu = call;
}

void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, void (*call)(void *, void *), void *data)
{
    (void)id, (void)data;
    on_translation = call;
}

static void add(void *insn, struct registered call)
{
    size_t which = (size_t)insn - 1;
    insns[which].calls[insns[which].count++] = call;
}

void qemu_plugin_register_vcpu_insn_exec_cb(void *insn, callback call, int flags, void *data)
{
    (void)flags;
    add(insn, (struct registered){call, data, false});
}

struct entry { void *score; size_t offset; };

void qemu_plugin_register_vcpu_insn_exec_cond_cb(void *insn, callback call, int flags, int condition,
                                                 struct entry entry, uint64_t value, void *data)
{
    (void)flags, (void)condition, (void)entry, (void)value;
    add(insn, (struct registered){call, data, true});
}

void *qemu_plugin_scoreboard_new(size_t size) { return size == 8 ? &deferred : NULL; }
void qemu_plugin_u64_set(struct entry entry, unsigned vcpu, uint64_t value)
{
    (void)entry, (void)vcpu;
    deferred = value;
}

size_t qemu_plugin_tb_n_insns(void *block) { (void)block; return insn_count; }
void *qemu_plugin_tb_get_insn(void *block, size_t which) { (void)block; return (void *)(which + 1); }
uint64_t qemu_plugin_insn_vaddr(void *insn) { return insns[(size_t)insn - 1].address; }
size_t qemu_plugin_insn_data(void *insn, void *to, size_t most)
{
    size_t size = insns[(size_t)insn - 1].size;
    size = size < most ? size : most;
    memcpy(to, insns[(size_t)insn - 1].code, size);
    return size;
}

_Noreturn void qemu_plugin_set_pc(uint64_t rip)
{
    left_for = rip;
    longjmp(left, 1);
}

#ifndef NO_INSIDE
static uint64_t trap_at;
void *qemu_get_cpu(int number) { return number ? NULL : cpu; }
bool cpu_restore_state(void *which, uintptr_t place)
{
    (void)place;
    cpu->rip = trap_at;
    return which == cpu;
}
_Noreturn void helper_single_step(void *env)
{
    left_for = cpu->rip;
    longjmp(left, env == cpu->general ? 2 : 3);
}
uint64_t helper_read_eflags(void *env) { return env == cpu->general ? cpu->flags : 0; }
bool runstate_is_running(void) { return true; }
int runstate_get(void) { return 9; }
#endif

/* --- a run ---------------------------------------------------------------------------- */

static void add_insn(const uint8_t *code, size_t size, uint64_t address)
{
    memcpy(insns[insn_count].code, code, size);
    insns[insn_count].size = size;
    insns[insn_count++].address = address;
}

/* Which of the block's instructions is the trap. */
static size_t translate(unsigned kind, uint64_t address, bool begins_with_it)
{
    static const uint8_t CODES[3][3] = {{0x0F, 0xA2}, {0x0F, 0x01, 0xC1}, {0x0F, 0x01, 0xD9}};
    static const uint8_t NOP[] = {0x90};
    size_t size = kind == 1 ? 2 : 3;
    memset(insns, 0, sizeof insns);
    insn_count = 0;
    if (!begins_with_it) {
        add_insn(NOP, 1, address - 1);
    }
    add_insn(CODES[kind - 1], size, address);
    add_insn(NOP, 1, address + size);
    on_translation(NULL, NULL);
    return insn_count - 2;
}

static void run(size_t which)
{
    for (size_t i = 0; i < insns[which].count; i++) {
        if (!insns[which].calls[i].is_conditional || deferred) {
            insns[which].calls[i].call(0, insns[which].calls[i].data);
        }
    }
}

static const char *run_block(unsigned kind, uint64_t address)
{
    volatile bool begins_with_it = false;
    int how = setjmp(left);
    if (how == 2) {
        return "step";
    }
    if (how) {
        if (left_for != address) {
            return how == 1 ? "behind" : "wrong";
        }
        /* The vCPU comes back to the trap, which begins a block now. */
        begins_with_it = true;
    }
    size_t trap = translate(kind, address, begins_with_it);
    cpu->rip = insns[0].address;
    for (size_t i = 0; i <= trap; i++) {
        run(i);
    }
    left_for = address;
    if (!deferred) {
        return "native";
    }
    /* CPUID has run, and the next instruction begins. */
    for (unsigned i = 0; i < 4; i++) {
        *slot(i) = 0xC0FFEE;
    }
    left_for = insns[trap + 1].address;
    run(trap + 1);
    return "behind";
}

static unsigned count_sites(unsigned long long blocks)
{
    void *seen[64];
    unsigned count = 0;
    for (uint64_t i = 0; i < blocks; i++) {
        size_t trap = translate(i % 3 + 1, 0x400000 + 16 * i, i % 2);
        for (size_t k = 0; k < insns[trap].count; k++) {
            void *data = insns[trap].calls[k].data;
            unsigned at = 0;
            while (at < count && seen[at] != data) {
                at++;
            }
            if (at == count && count < 64) {
                seen[count++] = data;
            }
        }
    }
    return count;
}

int qemu_plugin_install(uint64_t, const void *, int, char **);

int main(int count, char **arguments)
{
    struct {
        const char *target;
        struct { int min, cur; } version;
        bool is_system;
        struct { int smp, max; } vcpus;
    } info = {"x86_64", {0, 7}, true, {1, 1}};
    cpu = calloc(1, sizeof *cpu);
    if (qemu_plugin_install(1, &info, count - 1, arguments + 1)) {
        return 1;
    }
    cpu->flags = 2;
    cpu->direction = 1;
    cpu->state = 1 << 7 | 1 << 14 | 1 << 15;
    others[CR0] = 0x80000001;
    others[EFER] = 0x500;
    others[CS] = 8;
    on_vcpu(0, NULL);
    unsigned kind;
    unsigned long long address, flags;
    while (scanf("%u %llx %llx", &kind, &address, &flags) == 3) {
        if (!kind) {
            printf("%u\n", count_sites(address));
            fflush(stdout);
            continue;
        }
#ifndef NO_INSIDE
        trap_at = address;
#endif
        for (unsigned i = 0; i < 4; i++) {
            *slot(i) = 0x1000 * (i + 1);
        }
        *slot(kind == 1 ? 0 : 2) = 0x42494D56;
        cpu->flags = flags | 2;
        const char *how = run_block(kind, address);
        printf("%s %#llx", how, (unsigned long long)left_for);
        for (unsigned i = 0; i < 4; i++) {
            printf(" %#llx", (unsigned long long)*slot(i));
        }
        printf("\n");
        fflush(stdout);
    }
    free(cpu);
    return 0;
}
