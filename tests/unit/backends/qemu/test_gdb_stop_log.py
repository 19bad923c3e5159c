"""Which command of QMP came last, by QEMU's log."""

import pytest

from vmibridge.backends.qemu.gdb.stop_log import StopLog


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log"


@pytest.fixture
def log(path):
    path.write_text("qmp_enter_stop {}\n")
    found = StopLog(str(path))
    yield found
    found.close()


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def test_what_was_there_before_does_not_count(log):
    assert not log.wants_pause()


def test_the_last_of_stop_and_cont_counts(log, path):
    append(path, "1@2.3:qmp_enter_stop {}\nqmp_exit_stop {} 1\n")
    assert log.wants_pause()
    append(path, "qmp_enter_query_status {}\n")
    assert log.wants_pause()
    append(path, "qmp_enter_cont {}\n")
    assert not log.wants_pause()


def test_a_line_counts_when_it_has_come_to_its_end(log, path):
    append(path, "qmp_enter_st")
    assert not log.wants_pause()
    append(path, "op {}\n")
    assert log.wants_pause()


@pytest.mark.parametrize(("line", "wanted"), [("stop", True), ("s", True), ("savevm x", False)])
def test_the_monitor_for_people_by_qmp_counts_too(log, path, line, wanted):
    append(path, f'qmp_enter_human_monitor_command {{"command-line": "{line}"}}\n')
    assert log.wants_pause() == wanted
    append(path, 'qmp_enter_human_monitor_command {"command-line": "cont"}\n')
    assert not log.wants_pause()


def test_a_log_that_is_begun_again(log, path):
    path.write_text("")
    assert not log.wants_pause()
    append(path, "qmp_enter_stop {}\n")
    assert log.wants_pause()
