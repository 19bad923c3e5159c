"""What of a replay is compared, what is ignored, and what was found in all."""

from functools import partial

import anyio
import pytest
from replay_parts import IDS, LOOPS, Probe, Shared, ask, everything, record, replay

from vmibridge import Bridge, BridgeResponse, method
from vmibridge.errors import ConfigError, VmiBridgeError
from vmibridge.recording.replay.ignore import IgnoreRule
from vmibridge.recording.replay.verdict import Verdict
from vmibridge.recording.selection import Selection

STEP = 7


class Counter(Probe):
    """Its state takes one wrong step, at the seventh request."""

    name = "probe"
    wrong = 0

    def __init__(self):
        super().__init__()
        self.count = 0

    @method(1)
    async def add(self, vmi, packet):
        self.count += 1 + (self.wrong if self.count == STEP else 0)
        return BridgeResponse(self.count).with_output({"n": self.count, "id": id(self)})

    @method(2)
    async def copy(self, vmi, packet):
        return BridgeResponse(self.count)


class Wrong(Counter):
    name = "probe"
    wrong = 1


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """40 requests: 1 and 2 in turn."""
    path = tmp_path_factory.mktemp("counted") / "run.mcap"

    async def guest(vm):
        for _ in range(20):
            await vm.call(ask(1))
            await vm.call(ask(2))

    record(path, guest, bridge=Bridge(Counter()))
    return path


def rules(*texts):
    return [IgnoreRule.parse(text) for text in texts]


def judged(path, handler, loop=LOOPS[0], ignore=("output.id",), **options):
    """The verdict on a replay, and its result."""
    words = {name: options.pop(name) for name in ("limit", "fail_fast") if name in options}
    verdict = Verdict(Selection.parse(**options), rules(*ignore), **words)
    return verdict, replay(path, handler, Shared(), loop=loop, verdict=verdict)


@pytest.mark.parametrize("loop", LOOPS, ids=IDS)
def test_one_wrong_step_of_state_is_a_finding_for_each_field(counted, loop):
    verdict, result = judged(counted, Wrong(), loop)
    assert (result.compared, result.different) == (40, 26)
    found = [
        (each.method, each.field, each.count, each.seq, each.expected, each.got, each.step)
        for each in verdict.findings.all()
    ]
    assert found == [
        ("add", "value1", 13, 15, "0x8", "0x9", 1),
        ("add", "output.n", 13, 15, "8", "9", None),
        ("copy", "value1", 13, 16, "0x8", "0x9", 1),
    ]
    assert verdict.findings.all()[0].last_seq == 39


@pytest.mark.parametrize(
    ("words", "compared", "different"),
    [
        ({}, 40, 26),
        ({"methods": ["copy"]}, 20, 13),
        ({"methods": ["2"]}, 20, 13),
        ({"requests": ["0x0001"], "methods": ["1"]}, 20, 13),
        ({"requests": ["probe"]}, 40, 26),
        ({"requests": ["2"]}, 0, 0),
        ({"first": 10, "last": 14}, 5, 0),
        ({"first": 15}, 26, 26),
        ({"last": 15}, 15, 1),
        ({"outcomes": ["failed"]}, 0, 0),
        ({"vcpus": [1]}, 0, 0),
        ({"vms": ["vm"]}, 40, 26),
        ({"until": "0"}, 1, 0),
        ({"since": "1e"}, None, None),
        ({"limit": 3}, 3, 0),
        ({"methods": ["copy"], "limit": 10}, 10, 3),
        ({"fail_fast": True}, 15, 1),
    ],
)
def test_all_are_asked_and_the_selected_are_compared(counted, words, compared, different):
    if compared is None:
        with pytest.raises(ConfigError):
            judged(counted, Wrong(), **words)
        return
    _, result = judged(counted, Wrong(), **words)
    assert (result.compared, result.different) == (compared, different)
    assert not result.unchecked


def test_what_is_behind_the_last_is_not_asked(counted):
    handler = Wrong()
    judged(counted, handler, last=4)
    assert handler.count == 2


@pytest.mark.parametrize(
    ("ignore", "different"),
    [
        ([], 33),
        (["output.id"], 26),
        (["probe:output.id", "value1"], 13),
        (["0x0001:value1", "output"], 0),
        (["1:value1", "output"], 0),
        (["0x0002:value1", "output"], 26),
        (["other:value1", "output"], 26),
        (["value1", "output.*"], 0),
        (["value1", r"/output\..*/"], 0),
        (["value1", r"/\d+/"], 0),
        (["value1", r'/"id":\d+/', "output.n"], 0),
        (["value1", "output.n"], 20),
        (["value2", "output.ids", "output[0]"], 33),
    ],
)
def test_what_rules_ignore_is_no_difference(counted, ignore, different):
    _, result = judged(counted, Wrong(), ignore=ignore)
    assert (result.compared, result.different) == (40, different)
    # Of all 33 something differs: the 20 of method 1 have an id.
    assert result.ignored == 33 - different


def test_a_handler_says_what_of_its_answers_is_not_compared(counted):
    class Says(Wrong):
        name = "probe"
        replay_ignore = ("output.id", "/value\\d/")

    verdict, result = judged(counted, Says(), ignore=())
    assert result.different == 13
    assert [each.field for each in verdict.findings.all()] == ["output.n"]


@pytest.mark.parametrize("name", ["probe", "renamed"])
def test_by_its_name_of_now_too(counted, name):
    class Says(Wrong):
        name = "renamed"
        replay_ignore = ("output.id", "/value\\d/")

    _, result = judged(counted, Says(), ignore=["handler"])
    assert result.different == 13
    _, result = judged(counted, Says(), ignore=["handler", f"{name}:output"])
    assert result.different == 0


def test_a_wrong_rule_of_a_handler_is_told_with_its_name(counted):
    class Says(Counter):
        name = "probe"
        replay_ignore = ("value9",)

    with pytest.raises(VmiBridgeError, match=r"probe\.replay_ignore: 'value9' is not a rule"):
        judged(counted, Says())


@pytest.mark.parametrize("rules", [5, ("value1", 5), "value1"])
def test_rules_of_another_type_are_refused_with_the_class(rules):
    with pytest.raises(TypeError, match=r"Says\.replay_ignore is"):
        type("Says", (Counter,), {"replay_ignore": rules})


@pytest.mark.parametrize(
    "text",
    ["", "value5", "value1.x", "output.", "output..x", "outputs", "0x10000:value1", "70000:rip",
     "0x1:", "/(/", ":value1", "output[a]", "output[1", "value1 ", "-:rip"],
)  # fmt: skip
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(ConfigError, match=r"^here: "):
        IgnoreRule.parse(text, "here: ")


def test_findings_have_the_cause_in_front_whatever_its_name(tmp_path):
    class Changed(Probe):
        name = "probe"

        @method(1)
        async def add(self, vmi, packet):
            return None

    path = tmp_path / "run.mcap"
    record(path, everything)
    verdict = Verdict()
    result = replay(path, Changed(), verdict=verdict)
    found = verdict.findings.all()
    assert (found[0].handler, found[0].method, found[0].seq) == ("probe", "add", 1)
    assert found[0].field == "outcome"
    assert {each.handler for each in found[-3:]} == {"shared"}
    assert sum(each.count for each in found if each.field == "outcome") == result.different


def test_a_finding_counts_requests_and_not_their_accesses(tmp_path):
    class Backwards(Probe):
        name = "probe"

        @method(2)
        async def copy(self, vmi, packet):
            await vmi.memory.write(0x3000, b"something else")
            return BridgeResponse()

    async def guest(vm):
        for _ in range(3):
            await vm.call(ask(2))

    path = tmp_path / "run.mcap"
    record(path, guest, bridge=Bridge(Probe()))
    verdict, _ = judged(path, Backwards())
    writes = [each for each in verdict.findings.all() if each.field == "write"]
    assert [each.count for each in writes] == [3]


def test_the_first_difference_is_that_of_the_request_that_came_first(tmp_path):
    """Though it was answered last."""

    class Slow(Probe):
        name = "probe"
        more = 0

        @method(1)
        async def add(self, vmi, packet):
            await anyio.sleep(packet.value1 / 1e3)
            return BridgeResponse(value1=1 + self.more)

    class Other(Slow):
        name = "probe"
        more = 1

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            for vcpu, pause in enumerate((30, 1)):
                tasks.start_soon(partial(vm.call, ask(1, pause), vcpu=vcpu))
                await anyio.sleep(0.005)

    path = tmp_path / "run.mcap"
    record(path, guest, bridge=Bridge(Slow()))
    verdict, result = judged(path, Other())
    assert (result.different, result.first.seq) == (2, 1)
    assert verdict.findings.all()[0].seq == 1
