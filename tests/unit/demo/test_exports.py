import pyrage
import pytest

from tests.support.server import api_client
from tinkerfs.demo.exports import ExportOptions

SESSION = {"tags": [], "user_metadata": None, "sdk_version": "0.38.0", "type": "create_session"}


class Clock:
    def __init__(self):
        self.now_s = 1_800_000_000.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def encrypt(data, recipients):
    return pyrage.encrypt(data, [pyrage.x25519.Recipient.from_str(each) for each in recipients])


@pytest.fixture
def server(demo_server, clock):
    options = ExportOptions(load_s=20, save_s=10, encrypt=encrypt)
    return demo_server(profile="official-0.36", clock=clock, exports=options)


@pytest.fixture
def api(server):
    with api_client(server) as client:
        yield client


@pytest.fixture
def source(server):
    run_id = server.account.run_ids[0]
    server.account.add_checkpoint(run_id, "weights/step-1")
    return f"tinker://{run_id}/weights/step-1"


def post(api, path, /, **body):
    response = api.post(path, json=body)
    assert response.is_success, response.text
    return response.json()


def begin(api, source):
    session_id = api.post("create_session", json=SESSION).json()["session_id"]
    body = {"session_id": session_id, "model_seq_id": 0, "path": source, "optimizer": False}
    return session_id, post(api, "load_weights", **body)


def save(api, session_id, **more):
    body = {"model_id": f"{session_id}:train:0", "path": "download", "seq_id": 1, **more}
    return post(api, "save_weights_external", **body)


def poll(api, future):
    return post(api, "retrieve_future", request_id=future["request_id"], allow_metadata_only=False)


def test_export_saves_the_files_of_the_checkpoint(server, api, clock, source):
    session_id, load = begin(api, source)
    assert poll(api, load)["type"] == "try_again"
    clock.now_s += 20
    run_id = f"{session_id}:train:0"
    assert poll(api, load) == {"type": "load_weights", "path": source, "model_id": run_id}
    future = save(api, session_id, ttl_seconds=3600)
    assert poll(api, future)["queue_state"] == "active"
    clock.now_s += 10
    path = f"tinker://{run_id}/external_weights/download"
    assert poll(api, future) == {"type": "save_weights_external", "path": path}
    url = f"training_runs/{run_id}/checkpoints/external_weights/download/external_weights_urls"
    urls = api.get(url).json()["urls"]
    expected = server.files(source.split("/")[2], "weights/step-1")
    assert set(urls) == set(expected)
    for name, content in expected.items():
        assert api.get(urls[name]).content == content.read(0, content.size_bytes)
    assert run_id in server.account.run_ids
    assert server.account.session(session_id).run_ids == [run_id]


def test_export_is_deleted_when_it_expires(server, api, clock, source):
    session_id, load = begin(api, source)
    clock.now_s += 20
    poll(api, load)
    future = save(api, session_id, ttl_seconds=3600)
    clock.now_s += 10
    poll(api, future)
    url = f"training_runs/{session_id}:train:0/checkpoints"
    assert len(api.get(url).json()["checkpoints"]) == 1
    assert api.put(f"{url}/external_weights/download/ttl", json={"ttl_seconds": 7200}).is_success
    clock.now_s += 7199
    assert len(api.get(url).json()["checkpoints"]) == 1
    clock.now_s += 1
    assert api.get(url).json()["checkpoints"] == []


def test_export_repeats_the_future_of_a_repeated_request(api, clock, source):
    session_id, load = begin(api, source)
    body = {"session_id": session_id, "model_seq_id": 0, "path": source, "optimizer": False}
    assert post(api, "load_weights", **body) == load
    clock.now_s += 20
    poll(api, load)
    assert save(api, session_id) == save(api, session_id)


def test_export_fails_for_a_retired_model(server, api, clock, source):
    model = server.account.run(source.split("/")[2]).base_model
    server.behaviour.exports.retired_models = frozenset({model})
    _session, load = begin(api, source)
    clock.now_s += 20
    assert poll(api, load) == {"error": f"Base model {model} was retired", "category": "user"}


def test_poll_reports_the_queue_state_with_status_408(server, api, source):
    options = server.behaviour.exports
    options.queue_state, options.queue_state_reason = "paused_capacity", "no capacity"
    options.try_again_status = 408
    _session, load = begin(api, source)
    response = api.post("retrieve_future", json={"request_id": load["request_id"]})
    assert response.status_code == 408
    assert response.json()["queue_state"] == "paused_capacity"
    assert response.json()["queue_state_reason"] == "no capacity"


def test_lost_future_is_gone_until_the_request_is_repeated(server, api, clock, source):
    session_id, load = begin(api, source)
    server.exports.forget_futures()
    request = {"request_id": load["request_id"]}
    assert api.post("retrieve_future", json=request).status_code == 410
    body = {"session_id": session_id, "model_seq_id": 0, "path": source, "optimizer": False}
    load = post(api, "load_weights", **body)
    clock.now_s += 20
    assert poll(api, load)["type"] == "load_weights"


def test_save_finishes_without_polls_before_its_session_is_lost(server, api, clock, source):
    session_id, load = begin(api, source)
    clock.now_s += 20
    poll(api, load)
    future = save(api, session_id, ttl_seconds=3600)
    clock.now_s += 1810
    (saved,) = api.get(f"training_runs/{session_id}:train:0/checkpoints").json()["checkpoints"]
    assert saved["checkpoint_id"] == "external_weights/download"
    assert server.account.session(session_id).status["type"] == "cancelled"
    assert poll(api, future)["type"] == "save_weights_external"
    clock.now_s += 1800
    assert api.get(f"training_runs/{session_id}:train:0/checkpoints").json()["checkpoints"] == []


def test_session_without_heartbeat_is_cancelled(server, api, clock, source):
    server.behaviour.exports.load_s = 600
    session_id, load = begin(api, source)
    clock.now_s += 100
    assert api.post("session_heartbeat", json={"session_id": session_id}).is_success
    clock.now_s += 121
    assert api.post("session_heartbeat", json={"session_id": session_id}).status_code == 410
    assert poll(api, load) == {"error": "The session has ended", "category": "user"}
    assert server.account.session(session_id).status["type"] == "cancelled"


def test_finish_keeps_the_first_reason(server, api, source):
    session_id, _load = begin(api, source)
    for reason in ("interrupted", "success"):
        body = {"reason": {"type": reason}, "detail": None}
        assert api.post(f"sessions/{session_id}/finish", json=body).is_success
    assert server.account.session(session_id).status["reason"] == {"type": "interrupted"}
    body = {"session_id": session_id, "model_seq_id": 1, "path": source}
    assert api.post("load_weights", json=body).status_code == 410
    assert api.post("sessions/x/finish", json=body | {"reason": {"type": "success"}}).is_error


def test_load_rejects_other_kinds_and_save_a_wrong_duration(server, api, source):
    run_id = source.split("/")[2]
    server.account.add_checkpoint(run_id, "sampler_weights/s")
    session_id, _load = begin(api, source)
    body = {"session_id": session_id, "model_seq_id": 1}
    path = f"tinker://{run_id}/sampler_weights/s"
    assert api.post("load_weights", json=body | {"path": path}).status_code == 400
    assert api.post("load_weights", json=body | {"path": f"{path}x"}).status_code == 404
    body = {"model_id": f"{session_id}:train:0", "path": "x", "seq_id": 1}
    response = api.post("save_weights_external", json=body | {"ttl_seconds": 60})
    assert response.status_code == 400
    assert api.post("save_weights_external", json=body).status_code == 404, "not loaded"


def test_save_encrypts_for_age_recipients(server, api, clock, source):
    identity = pyrage.x25519.Identity.generate()
    session_id, load = begin(api, source)
    clock.now_s += 20
    poll(api, load)
    future = save(api, session_id, age_encryption_recipients=[str(identity.to_public())])
    clock.now_s += 10
    poll(api, future)
    files = server.files(f"{session_id}:train:0", "external_weights/download")
    expected = server.files(source.split("/")[2], "weights/step-1")
    assert set(files) == {f"{name}.age" for name in expected}
    for name, content in expected.items():
        data = files[f"{name}.age"].read(0, files[f"{name}.age"].size_bytes)
        assert pyrage.decrypt(data, [identity]) == content.read(0, content.size_bytes)
