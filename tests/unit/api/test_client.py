"""Every endpoint, against the embedded server in the manner of each known server."""

import dataclasses

import pytest

from tests.support.clocks import FakeTime
from tests.unit.api.conftest import http
from tinkerfs import errors
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.clock import SYSTEM_CLOCK
from tinkerfs.demo.profiles import PROFILES

ARCHIVE = "GET archive"
DELETE = "DELETE checkpoint"


def ref_of(run_id, checkpoint, *, is_known=True):
    _, _, rest = checkpoint.tinker_path.removeprefix("tinker://").partition("/")
    return CheckpointRef(run_id, rest, checkpoint.checkpoint_id, is_known)


def first_run(server):
    return next(iter(server.account.runs())).id


@pytest.fixture
def run_id(server):
    return first_run(server)


@pytest.fixture
def refs(client, run_id):
    """The run's checkpoints by kind: the first of each."""
    found = {}
    for checkpoint in client.list_checkpoints(run_id):
        found.setdefault(checkpoint.checkpoint_type, ref_of(run_id, checkpoint))
    return found


# --- looking -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("runs", "calls"), [(0, 1), (1, 1), (100, 1), (101, 2), (1000, 10)])
def test_listing_runs_costs_a_call_a_page(demo_server, client_of, runs, calls):
    server = demo_server(runs=runs, checkpoints=1)
    found = client_of(server).all_training_runs()
    assert [run.run_id for run in found] == [run.id for run in server.account.runs()]
    assert server.journal.count("GET training_runs") == calls


def test_a_listing_in_which_runs_move(demo_server, client_of):
    server = demo_server(runs=250, checkpoints=1)
    ids = {run.id for run in server.account.runs()}

    def move(answer):
        answer["training_runs"] = answer["training_runs"][1:] + answer["training_runs"][:1]
        return answer

    server.faults.add("GET training_runs", edit=move)
    assert {run.run_id for run in client_of(server).all_training_runs()} == ids


def test_a_page_that_fails_fails_the_listing(demo_server, client_of):
    server = demo_server(runs=300, checkpoints=1)
    server.faults.add("GET training_runs", status=400, when=lambda e: e.query["offset"] == "200")
    with pytest.raises(errors.BadRequest):
        client_of(server).all_training_runs()


def test_a_record_that_cannot_be_read_is_told(server, client, expect_warnings):
    expect_warnings("GET training_runs: 1 of 10 records could not be read")

    def spoil(answer):
        answer["training_runs"][3] = {"training_run_id": 5}
        return answer

    server.faults.add("GET training_runs", edit=spoil, times=2)
    assert [len(client.all_training_runs()) for _ in range(2)] == [9, 9]
    assert server.journal.count("GET training_runs") == 2


def test_one_run(server, client, run_id):
    run = client.training_run(run_id)
    assert run.run_id == run_id
    assert run.base_model
    with pytest.raises(errors.NotFound):
        client.training_run("no:such:run")
    with pytest.raises(errors.NotFound):
        client.training_run("")
    assert server.journal.count("GET training_runs") == 0


def test_a_public_run_of_somebody_else(demo_server, client_of):
    server = demo_server(foreign_runs=1)
    client = client_of(server)
    own = {run.run_id for run in client.all_training_runs()}
    (foreign,) = server.account.foreign_run_ids
    assert foreign not in own
    assert client.training_run(foreign).run_id == foreign


def test_checkpoints(server, client, run_id):
    listed = client.list_checkpoints(run_id)
    assert len(listed) == 5
    user = client.all_user_checkpoints()
    assert len(user) == 50
    assert {c.tinker_path for c in listed} <= {c.tinker_path for c in user}
    assert server.journal.count("GET checkpoints") == 1
    with pytest.raises(errors.NotFound):
        client.list_checkpoints("no:such:run")


def test_weights_info(client, run_id):
    path = client.list_checkpoints(run_id)[0].tinker_path
    info = client.weights_info(path)
    assert info.base_model
    assert b'"base_model"' in info.raw
    with pytest.raises(errors.NotFound):
        client.weights_info(path + "9")
    with pytest.raises(errors.BadRequest):
        client.weights_info("nonsense")


def test_sessions_and_samplers(demo_server, client_of):
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


def test_a_silent_clamp_of_sessions_loses_none(demo_server, client_of):
    server = demo_server(runs=100, checkpoints=1)
    client = client_of(server)
    ids = client.all_sessions()
    server.faults.add("GET sessions", page_max=20, times=None)
    assert client.all_sessions() == ids
    assert len(ids) > 20


def test_the_server_itself(client):
    assert client.health() == "ok"
    assert "Qwen/Qwen3-8B" in client.capabilities().models
    assert b"key_id" in client.whoami()


# --- changing ------------------------------------------------------------------------------------


def test_publishing_twice_is_success(client, refs, run_id):
    ref = refs["training"]
    for _ in range(2):
        client.publish(ref)
    states = {c.checkpoint_id: c.is_public for c in client.list_checkpoints(run_id)}
    assert states[ref.listed_id] is True
    for _ in range(2):
        client.unpublish(ref)


@pytest.mark.parametrize("endpoint", ["POST publish", "DELETE publish"])
def test_409_says_already_so(server, client, refs, endpoint):
    server.faults.add(endpoint, status=409, body={"detail": "already"})
    change = client.publish if endpoint.startswith("POST") else client.unpublish
    change(refs["training"])
    assert server.journal.count(endpoint) == 1


def test_ttl(client, refs, run_id):
    ref = refs["sampler"]
    client.set_ttl(ref, 3600)
    expiries = {c.checkpoint_id: c.expires_at_ns for c in client.list_checkpoints(run_id)}
    assert expiries[ref.listed_id]
    client.set_ttl(ref, None)
    expiries = {c.checkpoint_id: c.expires_at_ns for c in client.list_checkpoints(run_id)}
    assert expiries[ref.listed_id] is None
    with pytest.raises(errors.BadRequest, match="3600"):
        client.set_ttl(ref, 60)


def test_delete(client, refs, run_id):
    client.delete(refs["training"])
    assert len(client.list_checkpoints(run_id)) == 4
    with pytest.raises(errors.NotFound):
        client.delete(refs["training"])


@pytest.mark.parametrize(
    ("status", "kind"), [(409, errors.Conflict), (425, errors.ResourceNotReady)]
)
def test_a_checkpoint_that_is_being_written_is_not_asked_twice(server, client, refs, status, kind):
    server.faults.add(DELETE, status=status, times=None)
    with pytest.raises(kind):
        client.delete(refs["training"])
    assert server.journal.count(DELETE) == 1


LOSSES = [{"refuse": True}, {"reset": True}, {"status": 502}]


@pytest.mark.parametrize("fault", LOSSES)
def test_change_without_recheck_is_sent_once(server, client, refs, fault):
    ref = refs["training"]
    server.faults.add(DELETE, **fault)
    with pytest.raises(errors.ApiError):
        client.delete(ref)
    assert server.journal.count(DELETE) == 1


@pytest.mark.parametrize("fault", LOSSES)
def test_change_is_rechecked_before_each_retry(server, client, refs, run_id, fault):
    ref, seen = refs["training"], []
    server.faults.add(DELETE, times=2, **fault)

    def recheck(failure, may_be_done):
        seen.append((type(failure), may_be_done, server.journal.count(DELETE)))
        return False

    client.delete(ref, recheck)
    kind = errors.ServerError if "status" in fault else errors.ConnectionFailed
    assert seen == [(kind, True, 1), (kind, True, 2)]
    assert len(client.list_checkpoints(run_id)) == 4


def test_change_that_a_recheck_finds_made_is_not_sent(server, client, refs):
    server.faults.add(DELETE, status=503)
    client.delete(refs["training"], lambda _failure, _may_be_done: True)
    assert server.journal.count(DELETE) == 1


def test_change_that_a_recheck_forbids_fails_with_its_error(server, client, refs):
    server.faults.add(DELETE, status=503)

    def recheck(_failure, _may_be_done):
        raise errors.Conflict("saved again")

    with pytest.raises(errors.Conflict, match="saved again"):
        client.delete(refs["training"], recheck)
    assert server.journal.count(DELETE) == 1


@pytest.mark.parametrize("status", [408, 429])
def test_change_that_was_refused_cannot_be_done(server, client, refs, status):
    seen = []
    server.faults.add(DELETE, status=status)
    client.delete(refs["training"], lambda _failure, may_be_done: seen.append(may_be_done))
    assert seen == [False]


@pytest.mark.parametrize("fault", LOSSES)
def test_delete_still_listed_but_gone_counts_as_done(server, client, refs, run_id, fault):
    ref = refs["training"]
    server.faults.add(
        DELETE, call=lambda: server.account.delete_checkpoint(run_id, ref.path_id), **fault
    )
    # As a listing that lags says: it is there.
    client.delete(ref, lambda _failure, _may_be_done: False)
    assert [e.status for e in server.journal.entries(DELETE)][-1] == 404


def test_publish_keeps_its_idempotency_key_over_retries(server, client, refs):
    server.faults.add("POST publish", status=503, times=2)
    for _ in range(2):
        client.publish(refs["training"], lambda _failure, _may_be_done: False)
    keys = [e.headers["x-idempotency-key"] for e in server.journal.entries("POST publish")]
    assert len(keys) == 4
    assert len(set(keys[:3])) == 1
    assert len(set(keys)) == 2


def test_portal_in_place_of_a_change_teaches_no_id_form(demo_server, client_of):
    server = demo_server(profile="hatchery")
    client, run_id = client_of(server), first_run(server)
    ref = ref_of(run_id, client.list_checkpoints(run_id)[0])
    server.faults.add(DELETE, status=200, html=True)
    with pytest.raises(errors.ProtocolError, match="neither empty nor JSON"):
        client.delete(ref)
    client.delete(ref)
    assert len(client.list_checkpoints(run_id)) == 4


def test_an_empty_id_never_becomes_another_endpoint(server, client):
    for ref in (CheckpointRef("", "weights/1", "1"), CheckpointRef("r", "", "")):
        for change in (client.delete, client.publish, client.archive):
            with pytest.raises(errors.NotFound):
                change(ref)
    assert server.journal.count() == 0


# --- archives and external weights ---------------------------------------------------------------


def test_an_archive_is_a_redirect_that_is_not_followed(server, client, refs):
    signed = client.archive(refs["training"])
    assert signed.url.startswith(server.store_url)
    assert server.journal.count("store") == 0
    assert 800 < signed.expires_at_s - SYSTEM_CLOCK.now() <= 900


def test_an_archive_in_an_object(server, client, refs):
    server.behaviour.archive_answer = "json"
    signed = client.archive(refs["training"])
    assert signed.url.startswith(server.store_url)


def answers(bytes_of, client_of, *scripts, clock=None):
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
def test_when_a_redirect_expires(bytes_of, client_of, headers, lifetime_s):
    time = FakeTime()
    script = http(302, b"", "Location: https://store/x?sig=1", *headers)
    _, client = answers(bytes_of, client_of, script, clock=time.clock)
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
def test_a_relative_place(bytes_of, client_of, script, url):
    server, client = answers(bytes_of, client_of, script)
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
def test_what_is_no_place(bytes_of, client_of, script):
    server, client = answers(bytes_of, client_of, script)
    with pytest.raises(errors.ProtocolError) as caught:
        client.archive(REF)
    assert "sig" not in str(caught.value)
    assert len(server.received) == 1


@pytest.mark.parametrize("status", [425, 503])
def test_an_archive_that_is_being_built_is_not_waited_for_here(server, client, refs, status):
    server.faults.add(ARCHIVE, status=status, headers={"Retry-After": "2.5"})
    with pytest.raises(errors.ResourceNotReady) as caught:
        client.archive(refs["training"])
    assert caught.value.retry_after_s == 2.5
    assert server.journal.count(ARCHIVE) == 1


def test_external_weights(client, refs):
    urls, expires_at_s = client.external_weights_urls(refs["external"])
    assert "adapter_config.json" in urls
    assert all(url.startswith("http://") for url in urls.values())
    assert expires_at_s > 0


@pytest.mark.parametrize(
    "body",
    [b"{}", b'{"urls": []}', b'{"urls": {"a": null}}', b'{"urls": {"a": "file:///x?sig=1"}}'],
)
def test_external_weights_are_whole_or_fail(bytes_of, client_of, body):
    _, client = answers(bytes_of, client_of, http(200, body))
    with pytest.raises(errors.ProtocolError):
        client.external_weights_urls(REF)


#: Whatever is asked: of each endpoint that is not a change.
QUESTIONS = {
    "GET training_runs": lambda client: client.list_training_runs(),
    "GET training_runs/{run}": lambda client: client.training_run("r"),
    "GET training_runs/{run}/checkpoints": lambda client: client.list_checkpoints("r"),
    "GET checkpoints": lambda client: client.list_user_checkpoints(),
    "POST weights_info": lambda client: client.weights_info("tinker://r/weights/1"),
    "GET external_weights_urls": lambda client: client.external_weights_urls(REF),
    "GET sessions": lambda client: client.list_sessions(),
    "GET sessions/{session}": lambda client: client.session("s"),
    "POST sessions/search": lambda client: client.search_sessions(),
    "GET samplers/{sampler}": lambda client: client.sampler("s"),
    "GET get_server_capabilities": lambda client: client.capabilities(),
    "GET healthz": lambda client: client.health(),
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
@pytest.mark.parametrize("question", QUESTIONS)
def test_portal_in_place_of_an_answer_is_not_believed(bytes_of, client_of, question, portal):
    server, client = answers(bytes_of, client_of, PORTALS[portal])
    with pytest.raises(errors.ProtocolError):
        QUESTIONS[question](client)
    assert len(server.received) == 1


@pytest.mark.parametrize("portal", [each for each in PORTALS if each != "redirect"])
def test_portal_in_place_of_an_archive_is_not_believed(bytes_of, client_of, portal):
    server, client = answers(bytes_of, client_of, PORTALS[portal])
    with pytest.raises(errors.ProtocolError):
        client.archive(REF)
    assert len(server.received) == 1


# --- servers that differ -------------------------------------------------------------------------


@pytest.mark.parametrize("status", [404, 405, 410, 501])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_dropped_endpoint_is_not_a_gone_checkpoint(server, client, status, is_known):
    server.faults.add(ARCHIVE, status=status, body={"detail": "Not Found"})
    ref = CheckpointRef("r", "weights/1", "weights/1", is_known)
    is_missing = is_known or status in (405, 501)
    with pytest.raises(errors.UnsupportedEndpoint if is_missing else errors.NotFound):
        client.archive(ref)


def test_official_after_the_archive_was_dropped(demo_server, client_of):
    server = demo_server(profile="official-0.36")
    client = client_of(server)
    run_id = first_run(server)
    ref = ref_of(run_id, client.list_checkpoints(run_id)[0])
    with pytest.raises(errors.UnsupportedEndpoint):
        client.archive(ref)
    client.delete(ref)
    with pytest.raises(errors.NotFound):
        client.delete(ref)


def test_skyrl(demo_server, client_of):
    server = demo_server(profile="skyrl", runs=120)
    client = client_of(server)
    assert len(client.all_training_runs()) == 120
    for look in (client.all_user_checkpoints, client.all_sessions, client.whoami):
        with pytest.raises(errors.UnsupportedEndpoint):
            look()
    run_id = first_run(server)
    by_type = {}
    for checkpoint in client.list_checkpoints(run_id):
        by_type.setdefault(checkpoint.checkpoint_type, ref_of(run_id, checkpoint))
    sampler = by_type["sampler"]
    assert sampler.listed_id != sampler.path_id
    # The first time both forms are tried, then only the one that it takes.
    for count in (2, 3):
        assert client.archive(sampler).url.startswith(server.base_url)
        assert server.journal.count(ARCHIVE) == count
    for change in (client.publish, lambda ref: client.set_ttl(ref, 3600)):
        with pytest.raises(errors.UnsupportedEndpoint):
            change(sampler)
    with pytest.raises(errors.BadRequest):  # of its deletion, whose route takes any path
        client.unpublish(sampler)
    assert sampler.path_id in {c.id for c in server.account.run(run_id).checkpoints}
    # Deleting takes the other form.
    client.delete(sampler)
    assert server.journal.count(DELETE) == 1


def test_a_bare_id_of_two_checkpoints_reads_and_deletes_neither_for_the_other(
    demo_server, client_of
):
    server = demo_server(profile="skyrl")
    client = client_of(server)
    run_id = first_run(server)
    ids = [c.checkpoint_id for c in client.list_checkpoints(run_id)]
    shared = next(name for name in ids if ids.count(name) == 2)
    training, sampler = (
        CheckpointRef(run_id, f"{kind}/{shared}", shared, exists=True, has_ambiguous_id=True)
        for kind in ("weights", "sampler_weights")
    )
    client.archive(sampler)
    with pytest.raises(errors.UnsupportedEndpoint):
        client.archive(training)
    client.delete(training)
    with pytest.raises(errors.NotFound):
        client.delete(training)
    left = [c.tinker_path for c in client.list_checkpoints(run_id)]
    assert any(path.endswith(f"/sampler_weights/{shared}") for path in left)


def test_a_server_is_asked_rarely_for_what_it_lacks(demo_server, client_of):
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
            with pytest.raises(errors.UnsupportedEndpoint, match="listed all the same"):
                client.archive(ref)
    for checkpoint in checkpoints:
        if "sampler" in checkpoint.tinker_path:
            with pytest.raises(errors.BadRequest):
                client.weights_info(checkpoint.tinker_path, is_known=True)
        else:
            client.weights_info(checkpoint.tinker_path, is_known=True)
    # Of each kind three, in both forms of the id: the others are answered from memory.
    assert server.journal.count("POST publish") == server.journal.count("PUT ttl") == 12
    refused = [e for e in server.journal.entries("POST weights_info") if e.status == 400]
    assert len(refused) == 3
    archives = [entry.status for entry in server.journal.entries(ARCHIVE)]
    # Three in either form, and one form of the first sampler checkpoint.
    assert (archives.count(405), archives.count(404)) == (3 + 1, 3)
    client.reset()
    with pytest.raises(errors.UnsupportedEndpoint):
        client.publish(refs[0])
    assert server.journal.count("POST publish") == 14


def test_deleting_where_nothing_can_be_deleted(demo_server, client_of):
    profile = PROFILES["skyrl"]
    profile = dataclasses.replace(profile, missing=profile.missing | {DELETE})
    server = demo_server(profile=profile)
    client, run_id = client_of(server), first_run(server)
    with pytest.raises(errors.UnsupportedEndpoint):
        client.delete(ref_of(run_id, client.list_checkpoints(run_id)[0]))


def test_an_archive_of_what_is_gone_is_not_there(server, client):
    run_id = first_run(server)
    ref = ref_of(run_id, client.list_checkpoints(run_id)[0])
    server.account.delete_checkpoint(run_id, ref.path_id)
    with pytest.raises(errors.NotFound):
        client.archive(ref)


def test_hatchery(demo_server, client_of):
    server = demo_server(profile="hatchery")
    client = client_of(server)
    for look in (client.all_training_runs, client.all_user_checkpoints, client.all_sessions):
        with pytest.raises(errors.UnsupportedEndpoint):
            look()
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


def test_of_two_refusals_the_handlers_words_are_told(bytes_of, client_of):
    ref = CheckpointRef("r", "weights/1", "1", exists=True)
    router = http(404, b'{"detail":"Not Found"}')
    handler = http(404, b'{"detail":"Checkpoint 1 not found"}')
    for scripts in ((router, handler), (handler, router)):
        _, client = answers(bytes_of, client_of, *scripts)
        with pytest.raises(errors.NotFound, match="Checkpoint 1"):
            client.archive(ref)
    _, client = answers(bytes_of, client_of, router, http(503))
    with pytest.raises(errors.ResourceNotReady):
        client.archive(ref)
