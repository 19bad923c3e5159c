/* What QEMU's plugin API and GLib offer. Declared here, so that no header of theirs is needed. */
#ifndef VMIBRIDGE_QEMU_H
#define VMIBRIDGE_QEMU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { API = 7 };
enum { CB_R_REGS = 1, CB_RW_REGS = 2, CB_RW_REGS_PC = 3 };
enum { COND_NE = 3 };

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
typedef struct { void *score; size_t offset; } qemu_plugin_u64;
typedef void (*vcpu_callback)(unsigned vcpu, void *data);

extern GByteArray *g_byte_array_new(void);
extern GByteArray *g_byte_array_set_size(GByteArray *, unsigned);
extern void *g_array_free(GArray *, int);
extern void qemu_plugin_register_vcpu_init_cb(qemu_plugin_id_t, vcpu_callback, void *);
extern void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, void (*)(void *, void *), void *);
extern void qemu_plugin_register_vcpu_insn_exec_cb(void *, vcpu_callback, int, void *);
extern void qemu_plugin_register_vcpu_insn_exec_cond_cb(void *, vcpu_callback, int, int,
                                                        qemu_plugin_u64, uint64_t, void *);
extern void *qemu_plugin_scoreboard_new(size_t);
extern void qemu_plugin_u64_set(qemu_plugin_u64, unsigned, uint64_t);
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

#endif
