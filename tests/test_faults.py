import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support.server import api, demo_server, server, web

__all__ = ["api", "demo_server", "server", "web"]

RUNS = "GET training_runs"


@pytest.fixture
def pool():
    with ThreadPoolExecutor(32) as pool:
        yield pool


def test_rule_applies_the_given_number_of_times(api, server):
    rule = server.faults.add(RUNS, status=503, times=2, headers={"Retry-After": "0"})
    responses = [api.get("training_runs") for _ in range(3)]
    assert [response.status_code for response in responses] == [503, 503, 200]
    assert responses[0].headers["retry-after"] == "0"
    assert responses[0].json() == {"detail": "Service Unavailable"}
    assert rule.applied == 2


def test_rule_applies_once_by_default(api, server):
    server.faults.add(RUNS, status=500)
    assert [api.get("training_runs").status_code for _ in range(2)] == [500, 200]


def test_rule_with_after_skips_the_first_requests(api, server):
    server.faults.add(RUNS, status=429, after=2, times=None)
    statuses = [api.get("training_runs").status_code for _ in range(5)]
    assert statuses == [200, 200, 429, 429, 429]
    server.faults.clear()
    assert api.get("training_runs").is_success


def test_rules_apply_one_after_another(api, server):
    server.faults.add(RUNS, status=500)
    server.faults.add(RUNS, status=502)
    assert [api.get("training_runs").status_code for _ in range(3)] == [500, 502, 200]


@pytest.mark.parametrize(
    ("endpoint", "hits", "misses"),
    [
        (RUNS, "training_runs", "checkpoints"),
        ("api", "training_runs", None),
        ("*", "checkpoints", None),
        (re.compile(r"^GET .*/check"), "checkpoints", "training_runs"),
        ("store", None, "training_runs"),
    ],
)
def test_rule_applies_to_matching_endpoints(api, server, endpoint, hits, misses):
    server.faults.add(endpoint, status=500, times=None)
    assert hits is None or api.get(hits).status_code == 500
    assert misses is None or api.get(misses).status_code == 200


def test_rule_with_when_applies_if_the_predicate_holds(api, server):
    server.faults.add(RUNS, status=500, times=None, when=lambda e: e.query.get("offset") == "2")
    statuses = [
        api.get("training_runs", params={"offset": offset}).status_code for offset in (0, 2, 4)
    ]
    assert statuses == [200, 500, 200]


@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        ({"error": "x"}, "application/json", '{"error":"x"}'),
        (["x"], "application/json", '["x"]'),
        ("plain", "text/plain; charset=utf-8", "plain"),
        (b"", None, ""),
    ],
)
def test_rule_with_body_replaces_the_body(api, server, body, content_type, text):
    server.faults.add(RUNS, status=400, body=body)
    response = api.get("training_runs")
    assert (response.status_code, response.text) == (400, text)
    assert response.headers.get("content-type") == content_type


def test_rule_with_status_prevents_the_mutation(api, server):
    run_id = server.account.run_ids[0]
    server.faults.add("DELETE checkpoint", status=500)
    url = f"training_runs/{run_id}/checkpoints/weights/0001"
    assert api.delete(url).status_code == 500
    assert server.account.checkpoint(run_id, "weights/0001")
    assert api.delete(url).is_success


def test_rule_that_loses_the_response_allows_the_mutation(api, server):
    run_id = server.account.run_ids[0]
    server.faults.add("DELETE checkpoint", cut_after_bytes=0)
    with pytest.raises(httpx.RemoteProtocolError):
        api.delete(f"training_runs/{run_id}/checkpoints/weights/0001")
    assert server.account.checkpoint(run_id, "weights/0001") is None


def test_rule_with_html_sends_a_proxy_page(api, server):
    server.faults.add(RUNS, html=True)
    server.faults.add(RUNS, html=True, status=200)
    first, second = api.get("training_runs"), api.get("training_runs")
    assert (first.status_code, second.status_code) == (502, 200)
    assert second.headers["content-type"] == "text/html"
    assert "<html>" in first.text


def test_rule_with_half_json_truncates_the_body(api, server):
    whole = api.get("training_runs").text
    server.faults.add(RUNS, half_json=True)
    response = api.get("training_runs")
    assert response.status_code == 200
    assert whole.startswith(response.text)
    with pytest.raises(ValueError):  # noqa: PT011 - any decoder's
        response.json()


def test_rule_with_redirect_to_redirects(api, server, demo_server):
    other = demo_server()
    server.faults.add(RUNS, redirect_to=f"{other.base_url}/x")
    server.faults.add(RUNS, redirect_to="/elsewhere", status=307)
    first, second = api.get("training_runs"), api.get("training_runs")
    assert (first.status_code, first.headers["location"]) == (302, f"{other.base_url}/x")
    assert (second.status_code, second.headers["location"]) == (307, "/elsewhere")


def test_rule_with_headers_changes_the_headers(api, server):
    server.faults.add(RUNS, headers={"content-type": None, "X-More": "1", "SERVER": "nginx"})
    response = api.get("training_runs")
    assert len(response.json()["training_runs"]) == 10
    assert "content-type" not in response.headers
    assert response.headers["x-more"] == "1"
    assert response.headers.get_list("server") == ["nginx"]


def test_rule_with_latency_delays_the_response(api, server):
    server.faults.add(RUNS, latency_s=0.2)
    start = time.monotonic()
    api.get("training_runs")
    assert time.monotonic() - start >= 0.2
    server.latency_s = 0.1
    start = time.monotonic()
    api.get("healthz")
    assert time.monotonic() - start >= 0.1


def test_rule_with_hang_holds_until_released(api, server, pool):
    rule = server.faults.add(RUNS, hang=True, times=None)
    waiting = [pool.submit(api.get, "training_runs") for _ in range(5)]
    rule.wait_for(5)
    assert rule.waiting == 5
    assert api.get("checkpoints").is_success
    assert not any(future.done() for future in waiting)
    assert server.journal.in_flight(RUNS) == 5
    rule.release()
    assert all(future.result(5).is_success for future in waiting)
    assert api.get("training_runs").is_success
    server.journal.wait_until_idle()
    assert server.journal.max_in_flight(RUNS) == 5


def test_rule_with_hang_and_status_fails_when_released(api, server, pool):
    rule = server.faults.add(RUNS, hang=True, status=503)
    waiting = pool.submit(api.get, "training_runs")
    rule.wait_for(1)
    rule.release()
    assert waiting.result(5).status_code == 503


def test_rule_with_hang_releases_a_disconnected_client(api, server):
    rule = server.faults.add(RUNS, hang=True)
    with pytest.raises(httpx.ReadTimeout):
        api.get("training_runs", timeout=0.1)
    server.journal.wait_until_idle(5)
    assert rule.waiting == 0
    (entry,) = server.journal.entries(RUNS)
    assert (entry.status, entry.end_s is None) == (None, False)


def test_rule_with_hold_until_releases_all_together(api, server, pool):
    server.faults.add(RUNS, hold_until=4, times=4)
    first = [pool.submit(api.get, "training_runs") for _ in range(3)]
    server.journal.wait_for(3, RUNS)
    assert not any(future.done() for future in first)
    assert api.get("training_runs").is_success
    assert all(future.result(5).is_success for future in first)


def test_wait_for_without_requests_times_out(server):
    rule = server.faults.add(RUNS, hang=True)
    with pytest.raises(TimeoutError, match="0 of 1"):
        rule.wait_for(1, timeout_s=0.01)


def test_rule_with_refuse_or_reset_closes_the_connection(api, server):
    server.faults.add(RUNS, refuse=True)
    with pytest.raises(httpx.RemoteProtocolError):
        api.get("training_runs")
    server.faults.add(RUNS, reset=True)
    with pytest.raises(httpx.ReadError) as failure:
        api.get("training_runs")
    assert "reset" in str(failure.value).lower()
    assert api.get("training_runs").is_success


@pytest.fixture
def archive(server):
    run_id = server.account.run_ids[0]
    content = server.archive(run_id, "weights/0001")
    whole = content.read(0, content.size_bytes)
    return server.archive_url(run_id, "weights/0001"), whole


@pytest.mark.parametrize("cut", [0, 1, 300_000, 1_000_000])
def test_rule_with_cut_after_bytes_truncates_the_body(server, web, archive, cut):
    url, whole = archive
    server.faults.add("GET store/archive", cut_after_bytes=cut)
    received = []
    with web.stream("GET", url) as response:
        assert response.headers["content-length"] == str(len(whole))
        with pytest.raises(httpx.RemoteProtocolError):
            received.extend(response.iter_raw())
    assert b"".join(received) == whole[:cut]
    assert server.journal.entries("GET store/archive")[0].sent_bytes == cut


def test_rule_with_stall_after_bytes_continues_when_released(server, web, archive, pool):
    url, whole = archive
    rule = server.faults.add("GET store/archive", stall_after_bytes=100_000)
    waiting = pool.submit(web.get, url)
    rule.wait_for(1)
    assert server.journal.entries("store")[0].sent_bytes == 100_000
    rule.release()
    assert waiting.result(5).content == whole


def test_rule_with_bytes_per_s_limits_the_rate(server, web, archive):
    url, whole = archive
    server.faults.add("GET store/archive", bytes_per_s=100_000)
    start = time.monotonic()
    assert web.get(url, headers={"Range": "bytes=0-29999"}).content == whole[:30_000]
    assert time.monotonic() - start > 0.25


def test_rule_with_ignore_range_sends_everything(server, web, archive):
    url, whole = archive
    server.faults.add("GET store/archive", ignore_range=True)
    response = web.get(url, headers={"Range": "bytes=5-9"})
    assert (response.status_code, response.content) == (200, whole)
    assert server.journal.entries("store")[0].range == "bytes=5-9"


def test_rule_with_flip_byte_inverts_one_byte(server, web, archive):
    url, whole = archive
    server.faults.add("GET store/archive", flip_byte=300_001)
    body = web.get(url).content
    assert [i for i, (a, b) in enumerate(zip(whole, body, strict=True)) if a != b] == [300_001]


def test_rule_with_total_count_changes_the_cursor(api, server):
    server.faults.add(RUNS, total_count=3)
    server.faults.add(RUNS, total_count=lambda n: n + 5)
    totals = [api.get("training_runs").json()["cursor"]["total_count"] for _ in range(3)]
    assert totals == [3, 15, 10]


def test_rule_with_cursor_removes_the_cursor(api, server):
    server.faults.add(RUNS, cursor="null")
    server.faults.add(RUNS, cursor="missing")
    first, second = (api.get("training_runs").json() for _ in range(2))
    assert first["cursor"] is None
    assert "cursor" not in second
    assert len(second["training_runs"]) == 10


def test_rule_with_page_max_shortens_pages(api, server):
    server.faults.add(RUNS, page_max=3)
    page = api.get("training_runs").json()
    assert (len(page["training_runs"]), page["cursor"]["limit"]) == (3, 20)


def test_rule_with_edit_maps_the_body(api, server):
    server.faults.add(RUNS, edit=lambda value: value["training_runs"])
    assert isinstance(api.get("training_runs").json(), list)


def test_rule_with_call_moves_a_run_between_pages(api, server):
    before = server.account.run_ids
    server.faults.add(RUNS, call=lambda: server.account.touch(before[-1]), after=1)
    first = api.get("training_runs", params={"limit": 5}).json()["training_runs"]
    second = api.get("training_runs", params={"limit": 5, "offset": 5}).json()["training_runs"]
    ids = [run["training_run_id"] for run in (*first, *second)]
    assert ids.count(before[4]) == 2
    assert before[-1] not in ids


def test_close_aborts_hanging_requests_at_once(demo_server):
    server = demo_server()
    rule = server.faults.add("*", hang=True, times=None)
    address = server.base_url.removeprefix("http://").split(":")
    clients = [socket.create_connection((address[0], int(address[1]))) for _ in range(50)]
    for client in clients:
        client.sendall(b"GET /api/v1/healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    rule.wait_for(50)
    start = time.monotonic()
    server.close()
    assert time.monotonic() - start < 1
    for client in clients:
        assert client.recv(1) == b""
        client.close()
    server.journal.wait_until_idle(2)
