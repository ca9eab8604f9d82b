import re
import threading

import pytest

from tests.support.request_log import RequestLog, RequestRecord
from tests.support.server import api, demo_server, server, web

__all__ = ["api", "demo_server", "server", "web"]


def record(endpoint="GET training_runs", origin="api", **fields):
    method, _, path = endpoint.partition(" ")
    return RequestRecord(origin, method, f"/{path}", {}, endpoint, fields.pop("headers", {}), None)


def test_record_contains_request_and_response(api, server):
    api.get("training_runs", params={"limit": 3}, headers={"User-Agent": "me/1"})
    server.journal.wait_until_idle()
    (found,) = server.journal
    assert (found.origin, found.method, found.path) == ("api", "GET", "/api/v1/training_runs")
    assert (found.query, found.endpoint, found.status) == ({"limit": "3"}, "GET training_runs", 200)
    assert (found.user_agent, found.had_key, found.api_key) == ("me/1", True, server.api_key)
    assert found.end_s >= found.start_s
    assert found.sent_bytes > 100


def test_record_contains_the_body(api, server):
    api.post("weights_info", json={"tinker_path": "x"}, headers={"X-Idempotency-Key": "1"})
    (found,) = server.journal.entries("POST weights_info")
    assert found.body == b'{"tinker_path":"x"}'
    assert found.headers["x-idempotency-key"] == "1"


def test_record_headers_exclude_secrets(api, server):
    api.get("healthz", headers={"Authorization": "Bearer x", "Cookie": "y"})
    (found,) = server.journal
    assert not {"x-api-key", "authorization", "cookie"} & found.headers.keys()
    assert server.api_key not in repr(found)


def test_count_filters_by_endpoint():
    journal = RequestLog()
    for name in ("GET training_runs", "GET training_runs", "GET checkpoints"):
        journal.begin(record(name))
    journal.begin(record("GET store/archive", origin="store"))
    assert (journal.count(), len(journal), journal.count("GET training_runs")) == (4, 4, 2)
    assert (journal.count("api"), journal.count("store")) == (3, 1)
    assert journal.count(re.compile("^GET /train")) == 2
    assert journal.endpoints() == {
        "GET training_runs": 2,
        "GET checkpoints": 1,
        "GET store/archive": 1,
    }
    journal.clear()
    assert journal.count() == 0
    assert journal.max_in_flight() == journal.in_flight() == 4


def test_max_in_flight_counts_concurrent_requests():
    journal = RequestLog()
    first, second, third = record(), record(), record("GET checkpoints")
    journal.begin(first)
    journal.begin(second)
    journal.end(first)
    journal.begin(third)
    assert (journal.in_flight(), journal.max_in_flight()) == (2, 2)
    assert journal.max_in_flight("GET training_runs") == 2
    assert journal.max_in_flight("GET checkpoints") == 1
    with pytest.raises(TimeoutError):
        journal.wait_until_idle(0.01)
    journal.end(second)
    journal.end(third)
    journal.wait_until_idle(0.01)
    journal.clear()
    assert journal.max_in_flight() == 0


def test_wait_for_waits_for_requests():
    journal = RequestLog()
    with pytest.raises(TimeoutError, match="0 of 2 requests"):
        journal.wait_for(2, timeout_s=0.01)
    timer = threading.Timer(0.05, lambda: [journal.begin(record()) for _ in range(2)])
    timer.start()
    assert len(journal.wait_for(2, "GET training_runs")) == 2
    timer.join()


def test_full_log_discards_the_oldest_requests():
    journal = RequestLog(capacity=3)
    entries = [record() for _ in range(5)]
    for each in entries:
        journal.begin(each)
    assert list(journal) == entries[2:]


def test_unknown_requests_are_recorded(api, server):
    api.get("nothing")
    assert server.journal.endpoints() == {"?": 1}
