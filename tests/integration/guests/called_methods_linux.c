/*
 * called HOW: calls each method from a program of Linux, with buffers whose pages were never touched.
 */
#include "called_methods.h"
#include "tiny.h"

static unsigned char ours[ROOM + 1], theirs[ROOM + 1];

static void sleep_a_little(void *unused)
{
    (void)unused;
    sleep_for(2);
}

static int run(int count, char **arguments)
{
    struct vmibridge_caller caller = vmibridge_by(
        (enum vmibridge_how)(count == 2 ? number_of(arguments[1]) : VMIBRIDGE_CPUID));
    struct called_buffers buffers;
    unsigned passed;

    caller.sleep = sleep_a_little;
    buffers.ours = ours;
    buffers.theirs = theirs;
    passed = call_all(&caller, &buffers);
    put("vmibridge: user ");
    put(sizeof(void *) == 8 ? "x64 " : "x86 ");
    put_number((unsigned)caller.how, 10, 1);
    put(passed == PASSED ? ": right" : ": WRONG: line ");
    if (passed != PASSED) {
        put_number(passed, 10, 1);
    }
    end_line();
    return passed == PASSED ? 0 : 1;
}
