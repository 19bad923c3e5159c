"""A selection that takes nothing is told with what there is."""

import pytest
from recorded_session import reply, session, trap, write_file

from vmibridge import OutcomeKind
from vmibridge.recording import RecordingReader
from vmibridge.recording.selection import Selection
from vmibridge.recording.unmatched import Unmatched

SECOND = 1_000_000_000
START = 1_800_000_000 * SECOND


@pytest.fixture
def told(tmp_path):
    """What is told of a selection from two traps, two seconds apart."""
    path = tmp_path / "run.mcap"
    later = [trap(2, vcpu=3, method=9), reply(2, OutcomeKind.FAILED)]
    write_file(
        path,
        [(START, session()), (START, trap(1)), (START, reply(1))],
        [(START + 2 * SECOND, each) for each in later],
    )

    def told(**words):
        unmatched = Unmatched(Selection.parse(**words))
        with RecordingReader(path) as reader:
            unmatched.look_at(reader.messages())
        return None if unmatched.has_some else str(unmatched)

    return told


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ({"requests": ["0x9", "log"]}, "request 0x0009 or log; there are requests 0x0001 (probe)"),
        ({"methods": ["none"]}, "method none; there are methods 0x0001 (first), 0x0009"),
        ({"outcomes": ["timeout"]}, "outcome timeout; there are outcomes failed, handled"),
        ({"vcpus": [7]}, "vCPU 7; there are vCPUs 0, 3"),
        ({"vms": ["red"]}, "VM red; there are VMs vm"),
        ({"first": 9}, "from trap 9; there are traps 1 to 2"),
        ({"last": 0}, "to trap 0; there are traps 1 to 2"),
        ({"since": "3"}, "since 3 s; there are 2 traps from 0 s to 2 s"),
        (
            {"until": "2020-01-01"},
            (
                "until 2020-01-01T00:00:00+00:00; there are 2 traps"
                " from 2027-01-15T08:00:00+00:00 to 2027-01-15T08:00:02+00:00"
            ),
        ),
        (
            {"vcpus": [0], "outcomes": ["failed"]},
            "outcome failed, vCPU 0; there are outcomes failed, handled; vCPUs 0, 3",
        ),
    ],
    ids=str,
)
def test_what_was_asked_for_and_what_there_is_are_named(told, words, why):
    assert told(**words) == f"no trap matches {why}"


def test_what_takes_a_trap_is_not_told(told):
    assert told(vcpus=[3], methods=["9"]) is None


def test_of_many_some_are_named(tmp_path):
    path = tmp_path / "run.mcap"
    write_file(path, [(1, trap(seq, vcpu=seq)) for seq in range(1, 100)])
    unmatched = Unmatched(Selection(vcpus=frozenset([500])))
    with RecordingReader(path) as reader:
        unmatched.look_at(reader.messages())
    assert str(unmatched).endswith(", ...")
    assert str(unmatched).count(",") == 20
