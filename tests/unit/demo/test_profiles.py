import io
import tarfile
from dataclasses import replace

import pytest

from tests.support.server import api_client
from tinkerfs.demo.api import _ROUTES
from tinkerfs.demo.profiles import PROFILES

NOT_FOUND = {"detail": "Not Found"}


@pytest.fixture
def at(demo_server):
    """Start a server of a profile; return it, a client of it, and the path of its first run."""
    clients = []

    def start(profile, **options):
        server = demo_server(profile=profile, **options)
        clients.append(api_client(server))
        return server, clients[-1].__enter__(), f"training_runs/{server.account.run_ids[0]}"

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def test_profiles_refer_to_existing_endpoints():
    names = {name for _, _, name in _ROUTES}
    for profile in PROFILES.values():
        assert profile.missing <= names, profile.name


def test_official_036_has_no_archives(at):
    _, api, run = at("official-0.36")
    response = api.get(f"{run}/checkpoints/weights/0001/archive")
    assert (response.status_code, response.json()) == (404, NOT_FOUND)
    missing = api.get(f"{run}/checkpoints/weights/none/archive").json()
    assert missing == NOT_FOUND
    urls = api.get(f"{run}/checkpoints/external_weights/export/external_weights_urls")
    assert urls.json()["urls"]
    assert api.post(f"{run}/checkpoints/sampler_weights/0001/publish").is_success


def test_skyrl_records_have_its_dialect(at):
    _, api, run = at("skyrl")
    record = api.get(run).json()
    assert (record["last_checkpoint"], record["last_sampler_checkpoint"]) == (None, None)
    assert not record["last_request_time"].endswith("Z")
    assert record["model_owner"] == "default"
    checkpoints = api.get(f"{run}/checkpoints").json()["checkpoints"]
    assert [c["checkpoint_id"] for c in checkpoints] == ["0001", "0001", "0002", "final", "final"]
    first = checkpoints[0]
    assert set(first) == {"checkpoint_id", "checkpoint_type", "time", "tinker_path"}
    assert "/weights/0001" in first["tinker_path"]


def test_skyrl_requires_no_key_and_lacks_endpoints(at, web):
    server, api, run = at("skyrl")
    assert web.get(f"{server.base_url}/api/v1/training_runs").is_success
    for path in ("checkpoints", "sessions", "sessions/x"):
        response = api.get(path)
        assert (response.status_code, response.json()) == (404, NOT_FOUND), path
    # Its delete route matches any path below a run's checkpoints.
    for method, path, status in (
        ("POST", "weights/0001/publish", 405),
        ("DELETE", "weights/0001/publish", 422),
        ("PUT", "weights/0001/ttl", 405),
        ("GET", "external_weights/x/external_weights_urls", 405),
    ):
        assert api.request(method, f"{run}/checkpoints/{path}").status_code == status, path
    assert server.account.checkpoint(server.account.run_ids[0], "weights/0001") is not None


def test_skyrl_has_unbounded_pages(at):
    _, api, _ = at("skyrl", runs=150, checkpoints=1)
    page = api.get("training_runs", params={"limit": 1000}).json()
    assert (len(page["training_runs"]), page["cursor"]["total_count"]) == (150, 150)
    past = api.get("training_runs", params={"offset": 150}).json()
    assert (past["training_runs"], past["cursor"]["total_count"]) == ([], 0)


def test_skyrl_has_weights_info_of_training_checkpoints_only(at):
    server, api, _ = at("skyrl")
    run_id = server.account.run_ids[0]

    def ask(kind):
        path = f"tinker://{run_id}/{kind}/0001"
        return api.post("weights_info", json={"tinker_path": path}).status_code

    assert (ask("weights"), ask("sampler_weights"), ask("external_weights")) == (200, 400, 400)


def test_skyrl_serves_archives_itself(at, web):
    server, api, run = at("skyrl", prefix="/p")
    response = api.get(f"{run}/checkpoints/0001/archive")
    assert response.headers["location"].startswith(f"{server.base_url}/api/v1/training_runs/")
    assert "expires" in response.headers
    body = web.get(response.headers["location"], headers={"Range": "bytes=0-9"})
    assert body.status_code == 200
    assert "etag" not in body.headers
    assert "accept-ranges" not in body.headers
    assert body.headers["content-length"] == str(len(body.content))
    assert body.content[:2] == b"\x1f\x8b"
    with tarfile.open(fileobj=io.BytesIO(body.content), mode="r:gz") as archive:
        assert "adapter_config.json" in archive.getnames()
    # The route matches one segment, and only sampler checkpoints have archives.
    assert api.get(f"{run}/checkpoints/sampler_weights/0001/archive").status_code == 405
    assert api.get(f"{run}/checkpoints/0002/archive").status_code == 404
    server.account.checkpoint(server.account.run_ids[0], "sampler_weights/0001").is_pending = True
    assert api.get(f"{run}/checkpoints/0001/archive").status_code == 425
    listed = api.get(f"{run}/checkpoints").json()["checkpoints"]
    assert [c["checkpoint_id"] for c in listed].count("0001") == 1


def test_skyrl_deletes_by_kind_and_name(at):
    server, api, run = at("skyrl")
    assert api.delete(f"{run}/checkpoints/0001").status_code == 400
    run_id = server.account.run_ids[0]
    server.account.checkpoint(run_id, "weights/0001").is_pending = True
    assert api.delete(f"{run}/checkpoints/weights/0001").status_code == 425
    server.account.checkpoint(run_id, "weights/0001").is_pending = False
    assert api.delete(f"{run}/checkpoints/weights/0001").status_code == 204
    assert api.delete(f"{run}/checkpoints/weights/0001").status_code == 404
    assert server.account.checkpoint(run_id, "weights/0001") is None
    assert server.account.checkpoint(run_id, "sampler_weights/0001") is not None


def test_hatchery_has_its_endpoints_and_dialect(at):
    server, api, run = at("hatchery")
    for path in ("training_runs", run, "sessions", f"{run}/checkpoints/0001/archive"):
        response = api.get(path)
        assert (response.status_code, response.json()) == (404, NOT_FOUND), path
    listed = api.get(f"{run}/checkpoints").json()["checkpoints"]
    run_id = server.account.run_ids[0]
    assert [c["checkpoint_id"] for c in listed] == ["0001", "0002", "0003", "0004", "0005"]
    assert listed[0]["tinker_path"] == f"tinker://{run_id}/checkpoints/0001"
    times = [c["time"] for c in listed]
    assert isinstance(times[0], float)
    assert times[3] is None
    path = f"tinker://{run_id}/checkpoints/0002"
    assert api.post("weights_info", json={"tinker_path": path}).is_success
    path = f"tinker://{run_id}/weights/0001"
    assert api.post("weights_info", json={"tinker_path": path}).status_code == 400


def test_hatchery_deletes_by_bare_name_and_blindly(at):
    server, api, run = at("hatchery")
    run_id = server.account.run_ids[0]
    assert api.delete(f"{run}/checkpoints/weights/0001").status_code in (404, 405)
    assert server.account.checkpoint(run_id, "weights/0001")
    assert api.delete(f"{run}/checkpoints/0001").json() == {"deleted": True}
    assert server.account.checkpoint(run_id, "weights/0001") is None
    assert api.delete(f"{run}/checkpoints/0001").json() == {"deleted": True}


def test_twinkle_publishes_to_its_hub(at):
    server, api, run = at("twinkle")
    run_id = server.account.run_ids[0]
    checkpoint = server.account.checkpoint(run_id, "weights/0001")
    was_public = checkpoint.is_public
    assert api.post(f"{run}/checkpoints/weights/0001/publish").status_code == 204
    assert checkpoint.is_public == was_public
    for method, path in (
        ("DELETE", "weights/0001/publish"),
        ("PUT", "weights/0001/ttl"),
        ("GET", "sampler_weights/0001/archive"),
    ):
        assert api.request(method, f"{run}/checkpoints/{path}").status_code == 404, path
    assert api.delete(f"{run}/checkpoints/weights/0001").status_code == 204


@pytest.mark.parametrize("checkpoint_id", ["0001", "weights/0001"])
def test_mlx_tinker_serves_archives_under_their_own_ids(at, web, checkpoint_id):
    server, api, run = at("mlx_tinker")
    response = api.get(f"{run}/checkpoints/{checkpoint_id}/archive")
    assert response.status_code == 302
    url = response.headers["location"]
    assert url.startswith(f"{server.base_url}/api/v1/archives/")
    with tarfile.open(fileobj=io.BytesIO(web.get(url).content)) as archive:
        assert {"adapters.safetensors", "config.json"} <= set(archive.getnames())
    assert web.get(f"{server.base_url}/api/v1/archives/x/download").status_code == 404


def test_custom_profile_is_supported(at):
    profile = replace(PROFILES["official"], name="odd", page_max=7, change_status=204)
    _, api, run = at(profile)
    assert len(api.get("training_runs").json()["training_runs"]) == 7
    response = api.delete(f"{run}/checkpoints/weights/0001")
    assert (response.status_code, response.content) == (204, b"")
