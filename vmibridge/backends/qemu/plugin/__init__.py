"""Stock QEMU, by a TCG plugin that traps CPUID, VMCALL and VMMCALL anywhere."""
