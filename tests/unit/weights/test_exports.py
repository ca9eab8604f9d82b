import errno
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from tests.support.account import needs
from tests.support.server import api_client
from tinkerfs import errors
from tinkerfs.api import exports as api_exports
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.api.client import Client
from tinkerfs.api.credentials import Credentials
from tinkerfs.cache.byte_locks import ByteRangeLocks
from tinkerfs.cache.store import MetadataStore
from tinkerfs.clock import SYSTEM_CLOCK
from tinkerfs.context import BACKGROUND_CONTEXT, RequestContext
from tinkerfs.demo.exports import ExportOptions
from tinkerfs.retry import Backoff
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights import exports as weights_exports
from tinkerfs.weights.checkpoint_version import CheckpointVersion
from tinkerfs.weights.exports import Exports


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch):
    monkeypatch.setattr(api_exports, "POLL", Backoff(0.01, 0.05))


@pytest.fixture
def server(demo_server):
    return demo_server(profile="official-0.36", exports=ExportOptions())


@pytest.fixture
def checkpoint(server):
    run_id = server.account.run_ids[0]
    server.account.add_checkpoint(run_id, "weights/step-1")
    ref = CheckpointRef(run_id, "weights/step-1", "weights/step-1", exists=True)
    return CheckpointVersion(server.base_url, (run_id, "step-1", 1.0), ref, "/x", 0)


@pytest.fixture
def telemetry():
    return Telemetry()


@pytest.fixture
def open_exports(server, telemetry, tmp_path):
    """A factory of the exports of another mount that shares the cache directory."""
    with ExitStack() as stack:

        def make(timeout_s=30.0, directory=tmp_path):
            store = stack.enter_context(MetadataStore(directory))
            credentials = Credentials({"TINKER_API_KEY": server.api_key}, home=str(tmp_path))
            client = stack.enter_context(
                Client(server.base_url, credentials, telemetry, timeout_s=5.0)
            )
            exports = Exports(client, store, telemetry, SYSTEM_CLOCK, timeout_s=timeout_s)
            return stack.enter_context(exports)

        yield make


@pytest.fixture
def exports(open_exports):
    return open_exports()


def count(server, endpoint):
    return server.journal.count(f"POST {endpoint}")


def test_looking_starts_nothing(server, exports, checkpoint):
    assert exports.find(checkpoint) is None
    assert exports.recover(checkpoint) is None
    assert exports.describe(checkpoint) == "none"
    assert server.journal.count("api") == 0


def test_export_is_known_to_the_next_mount(server, exports, open_exports, checkpoint, telemetry):
    record = exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
    assert record.path.endswith(":train:0/external_weights/tinkerfs")
    text = exports.describe(checkpoint)
    assert text.startswith(f"{record.path}, until 20")
    assert text.endswith(f"Z, {record.size_bytes} bytes")
    other = open_exports()
    assert other.find(checkpoint) == record
    assert other.describe(checkpoint) == text
    assert "export for 3600 s" in telemetry.changes.text().decode()
    assert telemetry.changes.text().decode().rstrip().endswith("done")


def test_second_export_renews_the_expiry_of_the_first(server, exports, checkpoint):
    first = exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
    second = exports.export(checkpoint, 7200, "/x/export", BACKGROUND_CONTEXT)
    assert second.path == first.path
    assert second.expires_at_s - first.expires_at_s == pytest.approx(3600, abs=60)
    assert count(server, "create_session") == 1
    assert server.journal.count("PUT ttl") == 1


def test_export_that_exists_may_keep_its_expiry(server, exports, checkpoint):
    first = exports.export(checkpoint, 86_400, "/x/export", BACKGROUND_CONTEXT)
    second = exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT, keeps_expiry=True)
    assert second == first
    assert server.journal.count("PUT ttl") == 0


def test_concurrent_writers_share_one_export(server, exports, open_exports, checkpoint):
    server.behaviour.exports.load_s = 0.5
    all_exports = [exports, exports, open_exports()]
    with ThreadPoolExecutor(3) as pool:
        works = [
            pool.submit(each.export, checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
            for each in all_exports[:2]
        ]
        paths = {work.result().path for work in works}
    assert len(paths) == 1
    assert count(server, "create_session") == 1
    assert all_exports[2].export(checkpoint, 3600, "/x", BACKGROUND_CONTEXT).path in paths
    assert count(server, "create_session") == 1


def test_interrupted_caller_leaves_the_export_running(server, exports, checkpoint):
    server.behaviour.exports.load_s = 0.5
    interrupted = RequestContext(is_cancelled=lambda: True)
    with pytest.raises(InterruptedError):
        exports.export(checkpoint, 3600, "/x/export", interrupted)
    assert exports.describe(checkpoint).startswith("exporting: ")
    assert exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT).path
    assert count(server, "create_session") == 1


def test_state_of_the_queue_is_described_and_pending(server, exports, checkpoint, telemetry):
    options = server.behaviour.exports
    options.load_s, options.queue_state = 1.0, "paused_capacity"
    thread = threading.Thread(
        target=exports.export, args=(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
    )
    thread.start()
    seen, pending = set(), set()
    while thread.is_alive():
        seen.add(exports.describe(checkpoint))
        pending.update(what for what, _age_s in telemetry.pending())
        thread.join(0.02)
    assert any("loading weights, waiting for capacity, 0 s" in text for text in seen)
    assert f"export of {checkpoint.about}: loading weights, waiting for capacity" in pending
    assert telemetry.pending() == []


def test_failure_is_described_until_the_next_export(server, exports, open_exports, checkpoint):
    server.behaviour.exports.failure = ("out of memory", "server")
    with pytest.raises(errors.ServerError, match="out of memory"):
        exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
    assert exports.describe(checkpoint) == "failed: out of memory"
    assert open_exports().describe(checkpoint) == "failed: out of memory"
    server.behaviour.exports.failure = None
    assert exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT).path


def test_expired_export_is_no_longer_known(server, exports, checkpoint):
    record = exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
    past = msgspec.structs.replace(record, expires_at_s=SYSTEM_CLOCK.now() + 30)
    exports._records.put(checkpoint.cache_key, past)
    assert exports.find(checkpoint) is None
    assert exports.describe(checkpoint) == "none"


def test_delete_removes_the_export_from_the_server(server, exports, checkpoint):
    record = exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
    exports.delete(checkpoint, "/x/export", BACKGROUND_CONTEXT)
    assert exports.describe(checkpoint) == "none"
    assert server.account.checkpoint(record.ref.run_id, record.ref.path_id) is None
    exports.delete(checkpoint, "/x/export", BACKGROUND_CONTEXT)
    assert server.journal.count("DELETE checkpoint") == 1


def test_delete_stops_an_export_in_flight(server, exports, checkpoint):
    server.behaviour.exports.load_s = 3600
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(exports.export, checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
        while "loading" not in exports.describe(checkpoint):
            threading.Event().wait(0.01)
        exports.delete(checkpoint, "/x/export", BACKGROUND_CONTEXT)
        with pytest.raises(InterruptedError):
            work.result()
    assert exports.describe(checkpoint) == "none"
    session = server.account.session("export-session-1")
    assert session.status["reason"] == {"type": "interrupted"}


def test_close_finishes_the_session_of_a_running_export(server, open_exports, checkpoint):
    server.behaviour.exports.load_s = 3600
    with open_exports() as exports, ThreadPoolExecutor(1) as pool:
        work = pool.submit(exports.export, checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
        while "loading" not in exports.describe(checkpoint):
            threading.Event().wait(0.01)
        exports.__exit__(None, None, None)
        with pytest.raises(InterruptedError):
            work.result()
    assert count(server, "finish") == 1


KILLED = """
import sys, os, threading, time
from tests.unit.weights.test_exports import *
from tinkerfs.api import exports as api_exports
from tinkerfs.weights import exports as weights_exports
api_exports.POLL = Backoff(0.01, 0.05)
base_url, directory, step = sys.argv[1:]
store = MetadataStore(__import__("pathlib").Path(directory)); store.__enter__()
telemetry = Telemetry()
credentials = Credentials({"TINKER_API_KEY": "tml-demo-key"}, home=directory)
client = Client(base_url, credentials, telemetry, timeout_s=5.0)
exports = Exports(client, store, telemetry, SYSTEM_CLOCK, timeout_s=30.0)
runs = [each.run_id for each in client.list_training_runs().items]
run_id = next(each for each in runs if not each.startswith("export-"))
ref = CheckpointRef(run_id, "weights/step-1", "weights/step-1", exists=True)
checkpoint = CheckpointVersion(base_url, (run_id, "step-1", 1.0), ref, "/x", 0)
original = exports._on_progress
def on_progress(key, export, progress):
    original(key, export, progress)
    if str(progress).startswith(step):
        os.kill(os.getpid(), 9)
exports._on_progress = on_progress
if step.startswith("post "):
    left = [int(step[5:])]
    post = client.post
    def killing_post(*args):
        if not left[0]:
            os.kill(os.getpid(), 9)
        found = post(*args)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), 9)
        return found
    client.post = killing_post
if step == "saved":
    weights_exports.find_saved = lambda *args: os.kill(os.getpid(), 9)
exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
"""


@pytest.mark.parametrize("step", ["starting", "loading", "saving", "saved"])
def test_next_mount_recovers_what_a_killed_process_saved(
    server, open_exports, checkpoint, tmp_path, step
):
    command = [sys.executable, "-c", KILLED, server.base_url, str(tmp_path), step]
    assert subprocess.run(command, timeout=60).returncode == -9
    exports = open_exports()
    assert exports.describe(checkpoint) == "failed: the process that exported was killed"
    recovered = exports.recover(checkpoint)
    if step == "saved":
        assert exports.describe(checkpoint).startswith(recovered.path)
        assert exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
        assert count(server, "create_session") == 1
    else:
        assert recovered is None
        assert exports.describe(checkpoint) == "none"
        assert exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT).path


@pytest.mark.parametrize("prefix", [[], ["unshare", "--pid", "--fork", "--kill-child"]])
def test_export_of_other_pid_namespace_is_not_repeated(
    server, open_exports, checkpoint, tmp_path, prefix, needs_root, monkeypatch
):
    monkeypatch.setattr(weights_exports, "_UNLOCK_S", 0.1)
    needs(prefix[:1])
    server.behaviour.exports.load_s = 3600
    command = [sys.executable, "-c", KILLED, server.base_url, str(tmp_path), "never"]
    with subprocess.Popen([*prefix, *command]) as process:
        exports = open_exports(timeout_s=0.2)
        while count(server, "load_weights") == 0:
            threading.Event().wait(0.02)
        assert exports.describe(checkpoint).startswith("exporting: by process ")
        assert exports.recover(checkpoint) is None
        with pytest.raises(errors.Conflict, match=r"process .* uses the export"):
            exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
        with pytest.raises(errors.Conflict, match=r"process .* uses the export"):
            exports.delete(checkpoint, "/x/export", BACKGROUND_CONTEXT)
        assert count(server, "create_session") == 1
        process.kill()
    while exports._records.is_locked(checkpoint.cache_key):  # the child ends after its parent
        threading.Event().wait(0.02)
    assert exports.describe(checkpoint) == "failed: the process that exported was killed"
    server.behaviour.exports.load_s = 0.0
    assert exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT).path
    assert count(server, "create_session") == 2


def test_file_system_without_locks_allows_exports(server, exports, checkpoint, monkeypatch):
    def refuse(*_args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(ByteRangeLocks, "acquire", refuse)
    monkeypatch.setattr(ByteRangeLocks, "is_locked", refuse)
    assert exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT).path
    assert exports.describe(checkpoint).startswith("tinker://")


def killed_table():
    """Return the cells of the table "A killed export" of docs/development/decisions.md."""
    page = Path(__file__).parents[3] / "docs/development/decisions.md"
    section = page.read_text().partition("\n### A killed export")[2].partition("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def left_on(server, time_):
    """Return what the server has of an export, in words."""
    with api_client(server) as client:
        client.get("training_runs").raise_for_status()  # the server catches up with its clock
    account = server.account
    sessions = [account.session(each) for each in account.session_ids()]
    states = {"active": "active session", "cancelled": "ended session"}
    states["client_finished"] = "ended session"
    found = [states[s.status["type"]] for s in sessions if s.id.startswith("export-")]
    runs = [run for run in account.runs() if run.id.startswith("export-")]
    found += ["run"] * len(runs)
    found += ["weights" for run in runs for each in run.checkpoints if each.name == "tinkerfs"]
    return ", ".join(found) or "nothing"


#: Requests of an export, in order, except those that read the checkpoint.
POSTS = (
    "create_session",
    "load_weights",
    "retrieve_future of the load",
    "save_weights_external",
    "retrieve_future of the save",
    "finish",
)


@pytest.mark.parametrize("row", killed_table(), ids=lambda row: row[0])
def test_table_of_a_killed_export(demo_server, tmp_path, row):
    killed_after, at_once, after_minutes, after_an_hour, next_export = row
    offset_s = [0.0]
    server = demo_server(
        profile="official-0.36",
        exports=ExportOptions(),
        clock=lambda: time.time() + offset_s[0],
    )
    server.account.add_checkpoint(server.account.run_ids[0], "weights/step-1")
    posts = 0 if killed_after == "nothing" else POSTS.index(killed_after) + 1
    command = [sys.executable, "-c", KILLED, server.base_url, str(tmp_path), f"post {posts}"]
    assert subprocess.run(command, timeout=60).returncode == -9
    assert left_on(server, offset_s) == at_once
    again = [sys.executable, "-c", KILLED, server.base_url, str(tmp_path), "never"]
    before = count(server, "create_session")
    if next_export == "uses the weights":
        assert subprocess.run(again, timeout=60).returncode == 0
        assert count(server, "create_session") == before
    offset_s[0] = 180.0
    assert left_on(server, offset_s) == after_minutes
    offset_s[0] = 3700.0
    assert left_on(server, offset_s) == after_an_hour
    if next_export == "starts again":
        assert subprocess.run(again, timeout=60).returncode == 0
        assert count(server, "create_session") == before + 1


def test_table_of_a_killed_export_has_every_request():
    assert [row[0] for row in killed_table()] == ["nothing", *POSTS]


def test_export_without_a_cache_directory_is_known_to_its_mount(server, open_exports, checkpoint):
    exports = open_exports(directory=None)
    record = exports.export(checkpoint, 3600, "/x/export", BACKGROUND_CONTEXT)
    assert exports.find(checkpoint) == record


def test_damaged_record_counts_as_none(open_exports, checkpoint, tmp_path):
    with MetadataStore(tmp_path) as store:
        store.put_durable("exports 1", checkpoint.cache_key, b"{")
    assert open_exports().describe(checkpoint) == "none"
