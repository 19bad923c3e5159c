/*
 * The instructions that may trap, found when QEMU translates them.
 *
 * What a callback gets of its instruction fits into a pointer: no table, no lock, nothing to
 * free. It holds no address: one translation serves a page at each address that it is mapped at.
 */
#include <string.h>

#include "plugin.h"

enum { DISTANCE = 16 };

static void *packed(struct site site)
{
    return (void *)(uintptr_t)(site.kind | site.length << 2 | (unsigned)site.is_first << 6 |
                               site.distance << DISTANCE);
}

struct site unpacked(void *data)
{
    uintptr_t value = (uintptr_t)data;
    return (struct site){
        .kind = value & 3,
        .length = value >> 2 & 15,
        .is_first = value >> 6 & 1,
        .distance = value >> DISTANCE,
    };
}

/*
 * LOCK is not among them: the processor refuses it. 0x40 to 0x4F before something else is REX, in
 * whatever place: QEMU has found out how long the instruction is, and in 32-bit code such a byte
 * is one by itself.
 */
static size_t prefixes_of(const uint8_t *code, size_t size)
{
    static const uint8_t LEGACY[] = {0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF2, 0xF3};
    size_t count = 0;
    while (count < size &&
           ((code[count] & 0xF0) == 0x40 || memchr(LEGACY, code[count], sizeof LEGACY))) {
        count++;
    }
    return count;
}

static unsigned kind_of(const uint8_t *code, size_t size)
{
    if (size == 2 && code[0] == 0x0F && code[1] == 0xA2) {
        return CPUID;
    }
    if (size == 3 && code[0] == 0x0F && code[1] == 0x01) {
        return code[2] == 0xC1 ? VMCALL : code[2] == 0xD9 ? VMMCALL : 0;
    }
    return 0;
}

/* Where QEMU cannot say where a trap is: note where its block begins. And answers that wait. */
static void watch_outside(void *insn, bool is_first, bool follows_cpuid)
{
    if (is_first) {
        qemu_plugin_register_vcpu_insn_exec_cb(insn, on_block, CB_R_REGS, NULL);
    }
    if (is_first || follows_cpuid) {
        qemu_plugin_register_vcpu_insn_exec_cond_cb(insn, on_deferred, CB_RW_REGS, COND_NE,
                                                    deferred, 0, NULL);
    }
}

void on_translation(void *block, void *unused)
{
    (void)unused;
    size_t count = qemu_plugin_tb_n_insns(block);
    bool follows_cpuid = false;
    for (size_t i = 0; i < count; i++) {
        void *insn = qemu_plugin_tb_get_insn(block, i);
        uint8_t code[16];
        size_t size = qemu_plugin_insn_data(insn, code, sizeof code);
        size_t prefixes = prefixes_of(code, size);
        unsigned kind = kind_of(code + prefixes, size - prefixes);
        bool is_trap = kind && size < 16 && settings.kinds >> kind & 1;
        if (!settings.inside) {
            watch_outside(insn, i == 0, follows_cpuid);
        }
        if (is_trap) {
            uint64_t start = qemu_plugin_insn_vaddr(qemu_plugin_tb_get_insn(block, 0));
            struct site site = {
                .kind = kind,
                .length = size,
                .distance = qemu_plugin_insn_vaddr(insn) - start,
                .is_first = i == 0,
            };
            qemu_plugin_register_vcpu_insn_exec_cb(insn, on_trap, CB_RW_REGS_PC, packed(site));
        }
        follows_cpuid = is_trap && kind == CPUID;
    }
}
