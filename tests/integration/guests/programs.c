/*
 * Linux programs whose traps are in unusual places: programs pie|stepped|swapped, and, with -DLIBRARY,
 * the library that `linked` is linked to. Each trap says in value1 where it is, and takes ~value1 for
 * an answer; carry is set before, and has to be set behind.
 */
#define _GNU_SOURCE
#include <stdio.h>

#define TRAP ".byte 0x0f, 0x01, 0xc1"

int trap_here(void);

#ifndef LINKED
int trap_here(void)
{
    register unsigned long at __asm__("r8");
    unsigned long answer;
    unsigned char carry;
    __asm__ volatile("lea 1f(%%rip), %%r8\n"
                     "mov $0x42494d56, %%ecx\n"
                     "mov $0x0100, %%edx\n"
                     "stc\n"
                     "1: " TRAP "\n"
                     "setc %2\n"
                     : "=a"(answer), "=r"(at), "=q"(carry)
                     :
                     : "rcx", "rdx", "cc", "memory");
    return carry && answer == ~at;
}
#endif

#ifndef LIBRARY
static int say(const char *what, int is_right)
{
    printf("vmibridge: %s %s\n", what, is_right ? "right" : "WRONG");
    fflush(stdout);
    return !is_right;
}

#ifdef LINKED
int main(void)
{
    return say("linked", trap_here());
}
#else
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/time.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

/* Two traps in a row, which a debugger steps over. */
__asm__(".globl stepped, stepped_vmcall, stepped_cpuid, stepped_end\n"
        "stepped:\n"
        "    lea stepped_vmcall(%rip), %r8\n"
        "    mov $0x42494d56, %ecx\n"
        "    mov $0x0100, %edx\n"
        "stepped_vmcall:\n"
        "    .byte 0x0f, 0x01, 0xc1\n"
        "    lea stepped_cpuid(%rip), %r8\n"
        "    mov $0x42494d56, %eax\n"
        "    mov $0x0100, %ecx\n"
        "stepped_cpuid:\n"
        "    cpuid\n"
        "stepped_end:\n"
        "    ret\n");
void stepped(void);
extern char stepped_vmcall[], stepped_cpuid[], stepped_end[];

static int step(pid_t child, struct user_regs_struct *registers)
{
    int status;
    ptrace(PTRACE_SINGLESTEP, child, 0, 0);
    waitpid(child, &status, 0);
    ptrace(PTRACE_GETREGS, child, 0, registers);
    return WIFSTOPPED(status) && WSTOPSIG(status) == SIGTRAP;
}

static int debug(void)
{
    pid_t child = fork();
    if (!child) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        __asm__ volatile("call stepped" ::: "rax", "rbx", "rcx", "rdx", "r8", "memory", "cc");
        _exit(7);
    }
    int status, met = 0, is_right = 1;
    struct user_regs_struct registers = {0};
    waitpid(child, &status, 0);
    for (int i = 0; i < 100000 && is_right && met < 2; i++) {
        uintptr_t before = registers.rip;
        is_right = step(child, &registers);
        if (before == (uintptr_t)stepped_vmcall) {
            is_right &= registers.rip == before + 3 && registers.rax == ~(uint64_t)before;
            met++;
        }
        if (before == (uintptr_t)stepped_cpuid) {
            is_right &= registers.rip == (uintptr_t)stepped_end && registers.rax == ~(uint64_t)before;
            met++;
        }
    }
    ptrace(PTRACE_CONT, child, 0, 0);
    waitpid(child, &status, 0);
    return is_right && met == 2 && WIFEXITED(status) && WEXITSTATUS(status) == 7;
}

/* A page that two processes have at different addresses: lea, mov, mov, VMCALL, ret. */
static const unsigned char CODE[] = {
    0x4C, 0x8D, 0x05, 0x0A, 0, 0, 0, 0xB9, 0x56, 0x4D, 0x49, 0x42,
    0xBA, 0x00, 0x01, 0, 0, 0x0F, 0x01, 0xC1, 0xC3,
};
enum { TRAP_AT = 17, ROUNDS = 150 };
static char *page;
static volatile int wrong, swaps;
static const struct itimerval soon = {{0, 0}, {0, 2000}};

static uint64_t call_page(void)
{
    uint64_t answer;
    __asm__ volatile("call *%1"
                     : "=a"(answer)
                     : "r"(page)
                     : "rcx", "rdx", "r8", "cc", "memory");
    return answer;
}

static void on_alarm(int number)
{
    (void)number;
    wrong |= call_page() != ~(uint64_t)(page + TRAP_AT);
    swaps++;
    sched_yield();
    setitimer(ITIMER_REAL, &soon, NULL); /* not sooner: a call may take longer than that */
}

static int swap(void)
{
    int file = memfd_create("code", 0);
    pid_t child;
    if (write(file, CODE, sizeof CODE) != sizeof CODE) {
        return 0;
    }
    child = fork();
    char *where = (char *)(child ? 0x10000000L : 0x20000000L);
    page = mmap(where, 4096, PROT_READ | PROT_EXEC, MAP_SHARED | MAP_FIXED, file, 0);
    struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    struct itimerval never = {{0, 0}, {0, 0}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &soon, NULL);
    for (int i = 0; i < ROUNDS || swaps < 10; i++) {
        wrong |= call_page() != ~(uint64_t)(page + TRAP_AT);
        if (i % 10 == 0) {
            sched_yield();
        }
    }
    setitimer(ITIMER_REAL, &never, NULL);
    if (!child) {
        _exit(wrong);
    }
    int status;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    return !wrong && WIFEXITED(status) && !WEXITSTATUS(status);
}

int main(int count, char **arguments)
{
    const char *what = count > 1 ? arguments[1] : "";
    int is_right = !strcmp(what, "pie") ? trap_here() : !strcmp(what, "stepped") ? debug() : swap();
    return say(what, is_right);
}
#endif
#endif
