/* What the files of the plugin share: settings, the state of a vCPU, and what each file does. */
#ifndef VMIBRIDGE_PLUGIN_H
#define VMIBRIDGE_PLUGIN_H

#include <sys/un.h>

#include "protocol.h"
#include "qemu.h"

enum absent { RUNS_NATIVELY, IS_SKIPPED, WAITS };

struct settings {
    char path[sizeof ((struct sockaddr_un *)0)->sun_path];
    int ram;
    uint32_t magics[MAX_MAGICS];
    unsigned magic_count, kinds, compat;
    enum absent absent;
    bool verbose;
    bool inside;
    /* Whether functions of QEMU beyond the plugin API are used. */
    double patience;
    uint64_t process;
    int vcpus;
    unsigned register_size;
    char target[16];
};
extern struct settings settings;

/* An instruction of an address space. */
struct place { bool set; uint64_t ip, cr3; };

struct vcpu {
    unsigned number;
    int fd;
    bool ready, refused;
    double retry_at;
    double waits_until, waited_at;
    /* When a wait for a host ends, 0 when none has begun; and when it was last waited for. */
    uint32_t magics[MAX_MAGICS];
    unsigned magic_count, kinds, any;
    void *handles[REGISTERS], *rip;
    GByteArray *bytes, *memory;
    struct place native, lost;
    /* The trap that runs natively when the vCPU comes to it next; the one that a host has not answered. */
    char *env;
    unsigned room, searches;
    /* QEMU's state of the CPU, and how many general registers it begins with: 8, 16, or 32 with APX. */
    uint64_t block_ip;
    struct answer deferred;
};
extern struct vcpu vcpus[MAX_VCPUS];

/* plugin.c */
void say(const char *format, const char *what);
double now(void);

/* host.c: the connection of one vCPU. */
bool connected(struct vcpu *);
void hang_up(struct vcpu *, double pause);
enum result { LOST, ANSWERED, RUN_NATIVELY };
enum result ask(struct vcpu *, const struct trap *, double until, struct answer *);

/* registers.c */
bool find_registers(struct vcpu *);
uint64_t get_register(struct vcpu *, unsigned which);
void set_register(struct vcpu *, unsigned which, uint64_t value);
uint64_t get_rip(struct vcpu *);

/* inside.c: QEMU's own functions, where this QEMU has them. */
bool has_inside(void);
bool restore_state(struct vcpu *, uintptr_t in_block);
bool is_shutting_down(void);
unsigned width_inside(struct vcpu *);
bool read_state(struct vcpu *, uint64_t *registers, uint64_t *rip);
bool write_state(struct vcpu *, unsigned which, uint64_t value);
bool read_flags(struct vcpu *, uint64_t *flags);
void take_env(struct vcpu *, char *candidate);
_Noreturn void leave_behind(struct vcpu *, uint64_t rip);

/* sites.c: which instructions trap, and what is known of them when they are translated. */
struct site {
    unsigned kind, length, distance;
    bool is_first;
};
void on_translation(void *block, void *unused);

/* trap.c */
void on_trap(unsigned vcpu, void *site);
void on_trap_of(unsigned vcpu, void *site, char *env);
void on_block(unsigned vcpu, void *unused);
void on_deferred(unsigned vcpu, void *unused);
extern qemu_plugin_u64 deferred;
struct site unpacked(void *data);

#endif
