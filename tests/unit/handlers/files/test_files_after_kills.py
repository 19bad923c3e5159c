"""Programs and hosts that are killed at random points: nothing is left, and it goes on."""

import errno
import sys
from contextlib import suppress
from pathlib import Path
from random import Random
from subprocess import PIPE

import anyio
import killed_host
import pytest
from children import Child
from file_parts import FilesGuest, files_guest, leftovers, noise, sha256, tree

from vmibridge.handlers.files import Mode

TIMES = [3, pytest.param(100, marks=pytest.mark.slow)]


class KilledError(Exception):
    """The program is killed here."""


class MortalProgram(FilesGuest):
    """A program that is killed behind, or in place of, one of its calls."""

    def __init__(self, handler, space, lives):
        super().__init__(handler, space)
        self.lives = lives
        self.calls = 0

    async def send(self, method, *values):
        self.calls += 1
        self.lives -= 1
        if self.lives == 0:
            raise KilledError
        outcome = await super().send(method, *values)
        if self.lives == 1:
            # It has an effect, and the answer is not seen.
            raise KilledError
        return outcome


@pytest.mark.anyio
@pytest.mark.parametrize("times", TIMES)
async def test_a_program_that_is_killed_goes_on_when_it_is_run_again(
    tmp_path, anyio_backend, times
):
    random = Random(times)
    data = noise(300_000)
    done, killed, pieces = 0, 0, 30
    async with files_guest(tmp_path, max_open=1) as guest:
        while killed < times or not done:
            told = None
            while told is None:
                lives = random.randrange(2, 2 * pieces)
                space = random.choice([0x1000, 0x2000, 0x3000])
                program = MortalProgram(guest.handler, space, lives)
                program.numbers = guest.numbers
                try:
                    told = await program.put_file(f"{done}", data, piece=len(data) // pieces)
                except KilledError:
                    killed += 1
            # A program that was killed behind its END finds the file there.
            assert told in (0, errno.EEXIST)
            done += 1
            assert leftovers(tmp_path) == []
    assert tree(tmp_path) == {str(number): data for number in range(done)}


@pytest.mark.anyio
async def test_what_was_put_before_a_kill_is_not_put_again(tmp_path, anyio_backend):
    data = noise(100_000)
    async with files_guest(tmp_path) as guest:
        calls = []
        for lives in (7, 9, 100):
            program = MortalProgram(guest.handler, 0x1000 * lives, lives)
            program.numbers = guest.numbers
            with suppress(KilledError):
                assert await program.put_file("a", data, piece=10_000) == 0
            calls.append(program.calls)
        # BEGIN and LENGTH each time, then 10 pieces in all, one of them twice, and END.
        assert sum(calls) <= 3 * 2 + 10 + 2 + 1
    assert tree(tmp_path) == {"a": data}


@pytest.mark.no_cover
@pytest.mark.parametrize("times", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_a_host_that_is_killed_leaves_whole_files_alone(tmp_path, times):
    random = Random(times)
    for number in range(times):
        folder = tmp_path / str(number)
        folder.mkdir()
        command = [sys.executable, Path(killed_host.__file__), folder, str(number)]
        with Child(command, seconds=300, stdin=PIPE) as host:
            pieces, left = random.randrange(1, 60), 0
            # With one left it would have its name, perhaps, by the time that it is killed.
            while pieces > 0 or left < 2:
                host.stdin.write("\n")
                host.stdin.flush()
                left = int(host.stdout.readline())
                pieces -= 1
            # It is killed while it takes the next one.
            host.stdin.write("\n")
            host.stdin.flush()
            host.kill()
            host.wait()
        assert len(leftovers(folder)) == 1
        anyio.run(go_on_after_the_kill, folder)


async def go_on_after_the_kill(folder):
    data = noise(50_000, 7)
    async with files_guest(folder) as guest:
        assert leftovers(folder) == []
        whole = {name: found for name, found in tree(folder).items() if found is not None}
        for name, found in whole.items():
            content = killed_host.content(int(name.removeprefix("sub/")))
            assert sha256(found) == sha256(content), name
        # The next host knows nothing of the guest's handle, so it begins again.
        assert (await guest.put(1, 0, b"x")).error == errno.EBADF
        assert await guest.put_file("again", data, Mode.CREATE | Mode.HASH) == 0
    assert tree(folder)["again"] == data
