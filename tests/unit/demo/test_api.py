import base64
import email.utils
import json
import time

import pytest

from tests.support.server import api_client


def jwt(expires_s):
    claims = base64.urlsafe_b64encode(json.dumps({"exp": expires_s}).encode()).decode()
    return f"eyJhbGciOiJub25lIn0.{claims.rstrip('=')}.c2ln"


@pytest.fixture
def run_id(server):
    return server.account.run_ids[0]


# Keys


def test_without_a_key_nothing_but_health_is_told(server, web):
    base = f"{server.base_url}/api/v1"
    for path in ("training_runs", "checkpoints", "sessions", "auth/apikey/me", "nothing"):
        answer = web.get(f"{base}/{path}")
        assert (answer.status_code, answer.json()) == (401, {"detail": "Missing API key"})
    assert web.get(f"{base}/healthz").json() == {"status": "ok"}


def test_keys_come_and_go(server, web):
    url = f"{server.base_url}/api/v1/auth/apikey/me"
    assert web.get(url, headers={"X-API-Key": server.api_key}).json()["name"] == "demo"
    assert web.get(url, headers={"Authorization": f"Bearer {server.api_key}"}).is_success
    assert web.get(url, headers={"X-API-Key": "tml-other"}).status_code == 401
    server.behaviour.api_keys = {"tml-other"}
    assert web.get(url, headers={"X-API-Key": "tml-other"}).is_success
    assert web.get(url, headers={"X-API-Key": server.api_key}).status_code == 401


def test_a_jwt_is_taken_until_it_expires(server, web):
    url = f"{server.base_url}/api/v1/training_runs"
    good, old = jwt(time.time() + 60), jwt(time.time() - 60)
    assert web.get(url, headers={"X-API-Key": good}).is_success
    assert web.get(url, headers={"X-API-Key": old}).status_code == 401
    assert web.get(url, headers={"X-API-Key": "eyJ"}).status_code == 401
    assert web.get(url, headers={"X-API-Key": "eyJ.e30.x"}).status_code == 401
    server.behaviour.accepts_jwt = False
    assert web.get(url, headers={"X-API-Key": good}).status_code == 401


# Listings


def test_pages_of_runs(demo_server):
    server = demo_server(runs=250, checkpoints=1)
    with api_client(server) as api:
        first = api.get("training_runs").json()
        assert first["cursor"] == {"offset": 0, "limit": 20, "total_count": 250}
        assert len(first["training_runs"]) == 20
        clamped = api.get("training_runs", params={"limit": 1000, "offset": 200}).json()
        assert clamped["cursor"] == {"offset": 200, "limit": 100, "total_count": 250}
        assert len(clamped["training_runs"]) == 50
        past = api.get("training_runs", params={"offset": 250}).json()
        assert past == {
            "training_runs": [],
            "cursor": {"offset": 250, "limit": 20, "total_count": 250},
        }
        found = []
        while page := api.get("training_runs", params={"offset": len(found), "limit": 77}).json()[
            "training_runs"
        ]:
            found += page
        assert [run["training_run_id"] for run in found] == server.account.run_ids
        times = [run["last_request_time"] for run in found]
        assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("query", [{"limit": "-1"}, {"offset": "x"}, {"limit": "1.5"}])
def test_what_is_no_number_is_refused(api, query):
    answer = api.get("training_runs", params=query)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["query", *query]


def test_unknown_parameters_are_ignored(api):
    query = {"access_scope": "accessible", "project_id": "p", "whatever": "1"}
    assert len(api.get("training_runs", params=query).json()["training_runs"]) == 10


def test_checkpoints_of_all_runs_newest_first(demo_server):
    server = demo_server(runs=30, checkpoints=7)
    with api_client(server) as api:
        found = []
        while True:
            page = api.get("checkpoints", params={"offset": len(found), "limit": 33}).json()
            assert page["cursor"]["total_count"] == 210
            if not page["checkpoints"]:
                break
            found += page["checkpoints"]
    assert len({c["tinker_path"] for c in found}) == 210
    times = [c["time"] for c in found]
    assert times == sorted(times, key=lambda text: text.removesuffix("Z"), reverse=True)
    assert {c["checkpoint_type"] for c in found} == {"training", "sampler", "external"}
    assert {c["public"] for c in found} == {True, False}
    assert any(c["expires_at"] for c in found)


def test_the_checkpoints_of_a_run(api, server, run_id):
    answer = api.get(f"training_runs/{run_id}/checkpoints").json()
    ids = [c["checkpoint_id"] for c in answer["checkpoints"]]
    assert ids == [c.id for c in server.account.run(run_id).checkpoints]
    assert ids[0] == "weights/0001"
    assert answer["checkpoints"][0]["tinker_path"] == f"tinker://{run_id}/weights/0001"
    assert api.get("training_runs/none/checkpoints").status_code == 404


def test_a_run(api, server, run_id):
    record = api.get(f"training_runs/{run_id}").json()
    run = server.account.run(run_id)
    assert record["base_model"] == run.base_model
    assert record["last_checkpoint"]["checkpoint_id"] == run.newest("weights").id
    assert record["last_sampler_checkpoint"]["checkpoint_id"] == run.newest("sampler_weights").id
    escaped = api.get(f"training_runs/{run_id.replace(':', '%3A')}")
    assert escaped.json() == record
    answer = api.get("training_runs/none")
    assert (answer.status_code, "none" in answer.json()["detail"]) == (404, True)


def test_runs_of_somebody_else(api, server, web):
    (foreign, _) = server.account.foreign_run_ids
    assert api.get(f"training_runs/{foreign}").json()["model_owner"] == "somebody-else"
    listed = api.get("training_runs", params={"limit": 100}).json()["training_runs"]
    assert foreign not in [run["training_run_id"] for run in listed]
    checkpoints = api.get(f"training_runs/{foreign}/checkpoints").json()["checkpoints"]
    assert checkpoints
    assert all(c["public"] for c in checkpoints)
    public = checkpoints[0]
    assert api.post("weights_info", json={"tinker_path": public["tinker_path"]}).is_success
    base = f"training_runs/{foreign}/checkpoints/{public['checkpoint_id']}"
    assert web.get(api.get(f"{base}/archive").headers["location"]).is_success
    assert api.delete(base).status_code == 404
    assert api.delete(f"{base}/publish").status_code == 404
    private = next(c for c in server.account.run(foreign).checkpoints if not c.is_public)
    base = f"training_runs/{foreign}/checkpoints/{private.id}"
    assert api.get(f"{base}/archive").status_code == 404


# Single records


def test_weights_info(api, server, run_id):
    run = server.account.run(run_id)
    for checkpoint in run.checkpoints:
        path = f"tinker://{run_id}/{checkpoint.id}"
        info = api.post("weights_info", json={"tinker_path": path}).json()
        assert (info["base_model"], info["lora_rank"]) == (run.base_model, run.lora_rank)


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"tinker_path": "tinker://none/weights/0001"}, 404),
        ({"tinker_path": "tinker://none/0001"}, 400),
        ({"tinker_path": "/weights/0001"}, 400),
        ({"tinker_path": "tinker://a/checkpoints/b"}, 400),
        ({}, 422),
        ([], 422),
    ],
)
def test_weights_info_of_bad_paths(api, body, status):
    assert api.post("weights_info", json=body).status_code == status


def test_sessions_and_samplers(api, server):
    ids = api.get("sessions", params={"limit": 3}).json()
    assert ids == {"sessions": server.account.session_ids()[:3]}
    session = api.get(f"sessions/{ids['sessions'][0]}").json()
    assert session["training_run_ids"] == server.account.run_ids[:2]
    first, *_, last = session["sampler_ids"]
    sampler = api.get(f"samplers/{first}").json()
    run_id, _, checkpoint_id = sampler["model_path"].removeprefix("tinker://").partition("/")
    assert server.account.checkpoint(run_id, checkpoint_id)
    assert api.get(f"samplers/{last}").json()["model_path"] is None
    for path in ("sessions/none", "samplers/none", "samplers/a:sample:0"):
        assert api.get(path).status_code == 404


def test_searching_sessions(api, server):
    found, cursor = [], None
    while True:
        page = api.post("sessions/search", json={"limit": 2, "cursor": cursor}).json()
        found += [session["session_id"] for session in page["sessions"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert found == server.account.session_ids()
    assert api.post("sessions/search", json={"limit": 201}).status_code == 422
    named = api.post("sessions/search", json={"display_name": "CHAT"}).json()["sessions"]
    assert named
    assert all("chat" in session["display_name"] for session in named)


def test_small_endpoints(api, server, web):
    assert api.post("client/config", json={"sdk_version": "1"}).json() == {}
    assert api.post("client/dynamic_config").json() == {}
    assert api.post("telemetry", json={"events": []}).json() == {"status": "accepted"}
    models = api.get("get_server_capabilities").json()["supported_models"]
    assert "Qwen/Qwen3-8B" in [model["model_name"] for model in models]
    session = server.account.session_ids()[0]
    trace = api.get(f"sessions/{session}/trace_export").json()
    assert trace["status"] == "ready"
    assert web.get(trace["url"]).is_success


def test_unknown_paths_and_methods(api, server, web):
    assert api.get("nothing").json() == {"detail": "Not Found"}
    answer = api.put("training_runs")
    assert (answer.status_code, answer.json()) == (405, {"detail": "Method Not Allowed"})
    key = {"X-API-Key": server.api_key}
    assert web.get(f"{server.base_url}/elsewhere", headers=key).status_code == 404


def test_a_base_url_with_a_path(demo_server, web):
    server = demo_server(prefix="/services/tinker-prod/")
    assert server.base_url.endswith("/services/tinker-prod")
    key = {"X-API-Key": server.api_key}
    assert web.get(f"{server.base_url}/api/v1/training_runs", headers=key).is_success
    root = server.base_url.removesuffix("/services/tinker-prod")
    assert web.get(f"{root}/api/v1/training_runs", headers=key).status_code == 404


# Changes


def test_publish_and_unpublish(api, server, run_id):
    checkpoint = server.account.checkpoint(run_id, "weights/0001")
    checkpoint.is_public = False
    url = f"training_runs/{run_id}/checkpoints/weights/0001/publish"
    assert api.delete(url).status_code == 409
    assert api.post(url).is_success
    assert checkpoint.is_public
    assert api.post(url, json={}).status_code == 409
    assert api.delete(url).is_success
    assert not checkpoint.is_public
    assert api.post(url.replace("0001", "none")).status_code == 404


@pytest.mark.parametrize(
    ("ttl_s", "status"),
    [
        (3600, 200),
        (315_360_000, 200),
        (None, 200),
        (3599, 400),
        (315_360_001, 400),
        (-1, 400),
        ("3600", 422),
        (1.5, 422),
        (True, 422),
    ],
)
def test_time_to_live(demo_server, ttl_s, status):
    server = demo_server(clock=lambda: 1_800_000_000.0)
    checkpoint = server.account.run(server.account.run_ids[0]).checkpoints[0]
    checkpoint.expires_at_s = 5.0
    with api_client(server) as api:
        url = f"training_runs/{server.account.run_ids[0]}/checkpoints/{checkpoint.id}/ttl"
        assert api.put(url, json={"ttl_seconds": ttl_s}).status_code == status
        assert api.put(url, json={}).status_code == 422
        assert api.put(url).status_code == 422
    expected = None if ttl_s is None else 1_800_000_000.0 + ttl_s if status == 200 else 5.0
    assert checkpoint.expires_at_s == expected


def test_delete(api, server, run_id):
    url = f"training_runs/{run_id}/checkpoints"
    before = server.account.checkpoint_count
    assert api.delete(f"{url}/weights/0001").is_success
    assert api.delete(f"{url}/weights/0001").status_code == 404
    assert api.delete(f"{url}/0001").status_code == 400
    assert api.delete("training_runs/none/checkpoints/weights/0001").status_code == 404
    listed = api.get(url).json()["checkpoints"]
    assert "weights/0001" not in [c["checkpoint_id"] for c in listed]
    assert server.account.checkpoint_count == before - 1
    assert api.get("checkpoints").json()["cursor"]["total_count"] == before - 1


def test_nothing_is_deleted_while_it_is_written(api, server, run_id):
    server.account.checkpoint(run_id, "weights/0001").is_pending = True
    assert api.delete(f"training_runs/{run_id}/checkpoints/weights/0001").status_code == 425
    assert api.get(f"training_runs/{run_id}/checkpoints/weights/0001/archive").status_code == 425


# Archives


def test_an_archive_by_redirect(api, server, run_id):
    answer = api.get(f"training_runs/{run_id}/checkpoints/weights/0001/archive")
    assert answer.status_code == 302
    assert answer.headers["location"].startswith(f"{server.store_url}/")
    expires = email.utils.parsedate_to_datetime(answer.headers["expires"]).timestamp()
    assert 890 < expires - time.time() <= 900
    server.behaviour.tells_expiry = False
    answer = api.get(f"training_runs/{run_id}/checkpoints/weights/0001/archive")
    assert "expires" not in answer.headers


def test_an_archive_in_json(api, server, run_id, web):
    server.behaviour.archive_answer = "json"
    answer = api.get(f"training_runs/{run_id}/checkpoints/weights/0001/archive")
    assert answer.status_code == 200
    assert answer.json()["expires"].endswith("Z")
    assert web.get(answer.json()["url"]).is_success


def test_no_two_signed_urls_are_alike(api, run_id):
    url = f"training_runs/{run_id}/checkpoints/weights/0001/archive"
    assert len({api.get(url).headers["location"] for _ in range(5)}) == 5


def test_an_archive_is_built_for_so_many_polls(demo_server):
    server = demo_server(building_polls=2, retry_after="0")
    with api_client(server) as api:
        url = f"training_runs/{server.account.run_ids[0]}/checkpoints/weights/0001/archive"
        answers = [api.get(url) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [503, 503, 302, 302]
    assert answers[0].headers["retry-after"] == "0"
    assert answers[0].json() == {"detail": "Archive is being created"}


def test_an_archive_is_built_until_released(api, server, run_id):
    server.behaviour.building_status, server.behaviour.retry_after = 425, None
    checkpoint = server.account.checkpoint(run_id, "weights/0001")
    checkpoint.building_polls = None
    url = f"training_runs/{run_id}/checkpoints/weights/0001/archive"
    answers = [api.get(url) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [425, 425, 425]
    assert "retry-after" not in answers[0].headers
    checkpoint.building_polls = 0
    assert api.get(url).status_code == 302


def test_archives_that_are_not(api, run_id):
    url = f"training_runs/{run_id}/checkpoints"
    assert api.get(f"{url}/weights/none/archive").status_code == 404
    assert api.get(f"{url}/0001/archive").status_code == 400
    assert api.get(f"{url}/external_weights/export/archive").status_code == 404


def test_external_weights(api, server, run_id, web):
    url = f"training_runs/{run_id}/checkpoints/external_weights/export/external_weights_urls"
    answer = api.get(url).json()
    files = server.files(run_id, "external_weights/export")
    assert list(answer["urls"]) == list(files)
    for name, file_url in answer["urls"].items():
        assert web.get(file_url).content == files[name].read(0, files[name].size_bytes)
    checkpoint = server.account.checkpoint(run_id, "external_weights/export")
    assert sum(content.size_bytes for content in files.values()) == checkpoint.size_bytes
    assert api.get(url.replace("external_weights/export", "weights/0001")).status_code == 400
    assert api.get(url.replace("export", "none")).status_code == 404
