"""The table of requests that were told to wait."""

import math

from vmibridge.bridge.outcome import Outcome, OutcomeKind
from vmibridge.bridge.packet import BridgePacket
from vmibridge.engine.request import Cause, Request, State, Worker
from vmibridge.engine.retries import PendingRequests

OUTCOME = Outcome(OutcomeKind.HANDLED, BridgePacket(1, 1, 1))


def parked():
    """A request that was told to wait."""
    request = Request(Worker())
    request.state = State.TAKEN
    for cause in (Cause.ASK, Cause.SUSPEND, Cause.SOFT_DEADLINE):
        request.on(cause)
    return request


def retried():
    """One that another trap waits for again."""
    request = parked()
    request.on(Cause.RETRY)
    return request


def table(result_timeout=10.0, max_results=3):
    return PendingRequests(result_timeout, max_results)


def add(requests, key, request=None):
    request = request or parked()
    requests.add(key, request, 1)
    return request


def keep(requests, request, now):
    request.on(Cause.END)
    return requests.keep(request, OUTCOME, now)


def test_a_retry_finds_its_request_by_the_key():
    requests = table()
    request = add(requests, "a")
    assert (request.key, request.first_seq) == ("a", 1)
    assert requests.find("a") is request
    assert requests.find("b") is None


def test_of_two_requests_alike_the_first_that_no_trap_waits_for_is_found():
    requests = table()
    first, second = add(requests, "a", retried()), add(requests, "a")
    assert requests.find("a") is second
    second.on(Cause.RETRY)
    assert requests.find("a") is first
    second.on(Cause.SOFT_DEADLINE)
    first.on(Cause.SOFT_DEADLINE)
    assert requests.find("a") is first


def test_a_result_is_found_until_it_is_removed():
    requests = table()
    request = add(requests, "a")
    assert keep(requests, request, 0.0) == 0
    assert requests.find("a") is request
    assert (request.state, request.outcome) == (State.KEPT, OUTCOME)
    requests.remove(request)
    assert requests.find("a") is None
    assert len(requests.by_key) == 0


def test_results_expire_in_their_order():
    requests = table()
    assert requests.next_expiry == math.inf
    kept = [add(requests, key) for key in "abc"]
    for at, request in enumerate(kept):
        keep(requests, request, float(at))
    assert requests.next_expiry == 10.0
    assert requests.expire(9.9) == 0
    assert requests.expire(11.0) == 2
    assert [requests.find(key) is None for key in "abc"] == [True, True, False]
    assert [each.state for each in kept] == [State.DROPPED, State.DROPPED, State.KEPT]
    assert requests.next_expiry == 12.0


def test_a_running_request_does_not_expire():
    requests = table()
    add(requests, "a")
    assert requests.expire(math.inf) == 0
    assert len(requests.by_key) == 1


def test_of_too_many_results_the_oldest_goes():
    requests = table(max_results=3)
    assert [keep(requests, add(requests, n), 0.0) for n in range(5)] == [0, 0, 0, 1, 1]
    assert [requests.find(n) is None for n in range(5)] == [True, True, False, False, False]


def test_at_the_end_results_are_dropped_and_running_requests_stay():
    requests = table()
    running = add(requests, "a")
    keep(requests, add(requests, "b"), 0.0)
    assert requests.expire(math.inf) == 1
    assert (requests.find("a"), requests.find("b")) == (running, None)
