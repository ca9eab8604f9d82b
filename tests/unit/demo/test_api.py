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


def test_request_without_a_key_fails_except_for_health(server, web):
    base = f"{server.base_url}/api/v1"
    for path in ("training_runs", "checkpoints", "sessions", "auth/apikey/me", "nothing"):
        response = web.get(f"{base}/{path}")
        assert (response.status_code, response.json()) == (401, {"detail": "Missing API key"})
    assert web.get(f"{base}/healthz").json() == {"status": "ok"}


def test_api_keys_can_be_added_and_removed(server, web):
    url = f"{server.base_url}/api/v1/auth/apikey/me"
    assert web.get(url, headers={"X-API-Key": server.api_key}).json()["name"] == "demo"
    assert web.get(url, headers={"Authorization": f"Bearer {server.api_key}"}).is_success
    assert web.get(url, headers={"X-API-Key": "tml-other"}).status_code == 401
    server.behaviour.api_keys = {"tml-other"}
    assert web.get(url, headers={"X-API-Key": "tml-other"}).is_success
    assert web.get(url, headers={"X-API-Key": server.api_key}).status_code == 401


def test_jwt_is_valid_until_it_expires(server, web):
    url = f"{server.base_url}/api/v1/training_runs"
    good, old = jwt(time.time() + 60), jwt(time.time() - 60)
    assert web.get(url, headers={"X-API-Key": good}).is_success
    assert web.get(url, headers={"X-API-Key": old}).status_code == 401
    assert web.get(url, headers={"X-API-Key": "eyJ"}).status_code == 401
    assert web.get(url, headers={"X-API-Key": "eyJ.e30.x"}).status_code == 401
    server.behaviour.accepts_jwt = False
    assert web.get(url, headers={"X-API-Key": good}).status_code == 401


# Listings


def test_list_runs_returns_pages(demo_server):
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
def test_malformed_number_is_rejected(api, query):
    response = api.get("training_runs", params=query)
    assert response.status_code == 422
    assert response.json()["detail"][0]["loc"] == ["query", *query]


def test_unknown_parameters_are_ignored(api):
    query = {"access_scope": "owned", "project_id": "p", "whatever": "1"}
    assert len(api.get("training_runs", params=query).json()["training_runs"]) == 10


@pytest.mark.parametrize("limit", [1, 5, 7, 100])
def test_accessible_runs_include_those_of_others(api, server, limit):
    found, total = [], 12
    for offset in range(0, total, limit):
        query = {"access_scope": "accessible", "limit": limit, "offset": offset}
        page = api.get("training_runs", params=query).json()
        assert page["cursor"]["total_count"] == total
        found += [run["training_run_id"] for run in page["training_runs"]]
    assert found == server.account.run_ids + server.account.foreign_run_ids


def test_list_checkpoints_of_all_runs_is_newest_first(demo_server):
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


def test_list_run_checkpoints_returns_every_checkpoint(api, server, run_id):
    response = api.get(f"training_runs/{run_id}/checkpoints").json()
    ids = [c["checkpoint_id"] for c in response["checkpoints"]]
    assert ids == [c.id for c in server.account.run(run_id).checkpoints]
    assert ids[0] == "weights/0001"
    assert response["checkpoints"][0]["tinker_path"] == f"tinker://{run_id}/weights/0001"
    assert api.get("training_runs/none/checkpoints").status_code == 404


def test_get_run_returns_its_record(api, server, run_id):
    record = api.get(f"training_runs/{run_id}").json()
    run = server.account.run(run_id)
    assert record["base_model"] == run.base_model
    assert record["last_checkpoint"]["checkpoint_id"] == run.newest("weights").id
    assert record["last_sampler_checkpoint"]["checkpoint_id"] == run.newest("sampler_weights").id
    escaped = api.get(f"training_runs/{run_id.replace(':', '%3A')}")
    assert escaped.json() == record
    response = api.get("training_runs/none")
    assert (response.status_code, "none" in response.json()["detail"]) == (404, True)


def test_foreign_runs_are_found_by_id_only(api, server, web):
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


def test_weights_info_returns_base_model_and_rank(api, server, run_id):
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
def test_weights_info_of_a_bad_path_fails(api, body, status):
    assert api.post("weights_info", json=body).status_code == status


def test_sessions_and_samplers_are_linked(api, server):
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


def test_search_sessions_filters_and_pages(api, server):
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


def test_other_endpoints_respond(api, server, web):
    assert api.post("client/config", json={"sdk_version": "1"}).json() == {
        "pjwt_auth_enabled": False
    }
    assert api.post("client/dynamic_config").json() == {}
    assert api.post("telemetry", json={"events": []}).json() == {"status": "accepted"}
    storage = api.get("billing/usage/checkpoints/current").json()
    assert storage["data"][0]["checkpoint_count"] == server.account.checkpoint_count
    models = api.get("get_server_capabilities").json()["supported_models"]
    assert "Qwen/Qwen3-8B" in [model["model_name"] for model in models]
    session = server.account.session_ids()[0]
    trace = api.get(f"sessions/{session}/trace_export").json()
    assert trace["status"] == "ready"
    assert web.get(trace["url"]).is_success


def test_unknown_paths_and_methods_fail(api, server, web):
    assert api.get("nothing").json() == {"detail": "Not Found"}
    response = api.put("training_runs")
    assert (response.status_code, response.json()) == (405, {"detail": "Method Not Allowed"})
    key = {"X-API-Key": server.api_key}
    assert web.get(f"{server.base_url}/elsewhere", headers=key).status_code == 404


def test_base_url_with_a_path_is_supported(demo_server, web):
    server = demo_server(prefix="/services/tinker-prod/")
    assert server.base_url.endswith("/services/tinker-prod")
    key = {"X-API-Key": server.api_key}
    assert web.get(f"{server.base_url}/api/v1/training_runs", headers=key).is_success
    root = server.base_url.removesuffix("/services/tinker-prod")
    assert web.get(f"{root}/api/v1/training_runs", headers=key).status_code == 404


# Mutations


def test_publish_and_unpublish_change_visibility(api, server, run_id):
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
def test_set_ttl_sets_the_expiry_within_its_range(demo_server, ttl_s, status):
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


def test_delete_removes_a_checkpoint(api, server, run_id):
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


def test_delete_of_a_pending_checkpoint_fails(api, server, run_id):
    server.account.checkpoint(run_id, "weights/0001").is_pending = True
    assert api.delete(f"training_runs/{run_id}/checkpoints/weights/0001").status_code == 425
    assert api.get(f"training_runs/{run_id}/checkpoints/weights/0001/archive").status_code == 425


# Archives


def test_archive_is_sent_as_a_redirect(api, server, run_id):
    response = api.get(f"training_runs/{run_id}/checkpoints/weights/0001/archive")
    assert response.status_code == 302
    assert response.headers["location"].startswith(f"{server.store_url}/")
    expires = email.utils.parsedate_to_datetime(response.headers["expires"]).timestamp()
    assert 890 < expires - time.time() <= 900
    server.behaviour.sends_expiry = False
    response = api.get(f"training_runs/{run_id}/checkpoints/weights/0001/archive")
    assert "expires" not in response.headers


def test_archive_is_sent_as_json(api, server, run_id, web):
    server.behaviour.archive_response = "json"
    response = api.get(f"training_runs/{run_id}/checkpoints/weights/0001/archive")
    assert response.status_code == 200
    assert response.json()["expires"].endswith("Z")
    assert web.get(response.json()["url"]).is_success


def test_signed_urls_are_unique(api, run_id):
    url = f"training_runs/{run_id}/checkpoints/weights/0001/archive"
    assert len({api.get(url).headers["location"] for _ in range(5)}) == 5


def test_archive_is_built_for_the_configured_polls(demo_server):
    server = demo_server(building_polls=2, retry_after="0")
    with api_client(server) as api:
        url = f"training_runs/{server.account.run_ids[0]}/checkpoints/weights/0001/archive"
        responses = [api.get(url) for _ in range(4)]
    assert [response.status_code for response in responses] == [503, 503, 302, 302]
    assert responses[0].headers["retry-after"] == "0"
    assert responses[0].json() == {"detail": "Archive is being created"}


def test_archive_without_poll_limit_is_built_until_changed(api, server, run_id):
    server.behaviour.building_status, server.behaviour.retry_after = 425, None
    checkpoint = server.account.checkpoint(run_id, "weights/0001")
    checkpoint.building_polls = None
    url = f"training_runs/{run_id}/checkpoints/weights/0001/archive"
    responses = [api.get(url) for _ in range(3)]
    assert [response.status_code for response in responses] == [425, 425, 425]
    assert "retry-after" not in responses[0].headers
    checkpoint.building_polls = 0
    assert api.get(url).status_code == 302


def test_archive_of_an_absent_checkpoint_fails(api, run_id):
    url = f"training_runs/{run_id}/checkpoints"
    assert api.get(f"{url}/weights/none/archive").status_code == 404
    assert api.get(f"{url}/0001/archive").status_code == 400
    assert api.get(f"{url}/external_weights/export/archive").status_code == 404


def test_external_weights_urls_serve_the_files(api, server, run_id, web):
    url = f"training_runs/{run_id}/checkpoints/external_weights/export/external_weights_urls"
    response = api.get(url).json()
    files = server.files(run_id, "external_weights/export")
    assert list(response["urls"]) == list(files)
    for name, file_url in response["urls"].items():
        assert web.get(file_url).content == files[name].read(0, files[name].size_bytes)
    checkpoint = server.account.checkpoint(run_id, "external_weights/export")
    assert sum(content.size_bytes for content in files.values()) == checkpoint.size_bytes
    assert api.get(url.replace("external_weights/export", "weights/0001")).status_code == 400
    assert api.get(url.replace("export", "none")).status_code == 404


def fields_of(data):
    """Return the fields of a protocol buffer, with the content of those that are messages."""
    found, offset = {}, 0

    def number():
        nonlocal offset
        value, shift = 0, 0
        while True:
            byte = data[offset]
            offset, value, shift = offset + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while offset < len(data):
        key = number()
        value = number()
        if key & 7:
            value, offset = data[offset : offset + value], offset + value
        found.setdefault(key >> 3, []).append(value)
    return found


def test_trace_is_pending_then_ready_or_failed(api, server, web):
    session = server.account.session(server.account.session_ids()[0])
    session.trace_polls = 1
    path = f"sessions/{session.id}/trace_export"
    pending = api.get(path)
    assert pending.json() == {"status": "pending", "url": None, "error": None}
    assert pending.headers["retry-after"] == "1"
    ready = api.get(path).json()
    assert ready["status"] == "ready"
    packets = fields_of(web.get(ready["url"]).content)[1]
    tracks = [fields_of(fields_of(packet)[60][0]) for packet in packets if 60 in fields_of(packet)]
    assert [track[2][0].decode().split()[0] for track in tracks[1:]] == session.run_ids
    events = [fields_of(fields_of(packet)[11][0]) for packet in packets if 11 in fields_of(packet)]
    assert {event[23][0] for event in events if 23 in event} == {b"forward_backward", b"optim_step"}
    assert len(events) == len(packets) - len(tracks)
    session.trace_error = "no events"
    assert api.get(path).json() == {"status": "failed", "url": None, "error": "no events"}
    assert api.get("sessions/none/trace_export").status_code == 404
