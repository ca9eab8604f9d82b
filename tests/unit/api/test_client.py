"""Every endpoint of the client, against the embedded server with the profile of each server."""

import dataclasses
from functools import partial

import pytest

from tests.support.clocks import FakeTime
from tests.unit.api.conftest import http
from tinkerfs import errors
from tinkerfs.api import endpoints
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.api.pagination import RecordList
from tinkerfs.clock import SYSTEM_CLOCK
from tinkerfs.demo.profiles import PROFILES

ARCHIVE = "GET archive"
DELETE = "DELETE checkpoint"


def ref_of(run_id, checkpoint, *, exists=True):
    _, _, rest = checkpoint.tinker_path.removeprefix("tinker://").partition("/")
    return CheckpointRef(run_id, rest, checkpoint.checkpoint_id, exists)


def new_records():
    return RecordList(lambda record: record.identity)


def first_run(server):
    return next(iter(server.account.runs())).id


@pytest.fixture
def run_id(server):
    return first_run(server)


@pytest.fixture
def refs(client, run_id):
    """The first checkpoint of each type in the run."""
    found = {}
    for checkpoint in client.list_checkpoints(run_id):
        found.setdefault(checkpoint.checkpoint_type, ref_of(run_id, checkpoint))
    return found


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("runs", "requests"), [(0, 1), (1, 1), (100, 1), (101, 2), (1000, 10)])
def test_all_training_runs_sends_one_request_per_page(demo_server, client_of, runs, requests):
    server = demo_server(runs=runs, checkpoints=1)
    found = client_of(server).all_training_runs()
    assert [run.run_id for run in found] == [run.id for run in server.account.runs()]
    assert server.journal.count("GET training_runs") == requests


def test_all_training_runs_with_moving_runs_is_complete(demo_server, client_of):
    server = demo_server(runs=250, checkpoints=1)
    ids = {run.id for run in server.account.runs()}

    def move(body):
        body["training_runs"] = body["training_runs"][1:] + body["training_runs"][:1]
        return body

    server.faults.add("GET training_runs", edit=move)
    assert {run.run_id for run in client_of(server).all_training_runs()} == ids


def test_listing_with_failing_page_fails(demo_server, client_of):
    server = demo_server(runs=300, checkpoints=1)
    server.faults.add("GET training_runs", status=400, when=lambda e: e.query["offset"] == "200")
    with pytest.raises(errors.BadRequest):
        client_of(server).all_training_runs()


def test_is_failing_after_failed_requests_of_the_endpoint_only(server, client, run_id):
    server.faults.add("GET training_runs/{run}", status=500, times=None)
    for _ in range(3):
        assert not client.is_failing(endpoints.RUN)
        with pytest.raises(errors.ServerError):
            client.training_run(run_id)
    assert client.is_failing(endpoints.RUN)
    assert not client.is_failing(endpoints.RUN_CHECKPOINTS)
    client.reset()
    assert not client.is_failing(endpoints.RUN)


def test_listing_with_invalid_record_warns_once(server, client, expect_warnings):
    expect_warnings("GET training_runs: skipped 1 of 10 records that could not be parsed")

    def invalidate(body):
        body["training_runs"][3] = {"training_run_id": 5}
        return body

    server.faults.add("GET training_runs", edit=invalidate, times=2)
    assert [len(client.all_training_runs()) for _ in range(2)] == [9, 9]
    assert server.journal.count("GET training_runs") == 2


def test_training_run_returns_record_or_raises_not_found(server, client, run_id):
    run = client.training_run(run_id)
    assert run.run_id == run_id
    assert run.base_model
    with pytest.raises(errors.NotFound):
        client.training_run("no:such:run")
    with pytest.raises(errors.NotFound):
        client.training_run("")
    assert server.journal.count("GET training_runs") == 0


def test_training_run_of_other_account_is_returned(demo_server, client_of):
    server = demo_server(foreign_runs=1)
    client = client_of(server)
    own = {run.run_id for run in client.all_training_runs()}
    (foreign,) = server.account.foreign_run_ids
    assert foreign not in own
    assert client.training_run(foreign).run_id == foreign


def test_list_checkpoints_returns_all_of_run(server, client, run_id):
    listed = client.list_checkpoints(run_id)
    assert len(listed) == 5
    user = client.all_user_checkpoints(new_records)
    assert len(user) == 50
    assert {c.tinker_path for c in listed} <= {c.tinker_path for c in user}
    assert server.journal.count("GET checkpoints") == 1
    with pytest.raises(errors.NotFound):
        client.list_checkpoints("no:such:run")


def test_all_user_checkpoints_requests_large_pages(demo_server, client_of):
    server = demo_server(runs=120, checkpoints=10)
    assert len(client_of(server).all_user_checkpoints(new_records)) == 1200
    assert server.journal.count("GET checkpoints") == 2


@pytest.mark.parametrize("status", [400, 422])
def test_all_user_checkpoints_without_large_pages(demo_server, client_of, status):
    server = demo_server(runs=30, checkpoints=10)
    server.faults.add(
        "GET checkpoints", status=status, when=lambda r: r.query.get("limit") == "1000", times=None
    )
    client = client_of(server)
    for requests in (4, 3):  # the refusal of large pages is remembered
        server.journal.clear()
        assert len(client.all_user_checkpoints(new_records)) == 300
        assert server.journal.count("GET checkpoints") == requests


def test_weights_info_returns_record_or_raises(client, run_id):
    path = client.list_checkpoints(run_id)[0].tinker_path
    info = client.weights_info(path)
    assert info.base_model
    assert b'"base_model"' in info.raw
    with pytest.raises(errors.NotFound):
        client.weights_info(path + "9")
    with pytest.raises(errors.BadRequest):
        client.weights_info("nonsense")


def test_sessions_and_samplers_are_returned(demo_server, client_of):
    server = demo_server(runs=450, checkpoints=2)
    client = client_of(server)
    ids = client.all_sessions()
    assert len(ids) == len(set(ids)) > 200
    session = client.session(ids[0])
    assert session.session_id == ids[0]
    assert session.training_run_ids
    sampler = next(s for i in ids for s in client.session(i).sampler_ids)
    assert client.sampler(sampler).sampler_id == sampler
    found = client.search_sessions(limit=5)
    assert len(found.items) == 5
    assert client.search_sessions(limit=5, cursor=found.next_cursor).items != found.items
    with pytest.raises(errors.NotFound):
        client.session("no-such-session")
    with pytest.raises(errors.NotFound):
        client.sampler("no:sample:1")


def test_all_sessions_with_clamped_pages_is_complete(demo_server, client_of):
    server = demo_server(runs=100, checkpoints=1)
    client = client_of(server)
    ids = client.all_sessions()
    server.faults.add("GET sessions", page_max=20, times=None)
    assert client.all_sessions() == ids
    assert len(ids) > 20


def test_whoami_returns_the_record_of_the_key(client):
    assert b"key_id" in client.whoami()


# --- changes -------------------------------------------------------------------------------------


def test_publish_twice_succeeds(client, refs, run_id):
    ref = refs["training"]
    for _ in range(2):
        client.publish(ref)
    states = {c.checkpoint_id: c.is_public for c in client.list_checkpoints(run_id)}
    assert states[ref.listed_id] is True
    for _ in range(2):
        client.unpublish(ref)


@pytest.mark.parametrize("endpoint", ["POST publish", "DELETE publish"])
def test_publish_with_status_409_succeeds(server, client, refs, endpoint):
    server.faults.add(endpoint, status=409, body={"detail": "already"})
    change = client.publish if endpoint.startswith("POST") else client.unpublish
    change(refs["training"])
    assert server.journal.count(endpoint) == 1


def test_set_ttl_sets_and_clears_expiry(client, refs, run_id):
    ref = refs["sampler"]
    client.set_ttl(ref, 3600)
    expiries = {c.checkpoint_id: c.expires_at_ns for c in client.list_checkpoints(run_id)}
    assert expiries[ref.listed_id]
    client.set_ttl(ref, None)
    expiries = {c.checkpoint_id: c.expires_at_ns for c in client.list_checkpoints(run_id)}
    assert expiries[ref.listed_id] is None
    with pytest.raises(errors.BadRequest, match="3600"):
        client.set_ttl(ref, 60)


def test_delete_twice_raises_not_found(client, refs, run_id):
    client.delete(refs["training"])
    assert len(client.list_checkpoints(run_id)) == 4
    with pytest.raises(errors.NotFound):
        client.delete(refs["training"])


@pytest.mark.parametrize(
    ("status", "kind"), [(409, errors.Conflict), (425, errors.ResourceNotReady)]
)
def test_delete_of_incomplete_checkpoint_is_not_retried(server, client, refs, status, kind):
    server.faults.add(DELETE, status=status, times=None)
    with pytest.raises(kind):
        client.delete(refs["training"])
    assert server.journal.count(DELETE) == 1


FAULTS = [{"refuse": True}, {"reset": True}, {"status": 502}]


@pytest.mark.parametrize("fault", FAULTS)
def test_change_without_recheck_is_sent_once(server, client, refs, fault):
    ref = refs["training"]
    server.faults.add(DELETE, **fault)
    with pytest.raises(errors.ApiError):
        client.delete(ref)
    assert server.journal.count(DELETE) == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_change_is_rechecked_before_each_retry(server, client, refs, run_id, fault):
    ref, seen = refs["training"], []
    server.faults.add(DELETE, times=2, **fault)

    def recheck(failure, may_have_succeeded):
        seen.append((type(failure), may_have_succeeded, server.journal.count(DELETE)))
        return False

    client.delete(ref, recheck)
    kind = errors.ServerError if "status" in fault else errors.ConnectionFailed
    assert seen == [(kind, True, 1), (kind, True, 2)]
    assert len(client.list_checkpoints(run_id)) == 4


def test_change_found_made_by_recheck_is_not_retried(server, client, refs):
    server.faults.add(DELETE, status=503)
    client.delete(refs["training"], lambda _failure, _may_have_succeeded: True)
    assert server.journal.count(DELETE) == 1


def test_change_forbidden_by_recheck_raises_its_error(server, client, refs):
    server.faults.add(DELETE, status=503)

    def recheck(_failure, _may_have_succeeded):
        raise errors.Conflict("saved again")

    with pytest.raises(errors.Conflict, match="saved again"):
        client.delete(refs["training"], recheck)
    assert server.journal.count(DELETE) == 1


@pytest.mark.parametrize("status", [408, 429])
def test_recheck_after_refusal_excludes_success(server, client, refs, status):
    seen = []
    server.faults.add(DELETE, status=status)
    client.delete(
        refs["training"], lambda _failure, may_have_succeeded: seen.append(may_have_succeeded)
    )
    assert seen == [False]


@pytest.mark.parametrize("fault", FAULTS)
def test_delete_retry_with_status_404_succeeds(server, client, refs, run_id, fault):
    ref = refs["training"]
    server.faults.add(
        DELETE, call=lambda: server.account.delete_checkpoint(run_id, ref.path_id), **fault
    )
    # The recheck sees a stale listing that still includes the checkpoint.
    client.delete(ref, lambda _failure, _may_have_succeeded: False)
    assert [e.status for e in server.journal.entries(DELETE)][-1] == 404


def test_publish_retries_use_same_idempotency_key(server, client, refs):
    server.faults.add("POST publish", status=503, times=2)
    for _ in range(2):
        client.publish(refs["training"], lambda _failure, _may_have_succeeded: False)
    keys = [e.headers["x-idempotency-key"] for e in server.journal.entries("POST publish")]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert len(set(keys)) == 2


def test_change_with_portal_page_records_no_id_form(demo_server, client_of):
    server = demo_server(profile="hatchery")
    client, run_id = client_of(server), first_run(server)
    ref = ref_of(run_id, client.list_checkpoints(run_id)[0])
    server.faults.add(DELETE, status=200, html=True)
    with pytest.raises(errors.ProtocolError, match="neither empty nor JSON"):
        client.delete(ref)
    client.delete(ref)
    assert len(client.list_checkpoints(run_id)) == 4


def test_empty_id_raises_not_found_without_request(server, client):
    for ref in (CheckpointRef("", "weights/1", "1"), CheckpointRef("r", "", "")):
        for change in (client.delete, client.publish, client.archive):
            with pytest.raises(errors.NotFound):
                change(ref)
    assert server.journal.count() == 0


# --- archives and external weights ---------------------------------------------------------------


def test_archive_redirect_is_not_followed(server, client, refs):
    signed = client.archive(refs["training"])
    assert signed.url.startswith(server.store_url)
    assert server.journal.count("store") == 0
    assert 800 < signed.expires_at_s - SYSTEM_CLOCK.now() <= 900


def test_archive_with_json_response_returns_url(server, client, refs):
    server.behaviour.archive_response = "json"
    signed = client.archive(refs["training"])
    assert signed.url.startswith(server.store_url)


TRACE = "GET trace_export"


def test_trace_url_is_returned_once_the_trace_is_built(server, client):
    session = server.account.session(server.account.session_ids()[0])
    session.trace_polls = 1
    with pytest.raises(errors.ResourceNotReady, match="not built yet: pending") as caught:
        client.trace_url(session.id)
    assert caught.value.retry_after_s == 1.0
    signed = client.trace_url(session.id)
    assert signed.url.startswith(server.store_url)
    assert 890 < signed.expires_at_s - SYSTEM_CLOCK.now() <= 900
    assert server.journal.count(TRACE) == 2


def test_failed_trace_has_the_redacted_words_of_the_server(server, client):
    session = server.account.session(server.account.session_ids()[0])
    session.trace_error = "no events at https://store/x?X-Signature=secret"
    with pytest.raises(errors.BuildFailed, match="could not be built: no events") as caught:
        client.trace_url(session.id)
    assert "secret" not in str(caught.value)
    assert server.journal.count(TRACE) == 1


def test_trace_of_an_unknown_session_is_not_found(client):
    with pytest.raises(errors.NotFound):
        client.trace_url("none")


def test_missing_trace_endpoint_is_remembered(server, client):
    server.faults.add(TRACE, status=404, body={"detail": "Not Found"}, times=None)
    client.check_supported(endpoints.TRACE)
    for _ in range(5):
        with pytest.raises(errors.UnsupportedEndpoint):
            client.trace_url("s")
    assert server.journal.count(TRACE) == 3
    with pytest.raises(errors.UnsupportedEndpoint):
        client.check_supported(endpoints.TRACE)


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"status": "ready"}',
        b'{"status": "ready", "url": "ftp://store/x?sig=1"}',
        b'{"status": 7}',
        b"[]",
    ],
)
def test_trace_without_status_or_url_raises_protocol_error(bytes_of, client_of, body):
    _server, client = start(bytes_of, client_of, http(200, body))
    with pytest.raises(errors.ProtocolError) as caught:
        client.trace_url("s")
    assert "sig" not in str(caught.value)


def test_trace_with_an_unknown_status_is_not_ready(bytes_of, client_of):
    _server, client = start(bytes_of, client_of, http(200, b'{"status": "queued"}'))
    with pytest.raises(errors.ResourceNotReady, match="queued"):
        client.trace_url("s")


def start(bytes_of, client_of, *scripts, clock=None):
    server = bytes_of(*scripts)
    options = {} if clock is None else {"clock": clock}
    return server, client_of(server, **options)


REF = CheckpointRef("r", "weights/1", "weights/1", exists=True)


@pytest.mark.parametrize(
    ("headers", "lifetime_s"),
    [
        ((), 900),
        (("Expires: Fri, 15 Jan 2027 08:01:00 GMT",), 60),
        (("Expires: Fri, 15 Jan 2027 07:00:00 GMT",), 900),
        (("Expires: 0",), 900),
        (("Expires: soon",), 900),
    ],
)
def test_archive_redirect_expiry_is_parsed(bytes_of, client_of, headers, lifetime_s):
    time = FakeTime()
    script = http(302, b"", "Location: https://store/x?sig=1", *headers)
    _, client = start(bytes_of, client_of, script, clock=time.clock)
    signed = client.archive(REF)
    assert signed.url == "https://store/x?sig=1"
    assert signed.expires_at_s == time.now + lifetime_s


@pytest.mark.parametrize(
    ("script", "url"),
    [
        (http(302, b"", "Location: /files/x?sig=1"), "/files/x?sig=1"),
        (
            http(307, b"", "Location: x?sig=1"),
            "/api/v1/training_runs/r/checkpoints/weights/1/x?sig=1",
        ),
    ],
)
def test_archive_relative_location_is_resolved(bytes_of, client_of, script, url):
    server, client = start(bytes_of, client_of, script)
    assert client.archive(REF).url == server.base_url + url


@pytest.mark.parametrize(
    "script",
    [
        http(302),
        http(302, b"", "Location: file:///etc/passwd"),
        http(302, b"", "Location: https:///nowhere?sig=1"),
        http(302, b"", "Location: https://[bad?sig=1"),
        http(200, b'{"url": null}'),
        http(200, b'{"url": "https://store/x y?sig=1"}'),
        http(200, b'{"url": "ftp://store/x?sig=1"}'),
        http(200, b"[]"),
    ],
)
def test_archive_with_invalid_url_raises_protocol_error(bytes_of, client_of, script):
    server, client = start(bytes_of, client_of, script)
    with pytest.raises(errors.ProtocolError) as caught:
        client.archive(REF)
    assert "sig" not in str(caught.value)
    assert len(server.received) == 1


@pytest.mark.parametrize("status", [425, 503])
def test_archive_not_ready_is_not_retried(server, client, refs, status):
    server.faults.add(ARCHIVE, status=status, headers={"Retry-After": "2.5"})
    with pytest.raises(errors.ResourceNotReady) as caught:
        client.archive(refs["training"])
    assert caught.value.retry_after_s == 2.5
    assert server.journal.count(ARCHIVE) == 1


def test_external_weights_urls_returns_url_per_file(client, refs):
    urls, expires_at_s = client.external_weights_urls(refs["external"])
    assert "adapter_config.json" in urls
    assert all(url.startswith("http://") for url in urls.values())
    assert expires_at_s > 0


@pytest.mark.parametrize(
    "body",
    [b"{}", b'{"urls": []}', b'{"urls": {"a": null}}', b'{"urls": {"a": "file:///x?sig=1"}}'],
)
def test_external_weights_urls_with_invalid_url_fails(bytes_of, client_of, body):
    _, client = start(bytes_of, client_of, http(200, body))
    with pytest.raises(errors.ProtocolError):
        client.external_weights_urls(REF)


#: A request to each endpoint that is not a change.
READS = {
    "GET training_runs": lambda client: client.list_training_runs(),
    "GET training_runs/{run}": lambda client: client.training_run("r"),
    "GET training_runs/{run}/checkpoints": lambda client: client.list_checkpoints("r"),
    "GET checkpoints": lambda client: client.list_user_checkpoints(),
    "POST weights_info": lambda client: client.weights_info("tinker://r/weights/1"),
    "GET external_weights_urls": lambda client: client.external_weights_urls(REF),
    "GET sessions": lambda client: client.list_sessions(),
    "GET sessions/{session}": lambda client: client.session("s"),
    "GET trace_export": lambda client: client.trace_url("s"),
    "POST sessions/search": lambda client: client.search_sessions(),
    "GET samplers/{sampler}": lambda client: client.sampler("s"),
    "GET auth/apikey/me": lambda client: client.whoami(),
}
PORTALS = {
    "page": http(200, b"<html><title>Log in</title></html>", "Content-Type: text/html"),
    "page called JSON": http(200, b"<!doctype html>", "Content-Type: application/json"),
    "text": http(200, b"Please log in"),
    "empty": http(200),
    "redirect": http(302, b"", "Location: http://portal/login"),
}


@pytest.mark.parametrize("portal", PORTALS)
@pytest.mark.parametrize("read", READS)
def test_portal_page_raises_protocol_error(bytes_of, client_of, read, portal):
    server, client = start(bytes_of, client_of, PORTALS[portal])
    with pytest.raises(errors.ProtocolError):
        READS[read](client)
    assert len(server.received) == 1


@pytest.mark.parametrize("portal", [each for each in PORTALS if each != "redirect"])
def test_archive_with_portal_page_raises_protocol_error(bytes_of, client_of, portal):
    server, client = start(bytes_of, client_of, PORTALS[portal])
    with pytest.raises(errors.ProtocolError):
        client.archive(REF)
    assert len(server.received) == 1


# --- profiles of servers -------------------------------------------------------------------------


@pytest.mark.parametrize("status", [404, 405, 410, 501])
@pytest.mark.parametrize("exists", [True, False])
def test_missing_archive_of_listed_checkpoint_is_unsupported(server, client, status, exists):
    server.faults.add(ARCHIVE, status=status, body={"detail": "Not Found"})
    ref = CheckpointRef("r", "weights/1", "weights/1", exists)
    is_missing = exists or status in (405, 501)
    with pytest.raises(errors.UnsupportedEndpoint if is_missing else errors.NotFound):
        client.archive(ref)


def test_official_without_archive_endpoint_raises_unsupported(demo_server, client_of):
    server = demo_server(profile="official-0.36")
    client = client_of(server)
    run_id = first_run(server)
    ref = ref_of(run_id, client.list_checkpoints(run_id)[0])
    with pytest.raises(errors.UnsupportedEndpoint):
        client.archive(ref)
    client.delete(ref)
    with pytest.raises(errors.NotFound):
        client.delete(ref)


def test_skyrl_profile_id_forms_and_missing_endpoints(demo_server, client_of):
    server = demo_server(profile="skyrl", runs=120)
    client = client_of(server)
    assert len(client.all_training_runs()) == 120
    list_user = partial(client.all_user_checkpoints, new_records)
    for read in (list_user, client.all_sessions, client.whoami):
        with pytest.raises(errors.UnsupportedEndpoint):
            read()
    run_id = first_run(server)
    by_type = {}
    for checkpoint in client.list_checkpoints(run_id):
        by_type.setdefault(checkpoint.checkpoint_type, ref_of(run_id, checkpoint))
    sampler = by_type["sampler"]
    assert sampler.listed_id != sampler.path_id
    # Both forms are tried the first time, and then only the accepted one.
    for count in (2, 3):
        assert client.archive(sampler).url.startswith(server.base_url)
        assert server.journal.count(ARCHIVE) == count
    for change in (client.publish, lambda ref: client.set_ttl(ref, 3600)):
        with pytest.raises(errors.UnsupportedEndpoint):
            change(sampler)
    with pytest.raises(errors.BadRequest):  # the route of delete matches any path
        client.unpublish(sampler)
    assert sampler.path_id in {c.id for c in server.account.run(run_id).checkpoints}
    # Delete requires the other form.
    client.delete(sampler)
    assert server.journal.count(DELETE) == 1


def test_ambiguous_id_never_reaches_other_checkpoint(demo_server, client_of):
    server = demo_server(profile="skyrl")
    client = client_of(server)
    run_id = first_run(server)
    ids = [c.checkpoint_id for c in client.list_checkpoints(run_id)]
    ambiguous_id = next(name for name in ids if ids.count(name) == 2)
    training, sampler = (
        CheckpointRef(
            run_id, f"{kind}/{ambiguous_id}", ambiguous_id, exists=True, has_ambiguous_id=True
        )
        for kind in ("weights", "sampler_weights")
    )
    client.archive(sampler)
    with pytest.raises(errors.UnsupportedEndpoint):
        client.archive(training)
    client.delete(training)
    with pytest.raises(errors.NotFound):
        client.delete(training)
    remaining = [c.tinker_path for c in client.list_checkpoints(run_id)]
    assert any(path.endswith(f"/sampler_weights/{ambiguous_id}") for path in remaining)


def test_unsupported_endpoints_are_requested_rarely(demo_server, client_of):
    server = demo_server(profile="skyrl", runs=1, checkpoints=0)
    client, run_id = client_of(server), first_run(server)
    for kind in ("weights", "sampler_weights"):
        for number in range(10):
            server.account.add_checkpoint(run_id, f"{kind}/{kind[0]}{number}")
    checkpoints = client.list_checkpoints(run_id)
    refs = [ref_of(run_id, c) for c in checkpoints]
    for ref in refs:
        is_sampler = ref.path_id.startswith("sampler")
        for change in (client.publish, lambda ref: client.set_ttl(ref, 3600)):
            with pytest.raises(errors.UnsupportedEndpoint):
                change(ref)
        if is_sampler:
            client.archive(ref)
        else:
            with pytest.raises(errors.UnsupportedEndpoint, match="but it is listed"):
                client.archive(ref)
    for checkpoint in checkpoints:
        if "sampler" in checkpoint.tinker_path:
            with pytest.raises(errors.BadRequest):
                client.weights_info(checkpoint.tinker_path, exists=True)
        else:
            client.weights_info(checkpoint.tinker_path, exists=True)
    # Three of each kind in both forms of the id; the others fail locally.
    assert server.journal.count("POST publish") == server.journal.count("PUT ttl") == 12
    refused = [e for e in server.journal.entries("POST weights_info") if e.status == 400]
    assert len(refused) == 3
    archives = [entry.status for entry in server.journal.entries(ARCHIVE)]
    # Three in both forms, and one form of the first sampler checkpoint.
    assert (archives.count(405), archives.count(404)) == (3 + 1, 3)
    client.reset()
    with pytest.raises(errors.UnsupportedEndpoint):
        client.publish(refs[0])
    assert server.journal.count("POST publish") == 14


def test_delete_without_endpoint_raises_unsupported(demo_server, client_of):
    profile = PROFILES["skyrl"]
    profile = dataclasses.replace(profile, missing=profile.missing | {DELETE})
    server = demo_server(profile=profile)
    client, run_id = client_of(server), first_run(server)
    with pytest.raises(errors.UnsupportedEndpoint):
        client.delete(ref_of(run_id, client.list_checkpoints(run_id)[0]))


def test_archive_of_deleted_checkpoint_raises_not_found(server, client):
    run_id = first_run(server)
    ref = ref_of(run_id, client.list_checkpoints(run_id)[0])
    server.account.delete_checkpoint(run_id, ref.path_id)
    with pytest.raises(errors.NotFound):
        client.archive(ref)


def test_hatchery_profile_id_forms_and_missing_endpoints(demo_server, client_of):
    server = demo_server(profile="hatchery")
    client = client_of(server)
    list_user = partial(client.all_user_checkpoints, new_records)
    for read in (client.all_training_runs, list_user, client.all_sessions):
        with pytest.raises(errors.UnsupportedEndpoint):
            read()
    run_id = first_run(server)
    first, second, *_ = (ref_of(run_id, c) for c in client.list_checkpoints(run_id))
    with pytest.raises(errors.UnsupportedEndpoint):
        client.archive(first)
    client.delete(first)
    client.delete(second)
    assert len(client.list_checkpoints(run_id)) == 3
    statuses = [entry.status for entry in server.journal.entries(DELETE)]
    assert statuses[0] in (404, 405)
    assert statuses[1:] == [200, 200]


def test_try_forms_raises_error_of_handler_over_router(bytes_of, client_of):
    ref = CheckpointRef("r", "weights/1", "1", exists=True)
    router = http(404, b'{"detail":"Not Found"}')
    handler = http(404, b'{"detail":"Checkpoint 1 not found"}')
    for scripts in ((router, handler), (handler, router)):
        _, client = start(bytes_of, client_of, *scripts)
        with pytest.raises(errors.NotFound, match="Checkpoint 1"):
            client.archive(ref)
    _, client = start(bytes_of, client_of, router, http(503))
    with pytest.raises(errors.ResourceNotReady):
        client.archive(ref)
