// SPDX-License-Identifier: MIT
/*
 * Calls each method from the kernel, by each instruction, when it is loaded.
 */
#define pr_fmt(text) "vmibridge: " text

#include <linux/delay.h>
#include <linux/module.h>
#include <linux/vmalloc.h>

#include "called_methods.h"

static void sleep_a_little(void *unused)
{
    msleep(2);
}

static int __init called_methods_init(void)
{
    struct vmibridge_caller caller = vmibridge_by(VMIBRIDGE_CPUID);
    struct called_buffers buffers = {vzalloc(ROOM + 1), vzalloc(ROOM + 1)};
    unsigned int how, passed;

    caller.sleep = sleep_a_little;
    for (how = VMIBRIDGE_CPUID; how <= VMIBRIDGE_VMMCALL && buffers.ours && buffers.theirs; how++) {
        caller.how = how;
        passed = call_all(&caller, &buffers);
        if (passed == PASSED)
            pr_info("kernel x64 %u: right\n", how);
        else
            pr_info("kernel x64 %u: WRONG: line %u\n", how, passed);
    }
    vfree(buffers.ours);
    vfree(buffers.theirs);
    return 0;
}

static void __exit called_methods_exit(void)
{
}

module_init(called_methods_init);
module_exit(called_methods_exit);
MODULE_LICENSE("Dual MIT/GPL");
MODULE_DESCRIPTION("Calls the methods of a vmibridge handler from the kernel");
