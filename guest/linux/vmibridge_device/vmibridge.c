// SPDX-License-Identifier: MIT
/*
 * The driver of the PCI devices that carry calls of vmibridge: vfio-user, and ivshmem-doorbell whose
 * memory has our header. Each device is /dev/vmibridgeN; vmibridge_driver.h says what that offers.
 *
 * - An open file has a slot. What a program maps is its own two pages, and nothing of another slot.
 * - The space of a slot (page 1 of the device) is written here alone: the page tables of the process
 *   that has asked for it, as ring 3 sees them, and only once it has pinned memory to be reached.
 * - A slot whose file was closed while the host was at its call is given to nobody until the host has
 *   let go of it; until then the page tables stay, though the memory that they mapped has gone.
 * - A device that is unplugged reads as all ones in its mappings.
 *
 * Locks, in their order: `sharing` of a slot, mmap_lock, `lock` of a device. So nothing is pinned or
 * unpinned with the last: what is to be freed is put aside.
 */
#define pr_fmt(text) "vmibridge: " text

#include <linux/idr.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/kref.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/pci.h>
#include <linux/poll.h>
#include <linux/random.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/version.h>
#include <linux/wait.h>

#include "vmibridge_device.h"
#include "vmibridge_driver.h"

enum { MAX_SLOTS = 256, MAX_PINNED = 16, INTERFACE = 1 };

/* Memory of a program that stays where it is. */
struct pinned {
    struct page **pages;
    unsigned long count;
};

struct bridge;

/* A slot, from `open` until the host has let go of it. */
struct taken {
    struct bridge *bridge;
    struct taken *next; /* to be freed, too */
    struct address_space *mapping; /* of the file; NULL: it was closed */
    wait_queue_head_t changed;
    struct mutex sharing;
    struct mm_struct *mm; /* whose page tables the host may walk */
    unsigned int pinned_count;
    struct pinned pinned[MAX_PINNED];
    unsigned int slot;
};

/* A device. */
struct bridge {
    struct kref references;
    struct mutex lock; /* of all below */
    struct pci_dev *pci;
    struct miscdevice misc;
    struct vmibridge_device device;
    phys_addr_t pages; /* of the device's memory */
    bool is_gone;
    int number, vectors;
    char name[24];
    struct taken *taken[MAX_SLOTS];
    struct vector {
        struct bridge *bridge;
        int number;
    } vector[MAX_SLOTS];
};

static DEFINE_IDA(numbers);
static struct page *ones;

static volatile struct vmibridge_slot_page *page_of(const struct taken *taken)
{
    return (volatile struct vmibridge_slot_page *)(taken->bridge->device.memory +
                                                   (3 + 2 * (size_t)taken->slot) *
                                                       VMIBRIDGE_DEVICE_PAGE);
}

static volatile struct vmibridge_device_space *space_of(const struct taken *taken)
{
    return (volatile struct vmibridge_device_space *)(taken->bridge->device.memory +
                                                      VMIBRIDGE_DEVICE_PAGE) +
           taken->slot;
}

static bool is_over(const struct taken *taken)
{
    const u32 state = page_of(taken)->state;

    return state != VMIBRIDGE_SLOT_CALLED && state != VMIBRIDGE_SLOT_TAKEN;
}

static void ring(const struct taken *taken)
{
    struct vmibridge_slot slot;

    if (vmibridge_slot_open(&taken->bridge->device, taken->slot, &slot))
        vmibridge_slot_ring(&slot);
}

/* Give up what is open. The doorbell waits a little for the host, so no spinlock is held. */
static void cancel(const struct taken *taken)
{
    struct vmibridge_slot slot;

    if (is_over(taken) || !vmibridge_slot_open(&taken->bridge->device, taken->slot, &slot))
        return;
    if (page_of(taken)->state == VMIBRIDGE_SLOT_CALLED)
        vmibridge_slot_ring(&slot); /* nobody may have */
    vmibridge_slot_cancel(&slot);
}

static void bridge_free(struct kref *references)
{
    struct bridge *bridge = container_of(references, struct bridge, references);

    kfree(bridge);
}

static void unpin(struct taken *taken)
{
    struct pinned *pinned;
    unsigned int i;

    for (i = 0; i < taken->pinned_count; i++) {
        pinned = &taken->pinned[i];
        unpin_user_pages_dirty_lock(pinned->pages, pinned->count, true);
        account_locked_vm(taken->mm, pinned->count, false);
        kvfree(pinned->pages);
    }
    taken->pinned_count = 0;
}

/* Nobody has these slots any more: neither a file nor the host. Without the lock. */
static void free_all(struct taken *taken)
{
    struct taken *next;

    for (; taken; taken = next) {
        next = taken->next;
        unpin(taken);
        if (taken->mm)
            mmdrop(taken->mm);
        kfree(taken);
    }
}

/* Wipe a closed slot that the host has let go of, and put it aside, to be freed. */
static void reap(struct bridge *bridge, unsigned int slot, struct taken **aside)
{
    struct taken *taken = bridge->taken[slot];
    volatile struct vmibridge_slot_page *page;
    volatile u8 *payload;
    unsigned int i;

    if (!taken || taken->mapping || !is_over(taken))
        return;
    page = page_of(taken);
    /* Whoever had it may have written any number there: not one that was answered already. */
    page->number = get_random_u32();
    page->magic = page->request = page->method = page->flags = 0;
    page->space = page->state = 0;
    for (i = 0; i < 4; i++)
        page->values[i] = 0;
    payload = page->payload;
    for (i = 0; i < sizeof page->payload; i++)
        payload[i] = 0;
    bridge->taken[slot] = NULL;
    taken->next = *aside;
    *aside = taken;
}

/* --- files ----------------------------------------------------------------------------------- */

static int bridge_open(struct inode *inode, struct file *file)
{
    struct bridge *bridge = container_of(file->private_data, struct bridge, misc);
    const u32 slots = bridge->device.header.slots;
    struct taken *taken = kzalloc(sizeof *taken, GFP_KERNEL_ACCOUNT), *aside = NULL;
    unsigned int slot;
    int error = -EBUSY;

    if (!taken)
        return -ENOMEM;
    init_waitqueue_head(&taken->changed);
    mutex_init(&taken->sharing);
    taken->bridge = bridge;
    taken->mapping = file->f_mapping;
    file->private_data = taken;
    mutex_lock(&bridge->lock);
    if (bridge->is_gone) {
        error = -ENODEV;
        goto out;
    }
    for (slot = bridge->device.header.kernel_slots; slot < slots; slot++) {
        reap(bridge, slot, &aside);
        taken->slot = slot;
        /* One whose call is not over is of somebody without this driver. */
        if (!bridge->taken[slot] && is_over(taken)) {
            bridge->taken[slot] = taken;
            kref_get(&bridge->references);
            error = 0;
            break;
        }
    }
out:
    mutex_unlock(&bridge->lock);
    free_all(aside);
    if (error)
        kfree(taken);
    return error;
}

static int bridge_release(struct inode *inode, struct file *file)
{
    struct taken *taken = file->private_data;
    struct bridge *bridge = taken->bridge;
    struct taken *aside = NULL;

    mutex_lock(&bridge->lock);
    taken->mapping = NULL;
    if (bridge->is_gone) {
        bridge->taken[taken->slot] = NULL;
        aside = taken;
    } else {
        cancel(taken);
        space_of(taken)->root = 0;
        reap(bridge, taken->slot, &aside);
    }
    mutex_unlock(&bridge->lock);
    free_all(aside);
    kref_put(&bridge->references, bridge_free);
    return 0;
}

static vm_fault_t bridge_fault(struct vm_fault *fault)
{
    struct taken *taken = fault->vma->vm_private_data;
    struct bridge *bridge = taken->bridge;
    unsigned long pfn = page_to_pfn(ones);
    vm_fault_t result;

    mutex_lock(&bridge->lock);
    if (!bridge->is_gone)
        pfn = PHYS_PFN(bridge->pages) + 2 + 2 * taken->slot + fault->pgoff;
    result = fault->pgoff < 2 ? vmf_insert_pfn(fault->vma, fault->address, pfn) : VM_FAULT_SIGBUS;
    mutex_unlock(&bridge->lock);
    return result;
}

static const struct vm_operations_struct VM_OPERATIONS = {.fault = bridge_fault};

static int bridge_mmap(struct file *file, struct vm_area_struct *vma)
{
    /* Not for children: two processes would have one slot. */
    const unsigned long flags = VM_IO | VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP | VM_DONTCOPY;

    if (vma->vm_pgoff || vma_pages(vma) != 2 || !(vma->vm_flags & VM_SHARED))
        return -EINVAL;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
    vm_flags_set(vma, flags);
#else
    vma->vm_flags |= flags;
#endif
    vma->vm_page_prot = pgprot_noncached(vma->vm_page_prot);
    vma->vm_private_data = file->private_data;
    vma->vm_ops = &VM_OPERATIONS;
    return 0;
}

static __poll_t bridge_poll(struct file *file, poll_table *table)
{
    struct taken *taken = file->private_data;
    __poll_t result;

    poll_wait(file, &taken->changed, table);
    mutex_lock(&taken->bridge->lock);
    if (taken->bridge->is_gone)
        result = EPOLLHUP | EPOLLERR;
    else
        result = is_over(taken) ? EPOLLIN | EPOLLRDNORM : 0;
    mutex_unlock(&taken->bridge->lock);
    return result;
}

static ssize_t bridge_write(struct file *file, const char __user *from, size_t size, loff_t *at)
{
    struct taken *taken = file->private_data;
    ssize_t result = (ssize_t)size;

    mutex_lock(&taken->bridge->lock);
    if (taken->bridge->is_gone)
        result = -ENODEV;
    else
        ring(taken);
    mutex_unlock(&taken->bridge->lock);
    return result;
}

/* CR3 of a process as ring 3 has it. */
static u64 user_root(struct mm_struct *mm)
{
    pgd_t *root = mm->pgd;

#ifdef CONFIG_PAGE_TABLE_ISOLATION
    if (boot_cpu_has(X86_FEATURE_PTI))
        root = kernel_to_user_pgdp(root);
#endif
    return virt_to_phys(root);
}

/* Pin memory of this process, and let the host walk its page tables. With `sharing`. */
static long share(struct taken *taken, const struct vmibridge_driver_memory *memory)
{
    const u64 first = memory->address & PAGE_MASK;
    struct pinned *pinned = &taken->pinned[taken->pinned_count];
    struct mm_struct *mm = current->mm;
    volatile struct vmibridge_device_space *space = space_of(taken);
    unsigned long count;
    long error, done;

    if (!memory->size || memory->size > TASK_SIZE || memory->address > TASK_SIZE - memory->size)
        return -EINVAL;
    if (!taken->bridge->device.header.kernel_slots)
        return -EOPNOTSUPP; /* the host believes no space */
    /* The space of a slot is that of one process. */
    if (taken->mm && taken->mm != mm)
        return -EPERM;
    if (taken->pinned_count == MAX_PINNED)
        return -ENOSPC;
    count = PFN_UP(memory->address + memory->size) - PFN_DOWN(first);
    if (count > INT_MAX)
        return -EINVAL;
    error = account_locked_vm(mm, count, true);
    if (error)
        return error;
    pinned->pages = kvmalloc_array(count, sizeof *pinned->pages, GFP_KERNEL_ACCOUNT);
    if (!pinned->pages) {
        error = -ENOMEM;
        goto unaccount;
    }
    done = pin_user_pages_fast(first, (int)count, FOLL_WRITE | FOLL_LONGTERM, pinned->pages);
    if (done != (long)count) {
        error = done < 0 ? done : -EFAULT;
        if (done > 0)
            unpin_user_pages(pinned->pages, (unsigned long)done);
        goto free;
    }
    pinned->count = count;
    taken->pinned_count++;

    mutex_lock(&taken->bridge->lock);
    if (!taken->mm) {
        mmgrab(mm);
        taken->mm = mm;
    }
    error = taken->bridge->is_gone ? -ENODEV : 0;
    if (!error && !space->root) {
        space->flags = pgtable_l5_enabled() ? VMIBRIDGE_SLOT_PAGING_5 : VMIBRIDGE_SLOT_PAGING_4;
        space->owner = (u32)task_tgid_nr(current);
        wmb();
        space->root = user_root(mm);
    }
    mutex_unlock(&taken->bridge->lock);
    return error;

free:
    kvfree(pinned->pages);
unaccount:
    account_locked_vm(mm, count, false);
    return error;
}

static long bridge_ioctl(struct file *file, unsigned int request, unsigned long argument)
{
    struct taken *taken = file->private_data;
    struct vmibridge_driver_about about = {taken->slot, 0, INTERFACE, 0};
    struct vmibridge_driver_memory memory;
    long error;

    switch (request) {
    case VMIBRIDGE_DRIVER_ABOUT:
        about.kind = taken->bridge->device.registers ? VMIBRIDGE_DEVICE_IVSHMEM
                                                     : VMIBRIDGE_DEVICE_VFIO_USER;
        return copy_to_user((void __user *)argument, &about, sizeof about) ? -EFAULT : 0;
    case VMIBRIDGE_DRIVER_SHARE:
        if (copy_from_user(&memory, (void __user *)argument, sizeof memory))
            return -EFAULT;
        mutex_lock(&taken->sharing);
        error = share(taken, &memory);
        mutex_unlock(&taken->sharing);
        return error;
    default:
        return -ENOTTY;
    }
}

static const struct file_operations FILE_OPERATIONS = {
    .owner = THIS_MODULE,
    .open = bridge_open,
    .release = bridge_release,
    .mmap = bridge_mmap,
    .poll = bridge_poll,
    .write = bridge_write,
    .unlocked_ioctl = bridge_ioctl,
    .compat_ioctl = compat_ptr_ioctl,
    .llseek = noop_llseek,
};

/* --- the device ------------------------------------------------------------------------------ */

static irqreturn_t on_interrupt(int number, void *state)
{
    const struct vector *vector = state;
    struct bridge *bridge = vector->bridge;
    struct taken *taken;
    u32 slot;

    /* In a thread of its own, so that the lock may be waited for. */
    mutex_lock(&bridge->lock);
    for (slot = (u32)vector->number; slot < bridge->device.header.slots;
         slot += (u32)bridge->vectors) {
        taken = bridge->taken[slot];
        if (taken && is_over(taken))
            wake_up_interruptible_poll(&taken->changed, EPOLLIN | EPOLLRDNORM);
    }
    mutex_unlock(&bridge->lock);
    return IRQ_HANDLED;
}

static void free_vectors(struct bridge *bridge, int count)
{
    while (count--)
        free_irq(pci_irq_vector(bridge->pci, count), &bridge->vector[count]);
    pci_free_irq_vectors(bridge->pci);
}

static int request_vectors(struct bridge *bridge)
{
    int most = (int)bridge->device.header.vectors, error, i;

    most = clamp(most, 1, (int)bridge->device.header.slots);
    bridge->vectors = pci_alloc_irq_vectors(bridge->pci, 1, most, PCI_IRQ_MSI | PCI_IRQ_MSIX);
    if (bridge->vectors < 0)
        return bridge->vectors;
    for (i = 0; i < bridge->vectors; i++) {
        bridge->vector[i].bridge = bridge;
        bridge->vector[i].number = i;
        error = request_threaded_irq(pci_irq_vector(bridge->pci, i), NULL, on_interrupt,
                                     IRQF_ONESHOT, bridge->name, &bridge->vector[i]);
        if (error) {
            free_vectors(bridge, i);
            return error;
        }
    }
    return 0;
}

static int bridge_map(struct bridge *bridge)
{
    const bool is_ivshmem = bridge->pci->vendor == 0x1af4;
    const int bar = is_ivshmem ? 2 : 0;
    void __iomem *registers = is_ivshmem ? pci_ioremap_bar(bridge->pci, 0) : NULL;
    void __iomem *memory = pci_ioremap_bar(bridge->pci, bar);

    if (memory && (registers || !is_ivshmem)) {
        bridge->pages = pci_resource_start(bridge->pci, bar);
        /* x86 reads and writes it like any other memory. */
        if (vmibridge_device_open(&bridge->device, (void __force *)memory,
                                  (void __force *)registers) &&
            (2 + 2 * (u64)bridge->device.header.slots) * VMIBRIDGE_DEVICE_PAGE <=
                pci_resource_len(bridge->pci, bar))
            return 0;
    }
    if (memory)
        iounmap(memory);
    if (registers)
        iounmap(registers);
    return -ENODEV; /* another use of ivshmem, or no host */
}

static void bridge_unmap(struct bridge *bridge)
{
    iounmap((void __iomem __force *)bridge->device.memory);
    if (bridge->device.registers)
        iounmap((void __iomem __force *)bridge->device.registers);
}

static int bridge_probe(struct pci_dev *pci, const struct pci_device_id *id)
{
    struct bridge *bridge = kzalloc(sizeof *bridge, GFP_KERNEL);
    int error;

    if (!bridge)
        return -ENOMEM;
    kref_init(&bridge->references);
    mutex_init(&bridge->lock);
    bridge->pci = pci;
    error = pci_enable_device(pci);
    if (error)
        goto free;
    /* Enabled through sysfs, a device stays so when its driver is unloaded, and Linux forgets its power
       state. Then enabling it does not set that again, and without it there are no interrupts. */
    pci_set_power_state(pci, PCI_D0);
    /* Exclusive: what has a driver is not mapped through sysfs. */
    error = pci_request_regions_exclusive(pci, "vmibridge");
    if (error)
        goto disable;
    error = bridge_map(bridge);
    if (error)
        goto release;
    bridge->number = ida_alloc(&numbers, GFP_KERNEL);
    if (bridge->number < 0) {
        error = bridge->number;
        goto unmap;
    }
    snprintf(bridge->name, sizeof bridge->name, "vmibridge%d", bridge->number);
    pci_set_master(pci);
    error = request_vectors(bridge);
    if (error)
        goto forget;
    bridge->misc.minor = MISC_DYNAMIC_MINOR;
    bridge->misc.name = bridge->name;
    bridge->misc.fops = &FILE_OPERATIONS;
    bridge->misc.parent = &pci->dev;
    pci_set_drvdata(pci, bridge);
    error = misc_register(&bridge->misc);
    if (error)
        goto vectors;
    pci_info(pci, "/dev/%s: %u slots\n", bridge->name,
             bridge->device.header.slots - bridge->device.header.kernel_slots);
    return 0;

vectors:
    free_vectors(bridge, bridge->vectors);
forget:
    ida_free(&numbers, (unsigned int)bridge->number);
unmap:
    bridge_unmap(bridge);
release:
    pci_release_regions(pci);
disable:
    pci_disable_device(pci);
free:
    kfree(bridge);
    return error;
}

static void bridge_remove(struct pci_dev *pci)
{
    struct bridge *bridge = pci_get_drvdata(pci);
    struct taken *taken, *aside = NULL;
    unsigned int slot;

    misc_deregister(&bridge->misc);
    free_vectors(bridge, bridge->vectors);
    mutex_lock(&bridge->lock);
    for (slot = 0; slot < MAX_SLOTS; slot++) {
        taken = bridge->taken[slot];
        if (!taken)
            continue;
        /* The device may be there still: the driver alone is unloaded. */
        cancel(taken);
        space_of(taken)->root = 0;
        if (taken->mapping) {
            continue;
        } else if (is_over(taken)) {
            reap(bridge, slot, &aside);
        } else {
            /* The host may walk these page tables: better lost than used for something else. */
            pci_warn(pci, "slot %u is at a call that nobody waits for\n", slot);
            bridge->taken[slot] = NULL;
        }
    }
    bridge->is_gone = true;
    for (slot = 0; slot < MAX_SLOTS; slot++) {
        taken = bridge->taken[slot];
        if (!taken)
            continue;
        unmap_mapping_range(taken->mapping, 0, 0, 1);
        wake_up_interruptible_poll(&taken->changed, EPOLLHUP | EPOLLERR);
    }
    mutex_unlock(&bridge->lock);
    free_all(aside);
    ida_free(&numbers, (unsigned int)bridge->number);
    bridge_unmap(bridge);
    pci_release_regions(pci);
    pci_disable_device(pci);
    kref_put(&bridge->references, bridge_free);
}

static const struct pci_device_id IDS[] = {
    {PCI_DEVICE(0x1234, 0x564d)},
    {PCI_DEVICE(0x1af4, 0x1110)},
    {0},
};
MODULE_DEVICE_TABLE(pci, IDS);

static struct pci_driver driver = {
    .name = "vmibridge",
    .id_table = IDS,
    .probe = bridge_probe,
    .remove = bridge_remove,
};

static int __init vmibridge_init(void)
{
    int error;

    ones = alloc_page(GFP_KERNEL);
    if (!ones)
        return -ENOMEM;
    memset(page_address(ones), 0xff, PAGE_SIZE);
    error = pci_register_driver(&driver);
    if (error)
        __free_page(ones);
    return error;
}

static void __exit vmibridge_exit(void)
{
    pci_unregister_driver(&driver);
    ida_destroy(&numbers);
    __free_page(ones);
}

module_init(vmibridge_init);
module_exit(vmibridge_exit);
MODULE_LICENSE("Dual MIT/GPL");
MODULE_DESCRIPTION("Slots of a PCI device by which programs call vmibridge handlers");
