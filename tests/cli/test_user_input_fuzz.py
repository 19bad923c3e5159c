"""Whatever a user gives as option, URL, spec, configuration or module: never a traceback.

Parsers raise a `VmiBridgeError`; the command prints one line and ends with 1 or 2. In this process,
so that an example costs little.
"""

from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from probe_guest import calls

from vmibridge.backends import open_backend
from vmibridge.cli import main
from vmibridge.config import Config
from vmibridge.errors import VmiBridgeError
from vmibridge.recording.redaction import RedactionRule
from vmibridge.recording.selection import Selection
from vmibridge.transport.urls import parse_url

SHORT, LONG = 60, 1_000

numbers = st.one_of(
    st.integers().map(str),
    st.sampled_from([1, 20, 400, 4300, 4301, 5000]).map(lambda digits: "9" * digits),
    st.sampled_from(
        ["0", "00", "0002", "-0", "0x", "0x" + "f" * 9000, "1e999", "nan", "inf", "1_0"]
    ),
)
words = st.one_of(
    numbers,
    st.text(max_size=20),
    st.text("%0123456789abcdef&=?:/.,[]@", max_size=30),
    st.sampled_from(
        ["%00", "%ff", "\0", "\udcff", "a..b", "." * 300, "a" * 70, "\u202e", "::1", ""]
    ),
)
queries = st.lists(st.tuples(words, words), max_size=3).map(
    lambda pairs: "&".join(f"{name}={value}" for name, value in pairs)
)


def known_options(*names):
    return st.lists(st.tuples(st.sampled_from(names), words), max_size=3).map(
        lambda pairs: "&".join(f"{name}={value}" for name, value in pairs)
    )


urls = st.one_of(
    words,
    st.builds(
        "{}:{}:{}?{}".format,
        st.sampled_from(["tcp", "tls", "unix", "nats", "nats://", "tls://"]),
        words,
        numbers,
        st.one_of(
            queries,
            known_options("anywhere", "cert", "key", "ca", "names", "name", "mode", "uid"),
            known_options(
                "partitions", "partition", "subject", "silence", "inbox", "password-file"
            ),
        ),
    ),
    st.builds("{}{}:{}?{}".format, st.sampled_from(["nats://", "tls://"]), words, numbers, queries),
)
specs = st.one_of(
    urls.map("remote:{}".format),
    st.builds(
        "{}:{}?{}".format,
        st.sampled_from(["unicorn", "replay", "qemu-gdb:unix", "qemu-gdb:tcp", "qemu-plugin:unix"]),
        words,
        st.one_of(
            queries,
            known_options("width", "base", "memory", "vcpus", "speed", "order", "vm", "strict"),
            known_options("site", "image", "mode", "stay", "ram"),
        ),
    ),
)
values = st.one_of(
    words,
    words.map(lambda text: f"'{text}'"),
    st.integers(1, 3000).map(lambda depth: "[" * depth + "]" * depth),
    st.integers(1, 3000).map(lambda depth: "{a=" * depth + "1" + "}" * depth),
    st.sampled_from(["9999-99-99", "true", "[1", "{", '"\\ud800"', '"\\u0000"']),
)
documents = st.one_of(
    st.text(),
    st.lists(
        st.builds(
            "[{}]\n{} = {}".format,
            st.sampled_from(["server", "policy", "policy.vm", "handlers.hello", "a." * 2000 + "a"]),
            st.sampled_from(["timeout", "queue", "fallback", "rings", "requests", '"\\u0000"']),
            values,
        ),
        max_size=3,
    ).map("\n".join),
)


def refuses_or_takes(parse, text):
    with suppress(VmiBridgeError):
        parse(text)


def check_parsers(data):
    refuses_or_takes(parse_url, data.draw(urls))
    refuses_or_takes(open_backend, data.draw(specs))
    refuses_or_takes(lambda text: Config("file", text).server, data.draw(documents))
    refuses_or_takes(RedactionRule.parse, data.draw(st.builds("{}:value3".format, words)))
    for name in ("requests", "outcomes"):
        refuses_or_takes(
            lambda text, name=name: Selection.parse(**{name: [text]}), data.draw(words)
        )
    for name in ("since", "until"):
        refuses_or_takes(lambda text, name=name: Selection.parse(**{name: text}), data.draw(words))


@given(st.data())
@settings(max_examples=SHORT, deadline=None)
def test_parsers_raise_errors_of_vmibridge_alone(data):
    check_parsers(data)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=LONG, deadline=None)
def test_parsers_raise_errors_of_vmibridge_alone_for_long(data):
    check_parsers(data)


@pytest.fixture
def folder(tmp_path, monkeypatch, image):
    """A folder with a recording of one trap, which the process is in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.py").write_text(
        "from vmibridge import BridgeHandler, BridgeResponse\n"
        "class Plain(BridgeHandler[int]):\n"
        "    MAGIC, REQUEST = 0x42494D56, 0x100\n"
        "    async def handle(self, vmi, packet): return BridgeResponse(value1=1)\n"
    )
    guest = f"unicorn:{image(calls(1))}"
    words = ["run", "--backend", guest, "--handlers", "plain.py", "--record", "run.mcap"]
    assert main(words) == 0
    return tmp_path


# Without a NUL and with what the system can pass on, as arguments of a process are.
arguments = words.filter(lambda text: "\0" not in text)
options = st.lists(
    st.tuples(
        st.sampled_from(
            ["--limit", "--since", "--until", "--request", "--vcpu", "--vm", "--outcome", "--title",
             "--speed", "--timeout", "--order", "--to", "-o", "--log-level", "--config", "--redact",
             "--rename", "--shift", "--split", "--ignore"]
        ),
        arguments.filter(lambda text: not text.startswith(("/", "."))),
    ),
    max_size=3,
)  # fmt: skip
commands = st.sampled_from(
    [
        ["inspect", "run.mcap"],
        ["report", "run.mcap", "--force"],
        ["export", "run.mcap", "--to", "jsonl"],
        ["edit", "run.mcap", "-o", "edited.mcap"],
        ["diff", "run.mcap", "run.mcap"],
        ["import", "plain.py", "-o", "edited.mcap"],
        ["replay", "run.mcap", "--handlers", "plain.py"],
        ["run", "--handlers", "plain.py", "--backend", "unicorn:none", "--record", "run.mcap"],
    ]
)
module_lines = st.lists(
    st.sampled_from(
        ["MAGIC = 0x42494D56", "MAGIC = b'VMIB'", "MAGIC = None", "REQUEST = 0x100",
         "REQUEST = '1'", "MAGIC = 1.5",
         "REQUEST = -1", f"REQUEST = 1{'0' * 400}", "Settings = dict", "Settings = 3", "name = 7",
         "serial = 'x'", "timeout = 'x'", "VERIFY_VALUE3 = 1.5",
         "async def handle(self, v, p): ..."]
    ),
    min_size=1,
    max_size=5,
)  # fmt: skip


def check_commands(capsys, folder, data):
    command, chosen = data.draw(commands), data.draw(options)
    capsys.readouterr()
    status = main([*command, *(word for option in chosen for word in option)])
    errors = capsys.readouterr().err.splitlines()
    assert status in (0, 1, 2)
    assert sum(line.startswith("vmibridge: ") for line in errors) <= 1 or status != 2, errors
    lines = data.draw(module_lines)
    text = "from vmibridge import BridgeHandler\nclass H(BridgeHandler):\n    " + "\n    ".join(
        lines
    )
    (folder / f"module{len(text)}.py").write_text(text)
    assert main(["handlers", "list", f"module{len(text)}.py"]) in (0, 1, 2)


@given(data=st.data())
@settings(
    max_examples=SHORT, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_commands_end_with_a_status(capsys, folder, data):
    check_commands(capsys, folder, data)


@pytest.mark.slow
@given(data=st.data())
@settings(
    max_examples=LONG, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_commands_end_with_a_status_for_long(capsys, folder, data):
    check_commands(capsys, folder, data)


@pytest.mark.parametrize(
    "url",
    ["tcp:127.0.0.1:" + "9" * 4301, "tcp:a..b:1?anywhere=true", "unix:x?mode=" + "7" * 5000,
     "unix:x?uid=%00", "unix:x?mode=%ff", "unix:\udcff", "unix:\0", "nats://a..b:1",
     "nats://h:" + "9" * 4301, "nats://h?partitions=" + "9" * 4301, "nats://h?ca=%00",
     "tls:h:1?cert=%00&key=k&ca=c", "tls:" + "a" * 64 + ":1?cert=a&key=b&ca=c"],
)  # fmt: skip
def test_urls_that_nothing_can_come_of_are_refused(url):
    with pytest.raises(VmiBridgeError):
        parse_url(url)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"[server]\ntimeout = " + b"9" * 5000, "has a value that cannot be read"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "is nested too deeply"),
        (b"\xef\xbb\xbf[server]\n", "begins with a byte order mark"),
        (b"\xff\xfe", "is not text in UTF-8"),
    ],
)
def test_files_that_are_no_configuration_are_one_line(capsys, tmp_path, text, told):
    path = tmp_path / "server.toml"
    path.write_bytes(text)
    words = ["run", "--backend", "unicorn:none", "--handlers", "none.py", "--config", str(path)]
    assert main(words) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"vmibridge: {path}:")
    assert told in line
    assert line.count("\n") == 1


@pytest.mark.parametrize("rule", ["0002:value3", "2:value3", "0x2:value3"])
def test_a_request_may_have_leading_zeros(rule):
    assert RedactionRule.parse(rule).request == 2
