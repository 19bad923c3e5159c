"""Which traps of a recording a selection takes, and what it makes of words."""

import pytest
from recorded_session import reply, session, trap

from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.errors import ConfigError
from vmibridge.recording.file.reader import TimedMessage
from vmibridge.recording.messages import Note
from vmibridge.recording.selection import SelectedTraps, Selection
from vmibridge.recording.traps import recorded_traps
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

START = 1_767_225_600_000_000_000  # 2026-01-01
SECOND = 1_000_000_000
PORT = TrapEvent(5, TrapReason.PORT_IO, Registers(), "red")

MESSAGES = [
    TimedMessage(START - 5, session("red")),
    TimedMessage(START, trap(1, vm="red", request=0x100)),
    TimedMessage(START + SECOND, trap(2, vm="red", vcpu=1, request=2)),
    TimedMessage(START + SECOND, Note("retry", "asks again", "red", 2, 1)),
    TimedMessage(START + SECOND + 1, reply(2, OutcomeKind.FAILED, vm="red")),
    TimedMessage(START + 2 * SECOND, trap(3, vm="blue", request=0x100)),
    TimedMessage(START + 3 * SECOND, reply(3, vm="blue")),
    TimedMessage(START + 3 * SECOND, reply(1, vm="red")),
    TimedMessage(START + 4 * SECOND, trap(4, vm="red", vcpu=2, request=3)),
    TimedMessage(START + 5 * SECOND, PORT),
]
ALL = [2, 3, 1, 4, 5]


def taken(**words):
    return [trap.event.seq for trap in SelectedTraps(MESSAGES, Selection.parse(**words), repr)]


@pytest.mark.parametrize(
    ("words", "seqs"),
    [
        ({}, ALL),
        ({"requests": ["0x100"]}, [3, 1]),
        ({"requests": ["256"]}, [3, 1]),
        ({"requests": ["0X2", "3"]}, [2, 4]),
        ({"requests": ["probe"]}, [2, 3, 1]),
        ({"requests": ["probe", "3"]}, [2, 3, 1, 4]),
        ({"requests": ["nobody"]}, []),
        ({"outcomes": ["failed"]}, [2]),
        ({"outcomes": ["none"]}, [4, 5]),
        ({"outcomes": ["none", "handled"]}, [3, 1, 4, 5]),
        ({"vcpus": [1, 2]}, [2, 4]),
        ({"vms": ["blue"]}, [3]),
        ({"since": "2"}, [3, 4, 5]),
        ({"since": "2.000000001"}, [4, 5]),
        ({"until": "1"}, [2, 1]),
        ({"until": ".5"}, [1]),
        ({"since": "2026-01-01T00:00:04Z"}, [4, 5]),
        ({"since": "2026-01-01T00:00:04"}, [4, 5]),
        ({"until": "2026-01-01T01:00:01+01:00"}, [2, 1]),
        ({"vms": ["red"], "outcomes": ["handled", "failed"], "vcpus": [0]}, [1]),
    ],
    ids=str,
)
def test_takes(words, seqs):
    assert taken(**words) == seqs


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"requests": ["65536"]}, "16 bits"),
        ({"requests": ["9" * 5000]}, "16 bits"),
        ({"outcomes": ["fine"]}, "there are handled, .*cancelled and none"),
        ({"since": "soon"}, "'soon' is not a time"),
        ({"since": "-1"}, "not a time"),
        ({"until": "nan"}, "not a time"),
        ({"until": "2026-13-01"}, "not a time"),
    ],
    ids=str,
)
def test_tells_what_makes_no_sense(words, told):
    with pytest.raises(ConfigError, match=told):
        Selection.parse(**words)


def test_sessions_and_notes_are_heard_on_the_way():
    heard = []
    list(SelectedTraps(MESSAGES, Selection.parse(vms=["blue"]), heard.append))
    assert heard == [MESSAGES[0].message, MESSAGES[3].message]


def test_a_register_that_is_negative_is_no_request():
    (found,) = recorded_traps([TimedMessage(START, trap(1, value=-1))])
    assert found.packet is None
