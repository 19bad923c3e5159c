/*
 * calls HOW CPU COUNT: calls the handler `exchange` from a program, by cpuid, vmcall or vmmcall, on
 * one CPU, and checks every answer. Built for x64 and for x86.
 *
 * Ends with 0 when all was right, 2 when nobody answers, and else with 1. Where VMCALL is undefined
 * and runs natively, it ends by SIGILL.
 */
#include "exchange.h"
#include "tiny.h"

static unsigned char bytes[2 * EXCHANGE_SIZE];

static void sleep_a_little(void *unused)
{
    (void)unused;
    sleep_for(20);
}

static int run(int count, char **arguments)
{
    static const char *const NAMES[] = {"cpuid", "vmcall", "vmmcall"};
    const struct exchange_buffer buffer = {bytes, VMIBRIDGE_ADDRESS(bytes), EXCHANGE_SIZE};
    struct vmibridge_caller caller;
    unsigned how = 0, cpu, calls, start, end;
    const char *wrong;
    bool nobody;

    for (unsigned i = 0; count == 4 && i < 3; i++) {
        how = same(arguments[1], NAMES[i]) ? i + VMIBRIDGE_CPUID : how;
    }
    if (!how) {
        put("calls cpuid|vmcall|vmmcall CPU COUNT");
        end_line();
        return 1;
    }
    cpu = number_of(arguments[2]);
    calls = number_of(arguments[3]);
    start = microseconds();
    caller = vmibridge_by((enum vmibridge_how)how);
    wrong = pin(cpu) ? exchange(&caller, calls, &buffer, &nobody) : "no such CPU";
    end = microseconds();

    put("vmibridge: user ");
    put(sizeof(void *) == 8 ? "x64 " : "x86 ");
    put(arguments[1]);
    put(" cpu ");
    put_number(cpu, 10, 1);
    if (!wrong) {
        put(": right, ");
        put_number(calls, 10, 1);
        put(" calls, ");
        put_number((end - start) / 1000, 10, 1);
        put(" ms");
        end_line();
        return 0;
    }
    put(same(wrong, "nobody") ? ": " : ": WRONG: ");
    put(wrong);
    end_line();
    return same(wrong, "nobody") ? 2 : 1;
}
