"""Call every account method of the official RestClient, and check the results.

interop.py runs this script inside the environment of the client, and writes the expected data to
standard input. Prints one line per step, `ok` or `FAIL`; exits 1 if a step failed.
"""

import io
import json
import sys
import tarfile
import time
import traceback
import urllib.request
import warnings
from collections.abc import Callable
from typing import Any

import tinker

warnings.simplefilter(
    "ignore", FutureWarning
)  # version 0.35 warns that its archive method is deprecated

EXPECTED: dict[str, Any] = json.load(sys.stdin)
RUNS: list[dict[str, Any]] = EXPECTED["runs"]
RUN = next(r for r in RUNS if any("external" in c["id"] for c in r["checkpoints"]))
SESSIONS: dict[str, dict[str, Any]] = EXPECTED["sessions"]


def same_time(found: Any, expected_s: float | None) -> bool:
    """Return whether a time is the expected one."""
    if found is None or expected_s is None:
        return found is expected_s
    return bool(abs(found.timestamp() - expected_s) < 0.001)


def check_checkpoint(found: Any, expected: dict[str, Any]) -> None:
    """Compare a checkpoint with the expected record."""
    assert found.checkpoint_id == expected["id"], (found, expected)
    assert found.tinker_path == expected["path"]
    assert found.size_bytes == expected["size_bytes"]
    assert found.public == expected["is_public"]
    assert same_time(found.time, expected["time_s"])
    assert same_time(found.expires_at, expected["expires_at_s"])
    kind = expected["id"].partition("/")[0]
    types = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
    assert found.checkpoint_type == types[kind]


def check_run(found: Any, expected: dict[str, Any]) -> None:
    """Compare a run with the expected record."""
    assert found.training_run_id == expected["id"], (found, expected)
    assert found.base_model == expected["base_model"]
    assert found.model_owner == expected["owner"]
    assert (found.is_lora, found.lora_rank) == (True, expected["lora_rank"])
    assert found.user_metadata == expected["user_metadata"]
    assert same_time(found.last_request_time, expected["time_s"])
    for kind, last in (
        ("weights", found.last_checkpoint),
        ("sampler_weights", found.last_sampler_checkpoint),
    ):
        of_kind = [c for c in expected["checkpoints"] if c["id"].startswith(f"{kind}/")]
        check_checkpoint(last, of_kind[-1])


def list_training_runs(client: Any) -> None:
    """Runs are listed on pages, in order, with a correct cursor."""
    found: list[Any] = []
    while True:
        page = client.list_training_runs(limit=20, offset=len(found)).result()
        assert page.cursor.total_count == len(RUNS)
        assert (page.cursor.offset, page.cursor.limit) == (len(found), 20)
        if not page.training_runs:
            break
        found += page.training_runs
    assert len(found) == len(RUNS)
    for one, expected in zip(found, RUNS, strict=True):
        check_run(one, expected)


def get_training_run(client: Any) -> None:
    """Own runs and public runs of other users are found; an unknown run is an error."""
    check_run(client.get_training_run(RUN["id"]).result(), RUN)
    path = RUN["checkpoints"][0]["path"]
    check_run(client.get_training_run_by_tinker_path(path).result(), RUN)
    foreign = client.get_training_run(EXPECTED["foreign"][0]).result()
    assert foreign.model_owner != RUN["owner"]
    expect_error(tinker.NotFoundError, lambda: client.get_training_run("no-such-run").result())


def list_checkpoints(client: Any) -> None:
    """All checkpoints of one run are listed."""
    found = client.list_checkpoints(RUN["id"]).result().checkpoints
    for one, expected in zip(found, RUN["checkpoints"], strict=True):
        check_checkpoint(one, expected)


def list_user_checkpoints(client: Any) -> None:
    """All checkpoints of all runs are listed, newest first."""
    expected = [c for run in RUNS for c in run["checkpoints"]]
    expected.sort(key=lambda c: -c["time_s"])
    found: list[Any] = []
    while page := client.list_user_checkpoints(limit=100, offset=len(found)).result().checkpoints:
        found += page
    for one, wanted in zip(found, expected, strict=True):
        check_checkpoint(one, wanted)


def get_weights_info(client: Any) -> None:
    """Each kind of checkpoint has weights info."""
    for checkpoint in RUN["checkpoints"]:
        found = client.get_weights_info_by_tinker_path(checkpoint["path"]).result()
        assert (found.base_model, found.lora_rank) == (RUN["base_model"], RUN["lora_rank"])
    missing = f"tinker://{RUN['id']}/weights/nothing"
    call = client.get_weights_info_by_tinker_path
    expect_error(tinker.NotFoundError, lambda: call(missing).result())


def sessions(client: Any) -> None:
    """Sessions are listed on pages; each has its runs and samplers."""
    found: list[str] = []
    while page := client.list_sessions(limit=20, offset=len(found)).result().sessions:
        found += page
    assert found == list(SESSIONS)
    for session_id in found[:3]:
        session, expected = client.get_session(session_id).result(), SESSIONS[session_id]
        assert list(session.training_run_ids) == expected["run_ids"]
        assert list(session.sampler_ids) == list(expected["samplers"])


def get_sampler(client: Any) -> None:
    """Samplers of a checkpoint and of a base model are found."""
    for sampler_id, (base_model, path) in next(iter(SESSIONS.values()))["samplers"].items():
        found = client.get_sampler(sampler_id).result()
        assert (found.sampler_id, found.base_model) == (sampler_id, base_model)
        assert found.model_path == path


def export_session_trace(client: Any) -> None:
    """The trace of a session can be downloaded from a signed URL."""
    url = client.export_session_trace(next(iter(SESSIONS))).result()
    with urllib.request.urlopen(url, timeout=10) as response:
        assert response.status == 200


def search_sessions(client: Any) -> None:
    """Sessions are found by search on pages, and by a part of their names."""
    request = tinker.types.SessionSearchRequest(limit=10)
    found: list[str] = []
    while True:
        page = client.search_sessions(request).result()
        found += [session.session_id for session in page.sessions]
        if page.next_cursor is None:
            break
        request = request.model_copy(update={"cursor": page.next_cursor})
    assert found == list(SESSIONS)
    named = tinker.types.SessionSearchRequest(display_name="chat")
    names = [s.display_name for s in client.search_sessions(named).result().sessions]
    assert names
    assert all("chat" in name for name in names)


def get_server_capabilities(client: Any) -> None:
    """The supported models are listed."""
    if not hasattr(client, "get_server_capabilities"):
        client = tinker.ServiceClient()
        models = client.get_server_capabilities().supported_models
    else:
        models = client.get_server_capabilities().result().supported_models
    assert RUN["base_model"] in [model.model_name for model in models]


def publish_and_unpublish(client: Any) -> None:
    """Publishing and unpublishing change the listing."""
    checkpoint = next(c for c in RUN["checkpoints"] if not c["is_public"])
    for call, wanted in (
        (client.publish_checkpoint_from_tinker_path, True),
        (client.unpublish_checkpoint_from_tinker_path, False),
    ):
        call(checkpoint["path"]).result()
        assert listed(client, checkpoint["id"]).public == wanted


def set_checkpoint_ttl(client: Any) -> None:
    """An expiry can be set and removed; one out of range is an error."""
    call = client.set_checkpoint_ttl_from_tinker_path
    checkpoint = RUN["checkpoints"][0]
    call(checkpoint["path"], 7200).result()
    assert abs(listed(client, checkpoint["id"]).expires_at.timestamp() - time.time() - 7200) < 60
    expect_error(tinker.BadRequestError, lambda: call(checkpoint["path"], 60).result())
    call(checkpoint["path"], None).result()
    assert listed(client, checkpoint["id"]).expires_at is None


def get_checkpoint_archive_url(client: Any) -> None:
    """The archive is a tar file of an adapter, with the listed size."""
    checkpoint = RUN["checkpoints"][0]
    found = client.get_checkpoint_archive_url(RUN["id"], checkpoint["id"]).result()
    assert 600 < found.expires.timestamp() - time.time() < 1000
    with urllib.request.urlopen(found.url, timeout=10) as response:
        content = io.BytesIO(response.read())
    with tarfile.open(fileobj=content) as archive:
        sizes = {member.name: member.size for member in archive}
    assert list(sizes) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint_complete",
    ]
    assert sum(sizes.values()) == checkpoint["size_bytes"]


def get_external_weights_urls(client: Any) -> None:
    """External weights have a signed URL per file."""
    checkpoint = next(c for c in RUN["checkpoints"] if c["id"].startswith("external"))
    found = client.get_external_weights_urls(checkpoint["path"]).result()
    total_bytes = 0
    for url in found.urls.values():
        with urllib.request.urlopen(url, timeout=10) as response:
            total_bytes += len(response.read())
    assert total_bytes == checkpoint["size_bytes"]


def delete_checkpoint(client: Any) -> None:
    """Checkpoints are deleted by id and by path; a missing one is a 404 error."""
    first, second = RUN["checkpoints"][:2]
    client.delete_checkpoint(RUN["id"], first["id"]).result()
    client.delete_checkpoint_from_tinker_path(second["path"]).result()
    left = [c.checkpoint_id for c in client.list_checkpoints(RUN["id"]).result().checkpoints]
    assert left == [c["id"] for c in RUN["checkpoints"][2:]]
    call = client.delete_checkpoint
    expect_error(tinker.NotFoundError, lambda: call(RUN["id"], first["id"]).result())


def listed(client: Any, checkpoint_id: str) -> Any:
    """Return the record of a checkpoint in the listing of its run."""
    found = client.list_checkpoints(RUN["id"]).result().checkpoints
    return next(c for c in found if c.checkpoint_id == checkpoint_id)


def expect_error(expected: type[Exception], call: Callable[[], Any]) -> None:
    """Check that a call raises the expected exception."""
    try:
        call()
    except expected:
        return
    msg = f"{expected.__name__} was not raised"
    raise AssertionError(msg)


def main() -> int:
    """Run every step that this version of the client supports."""
    client = tinker.ServiceClient().create_rest_client()
    steps: list[Callable[[Any], None]] = [
        list_training_runs,
        get_training_run,
        list_checkpoints,
        list_user_checkpoints,
        get_weights_info,
        sessions,
        get_sampler,
        export_session_trace,
        get_server_capabilities,
        publish_and_unpublish,
        set_checkpoint_ttl,
        get_external_weights_urls,
    ]
    version_dependent = (search_sessions, get_checkpoint_archive_url)
    steps += [step for step in version_dependent if hasattr(client, step.__name__)]
    steps.append(delete_checkpoint)
    failures = 0
    for step in steps:
        try:
            step(client)
        except Exception:  # noqa: BLE001 - run the other steps too
            failures += 1
            traceback.print_exc()
            print(f"FAIL library {step.__name__}", flush=True)
        else:
            print(f"ok library {step.__name__}", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
