"""`vmibridge completion`: each script does what it is for in its own shell."""

import os
import shlex
import shutil
import subprocess

import pytest
from probe_guest import command

pytestmark = pytest.mark.no_cover


def needs(shell):
    """The shell; a test without it is skipped, and says what is missing."""
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"no {shell} in PATH: apt-get install {shell}")
    return found


def script(shell):
    done = subprocess.run(
        command("completion", shell), capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return done.stdout


def run(*arguments, **options):
    done = subprocess.run(
        arguments, capture_output=True, text=True, timeout=60, check=False, **options
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@pytest.fixture(scope="module")
def in_bash():
    """What bash offers for the last of these words."""
    sourced = script("bash")

    def offers(*words):
        line = " ".join(map(shlex.quote, words))
        code = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _vmibridge"
        told = run(
            needs("bash"), "--norc", "-c", f'{sourced}\n{code}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        return told.split()

    return offers


class TestBash:
    def test_commands(self, in_bash):
        assert in_bash("vmibridge", "re") == ["recordings", "recover", "replay", "report"]

    def test_commands_of_a_group(self, in_bash):
        assert in_bash("vmibridge", "qemu", "b") == ["build-plugin"]

    def test_options_of_a_command(self, in_bash):
        assert in_bash("vmibridge", "run", "--red") == ["--redact"]

    def test_options_of_a_command_in_a_group(self, in_bash):
        assert in_bash("vmibridge", "recordings", "get", "--o") == ["--output"]

    def test_values_of_an_option(self, in_bash):
        assert in_bash("vmibridge", "run", "--async-backend", "") == ["asyncio", "trio"]

    def test_the_shells_of_the_command_itself(self, in_bash):
        assert in_bash("vmibridge", "completion", "") == ["bash", "zsh", "fish"]

    def test_it_is_registered(self):
        told = run("bash", "--norc", "-c", f"{script('bash')}\ncomplete -p vmibridge")
        assert told == "complete -F _vmibridge vmibridge\n"


def test_zsh_takes_it_as_a_completion_of_the_command(tmp_path):
    zsh = needs("zsh")
    (tmp_path / "_vmibridge").write_text(script("zsh"))
    run(zsh, "-f", "-n", "_vmibridge", cwd=tmp_path)
    code = "fpath=($PWD $fpath); autoload -U compinit; compinit -u -D; print $_comps[vmibridge]"
    assert run(zsh, "-f", "-c", code, cwd=tmp_path) == "_vmibridge\n"


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("vmibridge reco", {"recordings", "recover"}),
        ("vmibridge qemu b", {"build-plugin"}),
        ("vmibridge run --red", {"--redact"}),
        ("vmibridge run --async-backend ", {"asyncio", "trio"}),
    ],
)
def test_fish_offers_what_fits(tmp_path, line, offered):
    fish = needs("fish")
    (tmp_path / "vmibridge.fish").write_text(script("fish"))
    code = f"source vmibridge.fish; complete -C {shlex.quote(line)}"
    environment = {**os.environ, "HOME": str(tmp_path)}
    told = run(fish, "--no-config", "-c", code, cwd=tmp_path, env=environment)
    assert {each.split("\t")[0] for each in told.splitlines()} >= offered


def test_another_shell_is_wrong_usage(vmibridge):
    done = vmibridge("completion", "tcsh")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "bash" in line
