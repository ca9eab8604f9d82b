import threading

import pytest

from tinkerfs import errors
from tinkerfs.api import exports
from tinkerfs.api.exports import Export, ExportRequest, ExportStopped
from tinkerfs.clock import SYSTEM_CLOCK
from tinkerfs.demo.exports import ExportOptions
from tinkerfs.retry import Backoff


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch):
    monkeypatch.setattr(exports, "POLL", Backoff(0.01, 0.05))
    monkeypatch.setattr(exports, "HEARTBEAT_S", 0.05)


@pytest.fixture
def server(demo_server):
    return demo_server(profile="official-0.36", exports=ExportOptions())


@pytest.fixture
def source(server):
    run_id = server.account.run_ids[0]
    server.account.add_checkpoint(run_id, "weights/step-1")
    return f"tinker://{run_id}/weights/step-1"


class Observed:
    def __init__(self):
        self.sessions, self.states = [], []


@pytest.fixture
def observed():
    return Observed()


@pytest.fixture
def make_export(client, source, observed):
    def make(timeout_s=30.0, **changes):
        fields = {"source": source, "name": "x", "ttl_s": 3600} | changes
        return new_export(client, observed, timeout_s, **fields)

    return make


def new_export(client, observed, timeout_s, **fields):
    return Export(
        client,
        ExportRequest(**fields),
        SYSTEM_CLOCK,
        timeout_s=timeout_s,
        on_session=observed.sessions.append,
        on_progress=lambda progress: observed.states.append(str(progress)),
    )


def status_of(server, session_id):
    return server.account.session(session_id).status


def test_export_returns_the_path_of_external_weights(server, source, make_export, observed):
    path = make_export().run()
    (session_id,) = observed.sessions
    assert path == f"tinker://{session_id}:train:0/external_weights/x"
    expected = server.files(source.split("/")[2], "weights/step-1")
    found = server.files(f"{session_id}:train:0", "external_weights/x")
    assert {name: content.size_bytes for name, content in found.items()} == {
        name: content.size_bytes for name, content in expected.items()
    }
    assert status_of(server, session_id)["reason"] == {"type": "success"}
    for endpoint in ("create_session", "load_weights", "save_weights_external", "finish"):
        assert server.journal.count(f"POST {endpoint}") == 1, endpoint
    assert server.journal.count("POST retrieve_future") == 2


@pytest.mark.parametrize("status", [200, 408])
def test_poll_reports_the_queue_until_the_result(server, make_export, observed, status):
    options = server.behaviour.exports
    options.load_s = options.save_s = 0.3
    options.queue_state, options.queue_state_reason = "paused_capacity", "busy"
    options.try_again_status = status
    make_export().run()
    assert observed.states[0] == "loading weights"
    assert "loading weights, waiting for capacity: busy" in observed.states
    assert "saving weights, waiting for capacity: busy" in observed.states
    assert server.journal.count("POST session_heartbeat") >= 2


def test_export_without_capacity_times_out(server, make_export, observed):
    options = server.behaviour.exports
    options.load_s, options.queue_state = 3600, "paused_capacity"
    with pytest.raises(errors.RequestTimeout, match=r"within 0\.2 s.*waiting for capacity"):
        make_export(timeout_s=0.2).run()
    assert status_of(server, observed.sessions[0])["reason"] == {"type": "errored"}


@pytest.mark.parametrize(
    ("category", "kind"),
    [("user", errors.BadRequest), ("server", errors.ServerError), ("other", errors.ServerError)],
)
def test_failed_export_has_the_words_of_the_server(server, make_export, observed, category, kind):
    server.behaviour.exports.failure = ("out of memory", category)
    with pytest.raises(kind, match="out of memory"):
        make_export().run()
    assert status_of(server, observed.sessions[0])["reason"] == {"type": "errored"}
    assert status_of(server, observed.sessions[0])["detail"] == "out of memory"


def test_retired_base_model_is_a_bad_request(server, source, make_export):
    model = server.account.run(source.split("/")[2]).base_model
    server.behaviour.exports.retired_models = frozenset({model})
    with pytest.raises(errors.BadRequest, match="was retired"):
        make_export().run()


def test_lost_future_is_requested_again(server, make_export, observed):
    server.faults.add("POST retrieve_future", status=410, times=1)
    make_export().run()
    assert server.journal.count("POST load_weights") == 2
    assert len(observed.sessions) == 1


def test_repeated_save_finds_its_own_result(server, make_export, observed):
    def save_and_lose():
        run_id = f"{observed.sessions[0]}:train:0"
        server.account.add_checkpoint(run_id, "external_weights/x")

    server.faults.add("POST save_weights_external", call=save_and_lose, times=1)
    assert make_export().run().endswith("/external_weights/x")
    assert server.journal.count("POST retrieve_future") == 2


def test_future_that_stays_lost_is_an_error(server, make_export):
    server.faults.add("POST retrieve_future", status=410, times=None)
    with pytest.raises(errors.NotFound):
        make_export().run()
    assert server.journal.count("POST load_weights") == exports.MAX_LOST_FUTURES + 1


def test_outage_during_an_export_is_waited_for(server, make_export, observed):
    options = server.behaviour.exports
    options.load_s = 0.5
    threading.Timer(0.1, server.stop_listening, ["api"]).start()
    threading.Timer(0.9, server.resume_listening).start()
    assert make_export().run()


@pytest.mark.parametrize("endpoint", ["create_session", "load_weights", "save_weights_external"])
def test_export_fails_with_billing_at_each_step(server, make_export, observed, endpoint):
    server.faults.add(f"POST {endpoint}", status=402, body={"detail": "no credit"}, times=None)
    with pytest.raises(errors.PaymentRequired, match="no credit"):
        make_export().run()
    assert server.journal.count("POST finish") == len(observed.sessions)


def test_cancelled_session_fails_the_export(server, make_export):
    options = server.behaviour.exports
    options.load_s, options.heartbeat_timeout_s = 3600, -1.0
    with pytest.raises(errors.ApiError, match="session"):
        make_export().run()


def test_stopped_export_finishes_the_session_as_interrupted(server, make_export, observed):
    server.behaviour.exports.load_s = 3600
    export = make_export()
    threading.Timer(0.2, export.stop).start()
    with pytest.raises(ExportStopped):
        export.run()
    assert status_of(server, observed.sessions[0])["reason"] == {"type": "interrupted"}


def test_failed_finish_does_not_fail_the_export(server, make_export):
    server.faults.add("POST finish", status=404, times=None)
    assert make_export().run()


@pytest.mark.parametrize(
    ("endpoint", "after", "body"),
    [
        ("create_session", 0, {}),
        ("load_weights", 0, {"request_id": 5}),
        ("retrieve_future", 0, []),
        ("retrieve_future", 0, {"status": "done"}),
        ("retrieve_future", 1, {"type": "save_weights_external", "path": "/etc/passwd"}),
    ],
)
def test_invalid_response_is_a_protocol_error(server, make_export, endpoint, after, body):
    server.faults.add(f"POST {endpoint}", status=200, body=body, after=after, times=None)
    with pytest.raises(errors.ProtocolError):
        make_export().run()


def test_server_without_exports_has_no_endpoint(demo_server, client_of, observed):
    client = client_of(demo_server(profile="skyrl"))
    export = new_export(client, observed, 5.0, source="tinker://a/weights/b", name="x", ttl_s=3600)
    with pytest.raises(errors.UnsupportedEndpoint):
        export.run()
    assert observed.sessions == []
