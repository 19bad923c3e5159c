"""Any QEMU, under TCG or KVM, by its gdbstub: traps are breakpoints at known addresses."""
