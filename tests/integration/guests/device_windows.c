/* A driver of Windows that asks the host for its version when it is loaded, by vmibridge_windows.h. */
#include "vmibridge_windows.h"

static struct vmibridge_windows way;

static VOID NTAPI unload(PDRIVER_OBJECT driver)
{
    (void)driver;
    vmibridge_windows_close(&way);
}

NTSTATUS NTAPI DriverEntry(PDRIVER_OBJECT driver, PUNICODE_STRING path);
NTSTATUS NTAPI DriverEntry(PDRIVER_OBJECT driver, PUNICODE_STRING path)
{
    struct vmibridge_caller caller;
    uint32_t version = 0, features = 0;
    NTSTATUS status = vmibridge_windows_open(&way, 0);

    (void)path;
    if (status != STATUS_SUCCESS) {
        return status;
    }
    driver->DriverUnload = unload;
    caller = vmibridge_by_slot(&way.slot);
    if (!vmibridge_handshake_by(&caller, &version, &features)) {
        vmibridge_windows_close(&way);
        return STATUS_DEVICE_NOT_CONNECTED;
    }
    DbgPrint("vmibridge: version %u.%u\n", version >> 16, version & 0xffff);
    return STATUS_SUCCESS;
}
