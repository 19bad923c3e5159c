"""vmib in a real Linux, x64 and x86: each command, against the ready-made handlers of a host."""

import logging
import re

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
    # Booting takes seconds, and handlers are tested on every loop with less.
    pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"]),
]

SIZES = (0, 1, (64 << 10) - 1, 64 << 10, (64 << 10) + 1)
"""Bytes."""
DONE, FAILED, USAGE, NO_HOST, NO_ANSWER, WAITING, LOCAL = range(7)
HOSTILE = ("../up", "/etc/hosts", "a//b", "a/./b", "nul", "COM1.txt", "a:b", ".vmibridge-x", "a.")
"""None of them is a name."""
LARGE = 2 << 20
"""Bytes of a file that a program is killed over."""


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    options = ("--target", "linux-x64", "--target", "linux-x86")
    return built_tools(tmp_path_factory.mktemp("tools"), *options)


@pytest.fixture
def guest(qemu, plugin, tools, tmp_path):
    return VmibGuest(qemu, plugin, tools, tmp_path)


@pytest.fixture
def shared(tmp_path):
    """The folder of the handler `files`."""
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


class OddLog(Log):
    """Answers `debug` late and `warning` never, and fails at `error`."""

    @method(0x0001, soft_timeout=0.01)
    async def debug(self, vmi, packet):
        await anyio.sleep(0.1)
        return await super().debug(vmi, packet)

    @method(0x0003, soft_timeout=0.01)
    async def warning(self, vmi, packet):
        await anyio.sleep_forever()

    @method(0x0004)
    async def error(self, vmi, packet):
        raise RuntimeError("as it is meant to")


EVERY_COMMAND = r"""
for each in x64:vmib x86:vmib-x86; do
    w=${each%:*} vmib=${each#*:}
    told $w-ping $vmib ping
    told $w-vmcall $vmib --by vmcall ping
    for size in SIZES; do
        head -c $size /dev/urandom >$w-$size
        told $w-put-$size $vmib put $w-$size
        told $w-hash-$size hash $w-$size
        told $w-get-$size $vmib get host-$size $w-got
        told $w-got-$size hash $w-got
    done
    $vmib --quiet cat host-65537 >$w-cat
    told $w-cat hash $w-cat
    head -c 65537 /dev/urandom | tee $w-piped | $vmib put --quiet - $w-piped
    told $w-piped hash $w-piped
    told $w-proc $vmib put /proc/version $w-version
    told $w-folder $vmib put $w-1 folder/$w-inner
    told $w-taken $vmib put $w-65536 $w-1
    told $w-again $vmib put $w-65537 $w-1 --replace
    told $w-into $vmib get host-1 /proc
    told $w-null $vmib get host-1 /dev/null
    told $w-none $vmib get none
    told $w-no-file $vmib put none
    told $w-a-folder $vmib put /tmp it
    n=0
    for name in HOSTILE; do
        n=$((n + 1))
        told $w-hostile-$n $vmib put $w-1 "$name"
        told $w-hostile-get-$n $vmib get "$name" $w-hostile
    done
    told $w-log $vmib log "$w one" "two  three"
    printf "$w first\n$w second\r\n$w last" | $vmib log --level debug
    told $w-wait $vmib --timeout 1 log --level warning never
    told $w-fail $vmib log --level error no
    told $w-env $vmib env token
    $vmib env long >$w-long
    told $w-env-long hash $w-long
    told $w-env-none $vmib env none
    told $w-fetch $vmib fetch SITE/big $w-fetched
    told $w-fetched hash $w-fetched
    $vmib --quiet fetch SITE/chunked >$w-chunked
    told $w-chunked cat $w-chunked
    told $w-fetch-404 $vmib fetch SITE/status/404
    told $w-fetch-no $vmib fetch http://127.0.0.1:1/
    told $w-call $vmib call 0 0x10 7 0xffff
    told $w-nobody $vmib call 0x7777 1
    told $w-exit $vmib exit 7 "by $w"
    told $w-usage $vmib put
    told $w-option $vmib --nope ping
done
told null test -c /dev/null
"""
AT_ONCE = r"""
for n in 1 2 3 4 5 6 7 8; do head -c $((n * STEP)) /dev/urandom >at-once-$n; done
pids=
for n in 1 2 3 4 5 6 7 8; do
    { vmib --quiet put at-once-$n && vmib-x86 --quiet get at-once-$n got-$n; } &
    pids="$pids $!"
done
failed=0
for each in $pids; do wait $each || failed=$((failed + 1)); done
told failed echo $failed
for n in 1 2 3 4 5 6 7 8; do told at-once-$n hash got-$n; done
"""
STEP = 50_001
"""Bytes; the sizes of files that are under way at once are multiples of it."""
PARTS = r"""
told parts sh -c 'ls *.vmib-part *-hostile none it'
"""


def assert_eight_at_once(told: dict[str, Told], there: dict[str, bytes]) -> None:
    assert told["failed"] == Told(DONE, "0")
    for number in range(1, 9):
        data = there[f"at-once-{number}"]
        assert len(data) == number * STEP
        assert told[f"at-once-{number}"] == hashed(data)


def assert_no_parts(told: dict[str, Told]) -> None:
    assert all("No such file" in line for line in told["parts"].text.split(";"))


KILLED = r"""
head -c SIZE /dev/urandom >large
told killed-hash hash large
n=0
while [ $n -lt TIMES ]; do
    vmib --quiet put large large --replace &
    usleep $((RANDOM % 200 * 1000))
    kill -9 $! 2>/dev/null && n=$((n + 1))
    wait $!
done
told killed-put vmib put large large --replace
n=0
while [ $n -lt TIMES ]; do
    vmib --quiet get large got &
    usleep $((RANDOM % 200 * 1000))
    kill -9 $! 2>/dev/null && n=$((n + 1))
    wait $!
done
told killed-get vmib get large got
told killed-got hash got
# Part of another file, of the same size and of a longer one.
head -c 70000 /dev/zero >other.vmib-part
told killed-other vmib get large other
told killed-other-hash hash other
head -c $((SIZE + 1)) /dev/zero >longer.vmib-part
told killed-longer vmib get large longer
told killed-longer-hash hash longer
"""


def killed_script(times: int) -> str:
    return KILLED.replace("SIZE", str(LARGE)).replace("TIMES", str(times))


def assert_goes_on_after_kills(told: dict[str, Told], there: dict[str, bytes]) -> None:
    large = there["large"]
    assert len(large) == LARGE
    assert {each for label, each in told.items() if label.startswith("killed-")} == {
        Told(DONE, ""),
        hashed(large),
    }


async def test_every_command_in_both_widths_kills_and_eight_at_once(guest, shared, caplog):
    """One test, since a boot takes longer than all of it."""
    for size in SIZES:
        (shared / f"host-{size}").write_bytes(noise(size))
    values = {"token": "s3cret", "long": "x" * 100_000}
    with serving(Site()) as site:
        bridge = Bridge(
            files_in(shared, replace=True),
            OddLog(),
            Environment(Environment.Settings(values=values)),
            Fetch(Fetch.Settings(allow=[site.root])),
            Exit(),
        )
        script = EVERY_COMMAND.replace("SITE", site.root).replace(
            "SIZES", " ".join(map(str, SIZES))
        )
        script = script.replace("HOSTILE", " ".join(f"'{name}'" for name in HOSTILE))
        with caplog.at_level(logging.DEBUG, "vmibridge.guest"):
            script += killed_script(3) + AT_ONCE.replace("STEP", str(STEP)) + PARTS
            told = await guest.boot(script, bridge, cpus=2)
    there = contents(shared)
    logged = [
        record.getMessage().partition(": ")[2]
        for record in caplog.records
        if record.name == "vmibridge.guest"
    ]
    for width in WIDTHS:
        of_width = {
            label.removeprefix(f"{width}-"): each
            for label, each in told.items()
            if label.startswith(f"{width}-")
        }
        assert_transfers(of_width, width, there)
        assert_refusals(of_width)
        assert_requests(of_width, width)
    assert_goes_on_after_kills(told, there)
    assert_eight_at_once(told, there)
    # Nothing else was made, on either side: neither by hostile names, nor of what was refused.
    names = {"large"} | {f"host-{size}" for size in SIZES} | {f"at-once-{n}" for n in range(1, 9)}
    for width in WIDTHS:
        names |= {f"{width}-{each}" for each in (*SIZES, "piped", "version", "inner")}
    assert {*there} == names
    assert_no_parts(told)
    assert told["null"].status == DONE
    for width in WIDTHS:
        lines = ("one two  three", "first", "second", "last")
        assert [line for line in logged if line.startswith(width)] == [
            f"{width} {line}" for line in lines
        ]
    exits = [each.output for each in guest.outcomes if each.handler == "exit"]
    assert [(each.status, each.reason) for each in exits] == [(7, "by x64"), (7, "by x86")]


def assert_transfers(told: dict[str, Told], width: str, there: dict[str, bytes]) -> None:
    for size in SIZES:
        assert told[f"put-{size}"] == told[f"get-{size}"] == Told(DONE, "")
        assert told[f"got-{size}"] == hashed(noise(size))
        if size != 1:  # which has another one in its place by now
            assert len(there[f"{width}-{size}"]) == size
            assert told[f"hash-{size}"] == hashed(there[f"{width}-{size}"])
    assert told["cat"] == hashed(noise(65537))
    assert told["piped"] == hashed(there[f"{width}-piped"])
    assert len(there[f"{width}-piped"]) == 65537
    assert there[f"{width}-version"].startswith(b"Linux version ")
    assert len(there[f"{width}-inner"]) == 1
    # What was in the place of another file.
    assert told["taken"].status == FAILED
    assert "the name is taken" in told["taken"].text
    assert told["again"] == Told(DONE, "")
    assert there[f"{width}-1"] == there[f"{width}-65537"]
    assert told["null"] == Told(DONE, "")


def assert_refusals(told: dict[str, Told]) -> None:
    assert told["none"].status == FAILED
    assert re.fullmatch(
        r"vmib: get: none: the host says: failed, code 2, native code [02]: .*name",
        told["none"].text,
    )
    assert told["no-file"] == Told(LOCAL, "vmib: put: none: none: there is none of this name")
    assert told["a-folder"] == Told(LOCAL, "vmib: put: /tmp as it: /tmp: it is a folder")
    # /proc takes no files.
    assert told["into"].status == LOCAL
    for number in range(1, len(HOSTILE) + 1):
        hostile = told[f"hostile-{number}"]
        assert hostile.status == FAILED
        assert f" as {HOSTILE[number - 1]}: the host says: failed, code 22" in hostile.text
        assert told[f"hostile-get-{number}"].status == FAILED


def assert_requests(told: dict[str, Told], width: str) -> None:
    for how in ("cpuid", "vmcall"):
        ping = told["ping" if how == "cpuid" else how]
        assert ping.status == DONE
        assert ping.text.startswith(f"vmibridge: version 1.0 by {how}, {width};features:")
        assert re.search(r";round trip: \d+ us, the least of 16$", ping.text)
    assert told["log"] == Told(DONE, "")
    assert told["wait"] == Told(
        WAITING, "vmib: log: after 1 s the host still tells to wait: see --timeout"
    )
    assert told["fail"].status == NO_ANSWER
    assert told["env"] == Told(DONE, "s3cret")
    assert told["env-long"] == hashed(b"x" * 100_000 + b"\n")
    assert told["env-none"].status == FAILED
    assert told["fetch"] == Told(DONE, "")
    assert told["fetched"] == hashed(BIG)
    assert told["chunked"] == Told(DONE, "one two three")
    assert told["fetch-404"].status == told["fetch-no"].status == FAILED
    if width == "x64":
        assert told["fetch-404"].text.endswith("the server answered 404")
    stamps = ("0x213353522d494d56", "0x213453522d494d56") if width == "x64" else ("0x2d494d56",) * 2
    assert told["call"] == Told(DONE, f"0x7 0xffff {stamps[0]} {stamps[1]} stamped")
    assert told["nobody"].status == NO_ANSWER
    assert told["nobody"].text.endswith(" unstamped")
    assert told["exit"] == Told(DONE, "")
    assert told["usage"].status == told["option"].status == USAGE


@pytest.mark.slow
async def test_a_hundred_kills_leave_nothing(guest, shared):
    script = f"{killed_script(100)}{PARTS}"
    told = await guest.boot(script, Bridge(files_in(shared, replace=True)), cpus=2)
    assert [*contents(shared)] == ["large"]
    assert_goes_on_after_kills(told, contents(shared))
    assert_no_parts(told)


@pytest.mark.slow
async def test_a_hundred_megabytes(guest, shared):
    script = r"""
    mount -t tmpfs -o size=90% tmpfs /tmp/work
    cd /tmp/work
    told get vmib get large
    told hash hash large
    told put vmib put large again
    """
    data = noise(100_000_000)
    (shared / "large").write_bytes(data)
    told = await guest.boot(script, Bridge(files_in(shared)))
    assert told["get"] == told["put"] == Told(DONE, "")
    assert told["hash"] == hashed(data)
    assert (shared / "again").read_bytes() == data


@pytest.mark.slow
async def test_without_a_host_in_an_emulator(guest):
    told = await guest.boot_alone(
        """
    for how in cpuid vmcall vmmcall; do
        told $how vmib --by $how ping
        told x86-$how vmib-x86 --by $how ping
    done
    """
    )
    assert {each.status for each in told.values()} == {NO_HOST}
    assert {each.text.partition("answered")[0] for each in told.values()} == {
        "vmib: ping: no host "
    }
