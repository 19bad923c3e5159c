/* The registers of a vCPU, by the plugin API. */
#include <string.h>

#include "plugin.h"

static bool is_named(const char *name, unsigned which)
{
    /* A 32-bit QEMU says EAX for RAX, and has no R8. */
    return !strcmp(name, NAMES[which]) ||
           (which < R8 && *name == 'e' && !strcmp(name + 1, NAMES[which] + 1));
}

/* Whether QEMU has all that a trap needs; only in a callback of this vCPU. */
bool find_registers(struct vcpu *vcpu)
{
    GArray *found = qemu_plugin_get_registers();
    const qemu_plugin_reg_descriptor *each = (void *)found->data;
    const char *missing = NULL;
    for (unsigned k = 0; k < found->len; k++) {
        for (unsigned i = 0; i < REGISTERS; i++) {
            if (is_named(each[k].name, i)) {
                vcpu->handles[i] = each[k].handle;
            }
        }
        if (!strcmp(each[k].name, "rip") || !strcmp(each[k].name, "eip")) {
            vcpu->rip = each[k].handle;
        }
    }
    g_array_free(found, 1);
    for (unsigned i = 0; i < REGISTERS; i++) {
        bool is_absent = settings.register_size == 4 && i >= R8 && i < EFLAGS;
        if (!vcpu->handles[i] && !is_absent) {
            missing = NAMES[i];
        }
    }
    if (!vcpu->rip) {
        missing = "rip";
    }
    if (missing) {
        say("QEMU has no register %s; this vCPU runs natively", missing);
    }
    return !missing;
}

static uint64_t get(struct vcpu *vcpu, void *handle)
{
    uint64_t value = 0;
    g_byte_array_set_size(vcpu->bytes, 0);
    if (handle && qemu_plugin_read_register(handle, vcpu->bytes)) {
        memcpy(&value, vcpu->bytes->data, vcpu->bytes->len < 8 ? vcpu->bytes->len : 8);
    }
    return value;
}

uint64_t get_register(struct vcpu *vcpu, unsigned which)
{
    return get(vcpu, vcpu->handles[which]);
}

uint64_t get_rip(struct vcpu *vcpu)
{
    return get(vcpu, vcpu->rip);
}

void set_register(struct vcpu *vcpu, unsigned which, uint64_t value)
{
    if (!vcpu->handles[which]) {
        return;
    }
    g_byte_array_set_size(vcpu->bytes, settings.register_size);
    memcpy(vcpu->bytes->data, &value, settings.register_size);
    qemu_plugin_write_register(vcpu->handles[which], vcpu->bytes);
}
