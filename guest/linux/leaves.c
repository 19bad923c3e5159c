/*
 * leaves CPU: prints what CPUID says on one CPU, a line for each leaf and subleaf:
 *
 *   cpuid LEAF SUBLEAF EAX EBX ECX EDX
 *
 * All leaves of each range that the CPU has, with subleaves 0 to 63. A subleaf that says the same
 * as the one before has no line. Leaves beside the magic of the bridge come last: they are not ours,
 * and run natively.
 */
#include "vmibridge.h"
#include "tiny.h"

enum { MAX_LEAVES = 256, SUBLEAVES = 64 };

struct registers { uint32_t a, b, c, d; };

static struct registers cpuid(uint32_t leaf, uint32_t subleaf)
{
    struct registers is;

    __asm__ volatile("cpuid"
                     : "=a"(is.a), "=b"(is.b), "=c"(is.c), "=d"(is.d)
                     : "a"(leaf), "c"(subleaf));
    return is;
}


static void print_leaf(uint32_t leaf)
{
    struct registers is, before = {0, 0, 0, 0};

    for (uint32_t subleaf = 0; subleaf < SUBLEAVES; subleaf++) {
        is = cpuid(leaf, subleaf);
        if (!subleaf || is.a != before.a || is.b != before.b || is.c != before.c ||
            is.d != before.d) {
            const uint32_t columns[] = {leaf, subleaf, is.a, is.b, is.c, is.d};
            put("cpuid");
            for (unsigned i = 0; i < 6; i++) {
                put(" ");
                put_number(columns[i], 16, 8);
            }
            end_line();
        }
        before = is;
    }
}

static int run(int count, char **arguments)
{
    static const uint32_t RANGES[] = {0, 0x40000000u, 0x80000000u, 0xc0000000u};

    if (count != 2 || !pin(number_of(arguments[1]))) {
        return 1;
    }
    for (unsigned i = 0; i < 4; i++) {
        uint32_t last = cpuid(RANGES[i], 0).a;
        /* A range that the CPU does not have says something else than a leaf of its own. */
        if (last < RANGES[i] || last >= RANGES[i] + MAX_LEAVES) {
            last = RANGES[i];
        }
        for (uint32_t leaf = RANGES[i]; leaf <= last; leaf++) {
            print_leaf(leaf);
        }
    }
    print_leaf(VMIBRIDGE_MAGIC - 1);
    print_leaf(VMIBRIDGE_MAGIC + 1);
    return 0;
}
