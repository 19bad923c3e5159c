"""The table of requests that were told to wait."""

import math

from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.engine.retries import PendingRequests

OUTCOME = Outcome(OutcomeKind.HANDLED, BridgePacket(1, 1, 1))


class Worker:
    def __init__(self, *, attended=False):
        self.attended = attended


def table(result_timeout=10.0, most_results=3):
    return PendingRequests(result_timeout, most_results, lambda worker: worker.attended)


def test_a_retry_finds_its_request_by_the_key():
    requests = table()
    request = requests.add("a", Worker(), 1)
    assert requests.find("a") is request
    assert requests.find("b") is None


def test_of_two_requests_alike_the_first_that_no_trap_waits_for_is_found():
    requests = table()
    first, second = requests.add("a", Worker(attended=True), 1), requests.add("a", Worker(), 1)
    assert requests.find("a") is second
    second.running.attended = True
    assert requests.find("a") is first
    second.running.attended = first.running.attended = False
    assert requests.find("a") is first


def test_a_result_is_found_until_it_is_removed():
    requests = table()
    request = requests.add("a", Worker(), 1)
    assert requests.keep(request, OUTCOME, 0.0) == 0
    assert requests.find("a") is request
    assert (request.running, request.outcome) == (None, OUTCOME)
    requests.remove(request)
    assert requests.find("a") is None
    assert len(requests) == 0


def test_results_expire_in_their_order():
    requests = table()
    assert requests.next_expiry == math.inf
    for at, key in enumerate("abc"):
        requests.keep(requests.add(key, Worker(), 1), OUTCOME, float(at))
    assert requests.next_expiry == 10.0
    assert requests.expire(9.9) == 0
    assert requests.expire(11.0) == 2
    assert [requests.find(key) is None for key in "abc"] == [True, True, False]
    assert requests.next_expiry == 12.0


def test_a_running_request_does_not_expire():
    requests = table()
    requests.add("a", Worker(), 1)
    assert requests.expire(math.inf) == 0
    assert len(requests) == 1


def test_of_too_many_results_the_oldest_goes():
    requests = table(most_results=3)
    assert [requests.keep(requests.add(n, Worker(), 1), OUTCOME, 0.0) for n in range(5)] == [
        0, 0, 0, 1, 1,
    ]  # fmt: skip
    assert [requests.find(n) is None for n in range(5)] == [True, True, False, False, False]


def test_at_the_end_results_are_dropped_and_running_requests_stay():
    requests = table()
    running = requests.add("a", Worker(), 1)
    requests.keep(requests.add("b", Worker(), 1), OUTCOME, 0.0)
    assert requests.drop_results() == 1
    assert (requests.find("a"), requests.find("b")) == (running, None)
