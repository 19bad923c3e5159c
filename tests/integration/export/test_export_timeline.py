"""Recordings as traces of Perfetto: what happened when, on each vCPU."""

import pytest
from exports import export
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent
from recorded_session import MAX_U64, reply, session, trap, write_file

from vmibridge.bridge.outcome import OutcomeKind

BEGIN, END, INSTANT = (
    getattr(TrackEvent, f"TYPE_{word}") for word in ("SLICE_BEGIN", "SLICE_END", "INSTANT")
)


class Timeline:
    """A Perfetto trace, taken apart by what its schema says."""

    def __init__(self, path):
        self.trace = Trace()
        self.trace.ParseFromString(path.read_bytes())
        self.tracks = {}
        names = {}
        events = []
        for packet in self.trace.packet:
            if packet.HasField("track_descriptor"):
                descriptor = packet.track_descriptor
                assert descriptor.uuid not in self.tracks
                self.tracks[descriptor.uuid] = descriptor
            for each in packet.interned_data.debug_annotation_names:
                assert packet.sequence_flags == packet.SEQ_INCREMENTAL_STATE_CLEARED
                names[each.iid] = each.name
            if packet.HasField("track_event"):
                assert packet.sequence_flags == packet.SEQ_NEEDS_INCREMENTAL_STATE
                assert packet.track_event.track_uuid in self.tracks, "described before it is used"
                events.append((packet.timestamp, packet.track_event))
        # A trace processor sorts by time, and keeps the order of what has the same time.
        self.events = sorted(events, key=lambda event: event[0])
        self.names = names

    def place(self, event):
        thread = self.tracks[event.track_uuid]
        process = self.tracks[thread.parent_uuid]
        assert thread.thread.pid == process.process.pid
        return process.process.process_name, thread.thread.thread_name

    def facts(self, event):
        return {
            self.names[each.name_iid]: getattr(each, each.WhichOneof("value"))
            for each in event.debug_annotations
        }

    def slices(self):
        """Place, begin, end and event of each slice; they must nest, one deep."""
        opened, found = {}, []
        for time, event in self.events:
            place = self.place(event)
            if event.type == BEGIN:
                assert place not in opened
                opened[place] = time, event
            elif event.type == END:
                found.append((place, opened[place][0], time, opened.pop(place)[1]))
        assert not opened
        return found


@pytest.fixture(scope="module")
def timeline(exported):
    return Timeline(exported["perfetto"][0])


class TestPerfetto:
    def test_a_vm_is_a_process_and_a_vcpu_a_thread(self, timeline):
        places = {timeline.place(event) for _, event in timeline.events}
        assert places == {("red", "vcpu 0"), ("red", "vcpu 1"), ("blue", "vcpu 0")}
        threads = [t.thread.tid for t in timeline.tracks.values() if t.HasField("thread")]
        processes = [t.process.pid for t in timeline.tracks.values() if t.HasField("process")]
        assert len({*threads, *processes}) == 5

    def test_a_trap_is_a_slice_from_taking_it_to_its_reply(self, run, timeline):
        told = [
            (place, begin, end, event.categories[0], timeline.facts(event)["seq"])
            for place, begin, end, event in timeline.slices()
        ]
        assert sorted(told) == sorted(
            (
                (trap.event.vm, f"vcpu {trap.event.vcpu}"),
                trap.time,
                trap.reply_time,
                trap.reply.kind.value,
                trap.event.seq,
            )
            for trap in run[2]
        )

    def test_slices_have_the_names_of_handlers_and_methods(self, run, timeline):
        names = {event.name for *_, event in timeline.slices()}
        methods = ("add", "copy", "fail", "miss", "slow", "give_up")
        assert names == {*[f"probe/{method}" for method in methods], "0x7777/0x0001"}

    def test_slices_say_what_was_asked_and_answered(self, timeline):
        facts = [timeline.facts(event) for *_, event in timeline.slices()]
        added = next(each for each in facts if each["method"] == 1 and each["request"] == 1)
        assert (added["value1"], added["value3"], added["answer1"]) == (
            MAX_U64,
            MAX_U64 - 1,
            MAX_U64,
        )
        copied = next(each for each in facts if each["method"] == 2)
        assert (copied["bytes read"], copied["bytes written"]) == (16, 4)

    def test_retries_are_one_flow(self, run, timeline):
        flows = {}
        for *_, event in timeline.slices():
            for ends, ids in ((False, event.flow_ids), (True, event.terminating_flow_ids)):
                for flow in ids:
                    flows.setdefault(flow, []).append((timeline.place(event)[0], ends))
        assert len(flows) == 2
        for steps in flows.values():
            assert len({vm for vm, _ in steps}) == 1
            assert [ends for _, ends in steps] == [False] * (len(steps) - 1) + [True]
        retried = [o for o in run[1] if o.retry_of or o.kind is OutcomeKind.WAITING]
        assert sum(map(len, flows.values())) == len(retried)

    def test_times_are_those_of_a_clock(self, run, timeline):
        clocks = timeline.trace.packet[0].clock_snapshot.clocks
        start = min(trap.time for trap in run[2])
        assert {clock.clock_id: clock.timestamp for clock in clocks} == {1: start, 6: start}

    def test_a_trap_without_a_reply_is_an_instant(self, tmp_path):
        path = write_file(
            tmp_path / "x.mcap", [(5, session()), (7, trap(1)), (9, trap(2)), (11, reply(2))]
        )
        _, (target,) = export(path, "perfetto")
        timeline = Timeline(target)
        assert [(time, event.type) for time, event in timeline.events] == [
            (7, INSTANT), (9, BEGIN), (11, END)
        ]  # fmt: skip

    def test_slices_nest_whatever_the_times(self, tmp_path):
        chunk = [(10, trap(1)), (12, trap(2)), (20, reply(1)), (5, reply(2))]
        _, (target,) = export(write_file(tmp_path / "x.mcap", chunk), "perfetto")
        assert [(begin, end) for _, begin, end, _ in Timeline(target).slices()] == [
            (10, 20), (20, 20)
        ]  # fmt: skip
