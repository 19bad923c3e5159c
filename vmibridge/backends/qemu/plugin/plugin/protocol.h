/* The frames between the plugin and its host; docs/qemu-plugin.md has them byte by byte. */
#ifndef VMIBRIDGE_PROTOCOL_H
#define VMIBRIDGE_PROTOCOL_H

#include <stdint.h>

enum { PROTOCOL = 3, MAX_MAGICS = 64, MAX_VCPUS = 1024, MAX_ACCESS = 16 << 20 };
/* What vmibridge/vm/arch calls the registers below, and their version. */
#define ARCHITECTURE "x86"
enum { ARCHITECTURE_VERSION = 1 };
enum { HELLO = 1, TRAP = 2, MEMORY = 3 };
enum { WELCOME = 16, REFUSED = 17, ANSWER = 18, NATIVE = 19, READ = 20, WRITE = 21 };
enum { CPUID = 1, VMCALL = 2, VMMCALL = 3 };
enum { ANY_HYPERCALL = 1, ANY_CPUID = 2 };
enum { AGAIN = 1, FLAGS_UNKNOWN = 2 };

static const char *const NAMES[] = {
    "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8",  "r9", "r10", "r11",
    "r12", "r13", "r14", "r15", "eflags", "cr0", "cr3", "cr4", "efer", "cs",
};
enum { RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, R8, R15 = 15,
       R_COUNT = 16, EFLAGS = 16, CR0, CR3, CR4, EFER, CS };
enum { REGISTERS = sizeof NAMES / sizeof *NAMES };

struct frame { uint32_t type, length; };
struct hello {
    uint32_t protocol, api;
    uint64_t process;
    uint32_t vcpu, vcpus;
    char target[16];
    char architecture[12];
    uint32_t architecture_version;
};
struct trap {
    uint64_t ip;
    uint8_t kind, length, width, ring;
    uint32_t flags;
    uint64_t registers[REGISTERS];
};
struct answer { uint64_t rip; uint32_t mask, unused; uint64_t values[4]; };
struct access { uint64_t address; uint32_t size, unused; };
struct welcome { uint32_t protocol, kinds, any, count; };

#endif
