// SPDX-License-Identifier: MIT
/*
 * Calls the handler `exchange` from the kernel, by each instruction and on each CPU, when it is
 * loaded. Loading fails with EIO when something was wrong, and with ENODEV when nobody answers.
 *
 * A VMCALL that runs natively is an exception in the kernel. So CPUID is the first, and without an
 * answer the others are not tried.
 */
#define pr_fmt(text) "vmibridge: " text

#include <linux/cpu.h>
#include <linux/delay.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <linux/workqueue.h>

static void sleep_a_little(void *unused)
{
    msleep(20);
}

#include "exchange.h"

static unsigned int count = 100;
module_param(count, uint, 0444);
MODULE_PARM_DESC(count, "calls by each instruction on each CPU");

static long check_cpu(void *unused)
{
    static const char *const NAMES[] = {"", "cpuid", "vmcall", "vmmcall"};
    unsigned char *bytes = kmalloc(2 * EXCHANGE_SIZE, GFP_KERNEL);
    const struct exchange_buffer buffer = {bytes, VMIBRIDGE_ADDRESS(bytes), EXCHANGE_SIZE};
    struct vmibridge_caller caller;
    unsigned int how, cpu = smp_processor_id();
    const char *wrong;
    bool nobody;
    long status = 0;

    if (!bytes)
        return -ENOMEM;
    for (how = VMIBRIDGE_CPUID; how <= VMIBRIDGE_VMMCALL; how++) {
        caller = vmibridge_by(how);
        wrong = exchange(&caller, count, &buffer, &nobody);
        if (!wrong) {
            pr_info("kernel x64 %s cpu %u: right, %u calls\n", NAMES[how], cpu, count);
        } else if (nobody) {
            pr_info("kernel x64 %s cpu %u: nobody\n", NAMES[how], cpu);
            status = -ENODEV;
            break;
        } else {
            pr_info("kernel x64 %s cpu %u: WRONG: %s\n", NAMES[how], cpu, wrong);
            status = -EIO;
        }
    }
    kfree(bytes);
    return status;
}

static int __init vmibridge_test_init(void)
{
    unsigned int cpu;
    long status, worst = 0;

    for_each_online_cpu(cpu) {
        status = work_on_cpu(cpu, check_cpu, NULL);
        if (!worst || status == -EIO)
            worst = status;
    }
    return worst;
}

static void __exit vmibridge_test_exit(void)
{
}

module_init(vmibridge_test_init);
module_exit(vmibridge_test_exit);
MODULE_LICENSE("Dual MIT/GPL");
MODULE_DESCRIPTION("Calls a vmibridge handler from the kernel");
