"""`vmibridge guest-header`: where the header goes, what is compared, and what is refused."""

import json
import os
import resource
import subprocess
from functools import partial

import pytest
from children import run
from probe_guest import command

NOTES = '''
from typing import Annotated
from vmibridge import GuestText, StandardHandler, U32, method

class Notes(StandardHandler[int]):
    """Keeps notes."""

    REQUEST = 0x0101

    @method(1)
    async def put(self, name: Annotated[str, GuestText(64)]) -> U32:
        """Keep one."""
        return 1
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "notes.py").write_text(NOTES)
    return tmp_path


def header(folder, *arguments):
    return run(command("guest-header", *arguments), cwd=folder)


def test_a_header_goes_to_a_file_or_to_standard_output(folder):
    done = header(folder, "notes.py", "-o", "notes.h")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    text = (folder / "notes.h").read_text()
    assert "vmibridge_notes_put(" in text
    assert header(folder, "notes.py").stdout == text
    assert header(folder, "notes.py", "--lang", "c", "-o", "-").stdout == text


@pytest.mark.parametrize(
    ("language", "name"), [("asm", "%macro BRIDGE_NOTES_PUT"), ("rust", "pub mod notes {")]
)
def test_it_is_in_the_language_that_is_asked_for(folder, language, name):
    assert name in header(folder, "notes.py", "--lang", language).stdout


def test_check_compares_with_the_file_and_says_what_to_run(folder):
    arguments = ("notes.py", "--lang", "asm", "-o", "a file.inc")
    again = "run: vmibridge guest-header notes.py --lang asm -o 'a file.inc'\n"
    done = header(folder, *arguments, "--check")
    assert (done.returncode, done.stderr) == (1, f"vmibridge: a file.inc: is not there; {again}")
    header(folder, *arguments)
    done = header(folder, *arguments, "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    before = (folder / "a file.inc").read_bytes()
    (folder / "notes.py").write_text(NOTES.replace("GuestText(64)", "GuestText(65)"))
    done = header(folder, *arguments, "--check")
    told = f"vmibridge: a file.inc: is not what the handlers say; {again}"
    assert (done.returncode, done.stderr) == (1, told)
    assert (folder / "a file.inc").read_bytes() == before


def test_what_was_there_stays_until_the_new_one_is_whole(folder):
    """As on a volume that is full."""
    (folder / "notes.h").write_text("the old one")
    done = run(
        command("guest-header", "notes.py", "-o", "notes.h"),
        cwd=folder,
        # What it has covered could not be written, either.
        env={name: value for name, value in os.environ.items() if not name.startswith("COV")},
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100, 100)),
    )
    assert done.returncode == 1
    assert done.stderr == "vmibridge: notes.h: File too large\n"
    assert (folder / "notes.h").read_text() == "the old one"
    assert sorted(each.name for each in folder.iterdir()) == ["notes.h", "notes.py"]


def test_a_link_and_a_device_stay_what_they_are(folder):
    (folder / "real.h").write_text("the old one")
    (folder / "notes.h").symlink_to("real.h")
    assert header(folder, "notes.py", "-o", "notes.h").returncode == 0
    assert (folder / "notes.h").is_symlink()
    assert header(folder, "notes.py", "-o", "/dev/stdout").stdout == (folder / "real.h").read_text()


def test_json_is_what_a_header_is_made_of(folder):
    (line,) = header(folder, "notes.py", "--json").stdout.splitlines()
    model = json.loads(line)
    assert (model["name"], model["request"]) == ("notes", 0x0101)
    assert model["methods"][0]["parameters"][0]["limit"] == 64


TWO = (
    NOTES
    + """
class Others(Notes):
    name = "notes"
    REQUEST = 0x0102
"""
)


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (("notes.py", "--check"), 2, "--check: name the file to compare with by -o"),
        (("notes.py", "--check", "-o", "-"), 2, "--check: name the file to compare with by -o"),
        (("notes.py", "-o", "none/notes.h"), 1, "none/notes.h: there is no folder none"),
        (("notes.py", "--json", "--check", "-o", "notes.h"), 2, "--json prints what a header is"),
        (
            ("notes.py", "-o", "./notes.py"),
            2,
            "-o notes.py: is one of the handlers that the header",
        ),
        (("none.py",), 2, "none.py: there is no such file, folder or module"),
        (("two.py",), 1, "two handlers are called notes; give one another `name`, or name its"),
    ],
)
def test_what_is_wrong_is_a_line(folder, arguments, status, told):
    (folder / "two.py").write_text(TWO)
    done = header(folder, *arguments)
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"vmibridge: {told}")


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_a_module_prints_is_no_part_of_it(folder, options):
    plain = header(folder, "notes.py", *options).stdout
    (folder / "notes.py").write_text("print('imported')\n" + (folder / "notes.py").read_text())
    done = header(folder, "notes.py", *options)
    assert (done.stdout, done.stderr) == (plain, "imported\n")


def test_a_reader_that_has_gone_is_no_problem(folder):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command("guest-header", "vmibridge.handlers"),
        cwd=folder, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=120,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
