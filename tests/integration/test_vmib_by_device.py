"""vmib in a real Linux by the PCI device, x64 and x86: through sysfs, and by the driver."""

import logging
from collections import Counter

import anyio
import pytest
from fetch_parts import BIG, Site, serving
from vmib_guest import WIDTHS, Told, VmibGuest, built_tools, contents, files_in, hashed, noise

from vmibridge import Bridge, method
from vmibridge.handlers.environment import Environment
from vmibridge.handlers.exit import Exit
from vmibridge.handlers.fetch import Fetch
from vmibridge.handlers.log import Log

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"]),
]

DONE, FAILED, _, NO_HOST, NO_ANSWER, WAITING, LOCAL = range(7)
SIZES = (0, 1, 3992, 3993, 200_001)
"""Bytes; 3992 go into one slot."""
WAYS = ("sysfs", "driver")
SCRIPT = r"""
mount -t sysfs sys /sys
# each WAY: the commands in both widths, by the way that vmib finds itself.
each() {
    for pair in x64:vmib x86:vmib-x86; do
        w=$1-${pair%:*} vmib=${pair#*:}
        told $w-ping $vmib ping
        told $w-named $vmib --by $1 ping
        for size in SIZES; do
            head -c $size /dev/urandom >$w-$size
            told $w-put-$size $vmib put $w-$size
            told $w-hash-$size hash $w-$size
            told $w-get-$size $vmib get host-$size got
            told $w-got-$size hash got
        done
        told $w-log $vmib log "$w one" two
        head -c 5000 /dev/zero | tr '\0' x | $vmib log --level debug
        told $w-env $vmib env token
        told $w-env-long $vmib env long
        told $w-fetch $vmib fetch SITE/big fetched
        told $w-fetched hash fetched
        told $w-name $vmib get $(head -c 4050 /dev/zero | tr '\0' n) got
        told $w-nobody $vmib call 0x7777 1
        told $w-wait $vmib --timeout 1 log --level warning never
        told $w-exit $vmib exit 7 "by $w"
    done
}
told no-driver vmib --by driver ping
each sysfs
insmod /vmibridge.ko
each driver
told taken vmib --by sysfs ping
# Eight of them at once, each with a slot of its own.
pids=
for n in 1 2 3 4 5 6 7 8; do
    { vmib --quiet put driver-x64-200001 at-once-$n && vmib-x86 --quiet get at-once-$n got-$n; } &
    pids="$pids $!"
done
failed=0
for each in $pids; do wait $each || failed=$((failed + 1)); done
told failed echo $failed
# And eight that get the same: none takes the transfer of another.
pids=
for n in 1 2 3 4 5 6 7 8; do
    vmib --quiet get host-200001 same-$n &
    pids="$pids $!"
done
failed=0
for each in $pids; do wait $each || failed=$((failed + 1)); done
told same-failed echo $failed
for n in 1 2 3 4 5 6 7 8; do told same-$n hash same-$n; done
for n in 1 2 3 4 5 6 7 8; do told at-once-$n hash got-$n; done
"""


class OddLog(Log):
    """Answers `warning` never."""

    @method(0x0003)
    async def warning(self, vmi, packet):
        await anyio.sleep_forever()


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    options = ("--target", "linux-x64", "--target", "linux-x86")
    return built_tools(tmp_path_factory.mktemp("tools"), *options)


@pytest.mark.parametrize("carrier", ["vfio-user", pytest.param("ivshmem", marks=pytest.mark.slow)])
async def test_every_command_through_sysfs_and_by_the_driver(
    qemu, tools, tmp_path, carrier, caplog
):
    """One boot, since that takes longer than all of it."""
    shared = tmp_path / "shared"
    shared.mkdir()
    for size in SIZES:
        (shared / f"host-{size}").write_bytes(noise(size))
    guest = VmibGuest(qemu, None, tools, tmp_path)
    with serving(Site()) as site, caplog.at_level(logging.DEBUG, "vmibridge.guest"):
        values = {"token": "s3cret", "long": "x" * 3000}
        bridge = Bridge(
            files_in(shared),
            OddLog(),
            Environment(Environment.Settings(values=values)),
            Fetch(Fetch.Settings(allow=[site.root])),
            Exit(),
        )
        script = SCRIPT.replace("SITE", site.root).replace("SIZES", " ".join(map(str, SIZES)))
        told = await guest.boot_by_device(script, bridge, carrier, cpus=2)
    there = contents(shared)
    logged = [each.getMessage().partition(": ")[2] for each in caplog.records]
    assert told["no-driver"].status == NO_HOST
    assert told["no-driver"].text.endswith("there is no driver of the PCI device")
    assert told["taken"].status == NO_HOST, "what has a driver is not mapped through sysfs"
    for way in WAYS:
        for width in WIDTHS:
            of_run = {
                label.removeprefix(f"{way}-{width}-"): each
                for label, each in told.items()
                if label.startswith(f"{way}-{width}-")
            }
            assert_run(of_run, there, way, width)
            assert f"{way}-{width} one two" in logged
    pieces = Counter(len(each) for each in logged if each.startswith("xx"))
    assert pieces == {4032: 4, 5000 - 4032: 4}, "what goes into a slot, and the rest"
    assert told["failed"] == Told(DONE, "0")
    assert {told[f"at-once-{n}"] for n in range(1, 9)} == {hashed(there["driver-x64-200001"])}
    assert told["same-failed"] == Told(DONE, "0")
    assert {told[f"same-{n}"] for n in range(1, 9)} == {hashed(noise(200_001))}
    exits = [each.output.reason for each in guest.outcomes if each.handler == "exit"]
    assert exits == [f"by {way}-{width}" for way in WAYS for width in WIDTHS]
    assert {each.event.reason.value for each in guest.outcomes} == {"device"}


def assert_run(told, there, way, width):
    for ping in ("ping", "named"):
        assert told[ping].status == DONE, told[ping]
        assert told[ping].text.startswith(f"vmibridge: version 1.0 by {way}, {width};features:")
    for size in SIZES:
        assert told[f"put-{size}"] == told[f"get-{size}"] == Told(DONE, "")
        assert told[f"got-{size}"] == hashed(noise(size))
        assert len(there[f"{way}-{width}-{size}"]) == size
        assert told[f"hash-{size}"] == hashed(there[f"{way}-{width}-{size}"])
    assert told["log"] == told["exit"] == told["fetch"] == Told(DONE, "")
    assert told["env"] == Told(DONE, "s3cret")
    assert told["env-long"].status == LOCAL, told["env-long"]
    assert told["fetched"] == hashed(BIG)
    assert told["name"].status == LOCAL
    assert told["name"].text.endswith("does not fit into the slot of the device")
    assert told["nobody"].status == NO_ANSWER
    assert told["nobody"].text.endswith(" unstamped")
    assert told["wait"].status == WAITING
