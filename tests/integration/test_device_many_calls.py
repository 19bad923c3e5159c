"""Guests in C that call by the device from each ring, under KVM as well, and by ivshmem very many
times: by vfio-user see test_qemu_device.py."""

import anyio
import pytest
from device_guests import RIGHT, CallingMachine, build_device_guest
from linux_guest import exchange
from needs import has_kvm, needs

from vmibridge import TrapReason

pytestmark = [
    pytest.mark.anyio,
    # What differs between the loops is tested without a VM.
    pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"]),
]
slow = pytest.mark.slow

FORMS = {
    "ring0": {"SPACE": "OWN"},
    "ring3": {"SPACE": "IN_SLOT", "USER": 1, "SLOT": 7},
    "interrupt": {"SPACE": "IN_SLOT", "INTERRUPT": 1},
}
MACHINES = {
    "tcg": ({}, "q35"),
    # Under KVM that is nested an exit takes long: q35's firmware makes too many, and so does a look
    # at every bus.
    "kvm": ({"ECAM": "0xe0000000", "ASSIGN": "0xc0000000", "LAST_BUS": 0}, "microvm,pcie=on"),
}


@pytest.fixture
def calls(request, tmp_path):
    """`await calls(CARRIER, ACCELERATOR, FORM, COUNT)`: they were all made, and answered right."""

    async def call(carrier, accel, form, count):
        carrier, _, age = carrier.rpartition("-")
        qemu = needs("qemu-system-x86_64") if age == "system" else request.getfixturevalue("qemu")
        is_kernel = form == "ring0"
        machine = CallingMachine(qemu, tmp_path, carrier, 2 if is_kernel else 0, accel)
        where, which = MACHINES[accel]
        image = build_device_guest(tmp_path, "device_calls", COUNT=count, **FORMS[form], **where)
        assert await machine.run(exchange(), image, machine=which) == (RIGHT, "")
        assert machine.outcomes["handled"] == 5 + count + 2
        assert set(machine.outcomes) <= {"handled", "waiting"}
        event = machine.events[-1]
        assert (event.reason, event.ring) == (TrapReason.DEVICE, 0 if is_kernel else 3)

    return call


@has_kvm
@pytest.mark.parametrize("carrier", ["ivshmem-system", pytest.param("vfio-user-new", marks=slow)])
@pytest.mark.parametrize("form", ["ring3", pytest.param("ring0", marks=slow)])
async def test_a_guest_under_kvm_calls_and_checks_every_answer(calls, carrier, form):
    await calls(carrier, "kvm", form, 300)


@slow
@pytest.mark.no_cover
@pytest.mark.parametrize("accel", ["tcg", pytest.param("kvm", marks=has_kvm)])
@pytest.mark.parametrize("carrier", ["ivshmem-new", "ivshmem-system"])
@pytest.mark.parametrize("form", FORMS)
async def test_many_thousand_calls_by_ivshmem(calls, carrier, accel, form):
    with anyio.fail_after(4000):
        await calls(carrier, accel, form, 200_000)
