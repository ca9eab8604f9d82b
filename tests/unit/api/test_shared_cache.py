"""Clients of several hosts that share responses through a real Redis server."""

import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest

from tests.support.faulty_server import FaultyServer
from tests.support.mount import ROOT, wait_until
from tests.support.redis_server import RedisProcess
from tinkerfs import errors
from tinkerfs.api import endpoints, pagination, shared_cache
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.api.circuit_breaker import UNSUPPORTED
from tinkerfs.api.client import Client
from tinkerfs.api.credentials import Credentials
from tinkerfs.api.http_client import Response
from tinkerfs.api.pagination import RecordList
from tinkerfs.api.shared_cache import SharedCache
from tinkerfs.api.shared_records import InvalidRecordError, RecordSeal, SharedRecord
from tinkerfs.app import open_app
from tinkerfs.clock import SYSTEM_CLOCK
from tinkerfs.config import Settings
from tinkerfs.context import BACKGROUND_CONTEXT, Priority
from tinkerfs.telemetry import Telemetry
from tinkerfs.validity import SharedReads
from tinkerfs.weights.url_cache import SignedUrlCache

RUNS = "GET training_runs"
LISTING = "GET training_runs/{run}/checkpoints"
ARCHIVE = "GET archive"


@pytest.fixture(autouse=True)
def _patience(monkeypatch):
    monkeypatch.setattr(shared_cache, "SERVER_TIMEOUT_S", 10.0)  # busy machines pause


@pytest.fixture
def server():
    with FaultyServer(runs=2, checkpoints=3) as server:
        yield server


@pytest.fixture
def redis_server():
    with RedisProcess() as process:
        yield process


class Host:
    """A client with its part of the shared cache."""

    def __init__(self, server, url, stack, key=None):
        environment = server.environment if key is None else {"TINKER_API_KEY": key}
        credentials = Credentials(environment, home="/nonexistent")
        self.telemetry, self.changes = Telemetry(), []
        self.shared = SharedCache(url, server.base_url, credentials, self.telemetry, SYSTEM_CLOCK)
        self.client = stack.enter_context(
            Client(server.base_url, credentials, self.telemetry, shared=self.shared)
        )
        stack.enter_context(self.shared.start(self.changes.append))

    def reading(self, max_age_s=30.0, **bounds):
        """Return a client as a load uses it, with `reads` as an attribute."""
        reads = SharedReads(max_age_s, **bounds)
        client = self.client.with_priority(Priority(is_demand=True, shared_reads=reads))
        client.reads = reads
        return client

    def count(self, name):
        return self.telemetry.counter_value(f"shared_metadata_{name}")

    @property
    def is_up(self):
        return self.telemetry.gauges()["shared_metadata_up"] == 1

    def errors(self):
        return [line.split("\t")[-1] for line in self.telemetry.errors.text().decode().splitlines()]


@pytest.fixture
def host(server, redis_server):
    """Return a function that makes another host."""
    with ExitStack() as stack:

        def make(key=None, url=None):
            made = Host(server, url or redis_server.url, stack, key)
            if url is None:
                wait_until(lambda: made.is_up)
            return made

        yield make


def first_run(server):
    return next(iter(server.account.runs())).id


def ref_of(server, version="1"):
    run = next(iter(server.account.runs()))
    found = next(c for c in run.checkpoints if c.id.startswith("weights/"))
    return CheckpointRef(run.id, found.id, found.id, exists=True, version=version)


def test_without_the_option_no_library_is_imported():
    code = "import sys, tinkerfs.app; print({'redis', 'cryptography'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_missing_library_is_named(server, tmp_path, monkeypatch):
    for name in ("redis", "tinkerfs.api.redis_server", "tinkerfs.api.shared_cache"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "redis", None)
    settings = Settings(
        base_url=server.base_url, cache_dir=str(tmp_path / "cache"), shared_cache="redis://host"
    )
    with (
        pytest.raises(errors.StartupError, match=r"redis is .* pip install 'tinkerfs\[redis\]'"),
        open_app(settings),
    ):
        pass


# --- sharing -------------------------------------------------------------------------------------


def test_response_is_requested_by_one_host(server, host):
    hosts = [host() for _ in range(3)]
    found = [each.reading().all_training_runs() for each in hosts]
    assert found[0] == found[1] == found[2]
    assert server.journal.count(RUNS) == 1
    assert [each.count("hits") for each in hosts] == [0, 1, 1]
    assert [each.count("misses") for each in hosts] == [1, 0, 0]


def test_concurrent_misses_of_hosts_send_one_request(server, host):
    hosts = [host() for _ in range(4)]
    rule = server.faults.add(LISTING, hang=True)
    run_id = first_run(server)
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(each.reading().list_checkpoints, run_id) for each in hosts]
        rule.wait_for(1)
        wait_until(lambda: sum(each.count("waits") for each in hosts) == 3)
        rule.release()
        assert len({future.result() for future in futures}) == 1
    assert server.journal.count(LISTING) == 1


def test_pages_are_divided_among_hosts(server, host):
    for _ in range(350):
        server.account.add_run()
    hosts = [host() for _ in range(3)]
    with ThreadPoolExecutor() as pool:
        futures = [pool.submit(each.reading().all_training_runs) for each in hosts]
        ids = [[run.run_id for run in future.result()] for future in futures]
    assert ids == [[run.id for run in server.account.runs()]] * 3
    assert server.journal.count(RUNS) == 4


def test_age_is_reported_to_the_load(server, host):
    before = SYSTEM_CLOCK.with_suspend()
    own = host().reading()
    own.all_training_runs()
    other = host().reading()
    other.all_training_runs()
    assert own.reads.oldest_at == float("inf")
    assert before - 0.1 <= other.reads.oldest_at <= SYSTEM_CLOCK.with_suspend()


def test_response_from_before_the_bound_is_requested_again(server, host):
    first, second = host(), host()
    first.reading().all_training_runs()
    second.reading(not_before=SYSTEM_CLOCK.with_suspend()).all_training_runs()
    assert server.journal.count(RUNS) == 2
    first.reading().all_training_runs()  # gets the newer one
    assert server.journal.count(RUNS) == 2


def test_load_without_age_shares_nothing(server, host, redis_server):
    host().reading(max_age_s=0.0).all_training_runs()
    host().client.all_training_runs()
    assert server.journal.count(RUNS) == 2
    assert not [name for name in redis_server.dump() if b":v:" in name]


def test_reset_makes_older_responses_unused(server, host):
    first, second = host(), host()
    first.reading().all_training_runs()
    second.client.reset()
    second.reading().all_training_runs()
    assert server.journal.count(RUNS) == 2


def test_hosts_with_other_keys_share_nothing(server, host, redis_server):
    server.account.keys = None
    first, second = host(), host("tml-another-key")
    first.reading().all_training_runs()
    with pytest.raises(errors.Unauthorized):
        second.reading().all_training_runs()
    prefixes = {name.split(b":")[2] for name in redis_server.dump()}
    assert len(prefixes) == 2


def test_refusal_is_shared_and_counts_for_circuit_breakers(server, host):
    hosts = [host() for _ in range(3)]
    for each in hosts:
        with pytest.raises(errors.NotFound, match="absent") as failure:
            each.reading().training_run("absent:train:0")
        assert failure.value.endpoint == "GET training_runs/{run}"
        assert failure.value.status == 404
    assert server.journal.count("GET training_runs/{run}") == 1
    server.faults.add(ARCHIVE, status=501, times=None)
    ref = ref_of(server)
    for each in hosts:
        for _ in range(UNSUPPORTED.threshold):
            with pytest.raises(errors.UnsupportedEndpoint, match="has no such endpoint"):
                each.client.archive(ref, reads=SharedReads(float("inf")))
        with pytest.raises(errors.UnsupportedEndpoint):
            each.client.check_supported(endpoints.ARCHIVE, ref)
    assert server.journal.count(ARCHIVE) == 1


def test_failure_is_not_shared(server, host):
    hosts = [host() for _ in range(2)]
    for status, error in ((403, errors.Unauthorized), (422, errors.BadRequest)):
        server.journal.clear()
        server.faults.add("GET sessions/{session}", status=status, times=None)
        for each in hosts:
            with pytest.raises(error):
                each.reading().session(f"session-{status}")
        expected = 2 if error is errors.Unauthorized else 1
        assert server.journal.count("GET sessions/{session}") == expected
        server.faults.clear()


def test_weights_info_of_another_version_is_requested(server, host):
    run = next(iter(server.account.runs()))
    path = f"tinker://{run.id}/{run.checkpoints[0].id}"
    first, second = host(), host()
    first.reading(float("inf")).weights_info(path, version="1")
    second.reading(float("inf")).weights_info(path, version="1")
    assert server.journal.count("POST weights_info") == 1
    second.reading(float("inf")).weights_info(path, version="2")
    assert server.journal.count("POST weights_info") == 2
    first.client.publish(ref_of(server))  # changes no version
    first.reading(float("inf")).weights_info(path, version="2")
    assert server.journal.count("POST weights_info") == 2


# --- listings of several pages -------------------------------------------------------------------


def test_old_listing_without_all_pages_is_listed_again(server, host, redis_server, monkeypatch):
    for _ in range(150):
        server.account.add_run()
    first, second = host(), host()
    first.reading().all_training_runs()
    assert server.journal.count(RUNS) == 2
    page = max(
        (name for name in redis_server.dump() if b":v:" in name),
        key=lambda name: (
            redis_server.client().ttl(name) * 1000 - redis_server.client().strlen(name)
        ),
    )
    redis_server.client().delete(page)
    monkeypatch.setattr(shared_cache, "MAX_SKEW_S", -1.0)
    found = second.reading().all_training_runs()
    assert {run.run_id for run in found} == {run.id for run in server.account.runs()}
    assert server.journal.count(RUNS) == 4


def test_listing_that_changed_meanwhile_is_requested_again(server, host):
    for _ in range(150):
        server.account.add_run()
    client = host().reading()
    server.faults.add(RUNS, total_count=lambda count: count + 1)
    client.all_training_runs()
    assert server.journal.count(RUNS) >= 4
    assert pagination.MAX_REFETCHES == 2


# --- changes -------------------------------------------------------------------------------------


def test_change_is_announced_and_ends_the_generation(server, host):
    first, second = host(), host()
    run_id, ref = first_run(server), ref_of(server)
    second.reading().list_checkpoints(run_id)
    first.client.publish(ref)
    wait_until(lambda: second.changes == [run_id])
    assert first.changes == []
    listed = second.reading().list_checkpoints(run_id)
    assert any(each.is_public for each in listed)
    assert server.journal.count(LISTING) == 2


def test_response_requested_before_a_change_is_not_used(server, host):
    first, second = host(), host()
    run_id = first_run(server)
    rule = server.faults.add(LISTING, hang=True)
    with ThreadPoolExecutor() as pool:
        early = pool.submit(first.reading().list_checkpoints, run_id)
        rule.wait_for(1)
        second.client.publish(ref_of(server))
        rule.release()
        early.result()
    assert any(each.is_public for each in second.reading().list_checkpoints(run_id))
    assert server.journal.count(LISTING) == 2


def test_change_during_an_outage_is_announced_afterwards(
    server, host, redis_server, expect_warnings
):
    expect_warnings("shared cache .* failed")
    first, second = host(), host()
    redis_server.kill()
    wait_until(lambda: not first.is_up and not second.is_up)
    first.client.publish(ref_of(server))
    redis_server.start()
    wait_until(lambda: first.is_up and second.is_up)
    wait_until(lambda: None in second.changes)


@pytest.mark.expect_warnings("shared cache .* failed")
def test_change_that_a_lost_connection_missed_expires_everything(server, host, redis_server):
    first, second = host(), host()
    assert first.changes == second.changes == []
    database = redis_server.client()
    own = {each["id"] for each in database.client_list(_type="pubsub")}
    assert len(own) == 2
    database.client_kill_filter(_type="pubsub")
    first.client.publish(ref_of(server))
    wait_until(lambda: first.is_up and second.is_up)
    wait_until(lambda: second.changes != [])
    assert set(second.changes) <= {None, first_run(server)}


def test_lost_connection_without_a_change_expires_nothing(
    server, host, redis_server, expect_warnings
):
    expect_warnings("shared cache .* failed")
    client = host()
    redis_server.client().client_kill_filter(_type="pubsub")
    wait_until(lambda: not client.is_up)
    wait_until(lambda: client.is_up)
    assert client.changes == []
    assert len(client.errors()) == 1


def test_lost_data_expires_everything(server, host, redis_server, expect_warnings):
    expect_warnings("shared cache .* failed")
    client = host()
    redis_server.client().flushall()
    redis_server.client().client_kill_filter(_type="pubsub")
    wait_until(lambda: client.changes == [None])
    client.reading().all_training_runs()
    assert client.is_up


# --- signed URLs ---------------------------------------------------------------------------------


def url_cache(host):
    return SignedUrlCache(
        host.client, host.telemetry, SYSTEM_CLOCK, timeout_s=60.0, outage_timeout_s=60.0, burst=0
    )


def test_archive_url_is_shared_until_it_is_rejected(server, host):
    ref, key = ref_of(server), "checkpoint"
    caches = [url_cache(host()) for _ in range(3)]
    urls = [each.url(key, ref, "/x", BACKGROUND_CONTEXT) for each in caches]
    assert server.journal.count(ARCHIVE) == 1
    assert len({each.url for each in urls}) == 1
    shared_expiry = {round(each.expires_at_s) for each in urls}
    assert max(shared_expiry) - min(shared_expiry) <= 1
    for cache, url in zip(caches, urls, strict=True):
        cache.invalidate(key, url)
    threading.Event().wait(0.6)  # a newer URL has to be newer by half a second
    for cache in caches:
        cache.url(key, ref, "/x", BACKGROUND_CONTEXT)
    assert server.journal.count(ARCHIVE) == 2


def test_archive_without_a_version_is_not_shared(server, host):
    ref = ref_of(server, version="")
    for _ in range(2):
        url_cache(host()).url("checkpoint", ref, "/x", BACKGROUND_CONTEXT)
    assert server.journal.count(ARCHIVE) == 2


def test_archive_that_is_not_built_is_polled_by_one_host(server, host):
    server.faults.add(ARCHIVE, status=425, headers={"Retry-After": "1"}, times=1)
    caches = [url_cache(host()) for _ in range(4)]
    with ThreadPoolExecutor() as pool:
        futures = [
            pool.submit(each.url, "x", ref_of(server), "/x", BACKGROUND_CONTEXT) for each in caches
        ]
        assert len({future.result().url for future in futures}) == 1
    assert server.journal.count(ARCHIVE) == 2


# --- hostile and foreign values ------------------------------------------------------------------


def values(redis_server):
    return {name: value for name, value in redis_server.dump().items() if b":v:" in name}


def test_no_value_or_name_has_a_secret(server, host, redis_server):
    client = host()
    client.reading().all_training_runs()
    client.reading().all_user_checkpoints(lambda: RecordList(lambda each: each.identity))
    url = url_cache(client).url("x", ref_of(server), "/x", BACKGROUND_CONTEXT).url
    content = b"".join(name + value for name, value in redis_server.dump().items())
    assert len(values(redis_server)) == 3
    for secret in (server.api_key, url, url.rpartition("=")[2], first_run(server), "archive"):
        assert secret.encode() not in content


@pytest.mark.parametrize("kind", ["garbage", "empty", "huge", "cut", "other type", "swapped"])
def test_value_that_was_tampered_with_is_requested_again(server, host, redis_server, kind):
    first, second = host(), host()
    runs = first.reading().all_training_runs()
    first.reading().all_sessions()
    database = redis_server.client()
    found = values(redis_server)
    for name, value in found.items():
        database.delete(name)
        match kind:
            case "garbage":
                database.set(name, bytes(reversed(value)))
            case "huge":
                database.set(name, bytes(20 << 20))
            case "cut":
                database.set(name, value[:-1])
            case "other type":
                database.rpush(name, value)
            case "swapped":
                database.set(name, next(each for other, each in found.items() if other != name))
            case "empty":
                database.set(name, b"")
    assert second.reading().all_training_runs() == runs
    assert server.journal.count(RUNS) == 2
    assert bool(second.count("rejections")) == (kind not in ("empty", "other type"))
    assert second.is_up


def test_record_is_used_only_within_its_authentic_life(server, host, redis_server):
    client = host()
    client.reading().all_training_runs()
    ((name, value),) = values(redis_server).items()
    seal = RecordSeal(server.api_key, server.base_url)
    record = seal.unseal(value, name.decode())
    assert record.life_ms == 30_000
    for changes in (
        {"requested_us": record.requested_us - 31_000_000},
        {"requested_us": record.requested_us + 60_000_000},
        {"life_ms": 0},
        {"generation": b"another"},
    ):
        before = server.journal.count(RUNS)
        replayed = seal.seal(replace(record, **changes), name.decode())
        redis_server.client().set(name, replayed)
        client.reading().all_training_runs()
        assert server.journal.count(RUNS) == before + 1


def test_response_that_is_not_understood_is_requested_again(server, host, redis_server):
    client = host()
    runs = client.reading().all_training_runs()
    ((name, value),) = values(redis_server).items()
    seal = RecordSeal(server.api_key, server.base_url)
    record = seal.unseal(value, name.decode())
    odd = replace(record, outcome=Response(200, {}, b"[]", ""))
    redis_server.client().set(name, seal.seal(odd, name.decode()))
    assert client.reading().all_training_runs() == runs
    assert client.count("rejections") > 0


def test_seal_of_another_account_server_or_name_opens_nothing():
    response = Response(200, {"expires": "x", "x-secret": "y"}, b"body", "http://host/")
    record = SharedRecord(b"g", 1, 2, "i", response)
    seal = RecordSeal("key", "http://host")
    value = seal.seal(record, "name")
    assert seal.unseal(value, "name").outcome.body == b"body"
    assert seal.unseal(value, "name").outcome.headers == {"expires": "x"}
    for other, name in (
        (seal, "other"),
        (RecordSeal("key2", "http://host"), "name"),
        (RecordSeal("key", "http://host2"), "name"),
    ):
        with pytest.raises(InvalidRecordError):
            other.unseal(value, name)
    assert seal.name("v", "a", "bc") != seal.name("v", "ab", "c")


def test_forged_message_is_ignored(server, host, redis_server):
    client = host()
    (channel,) = redis_server.client().pubsub_channels()
    redis_server.client().publish(channel, b"delete everything")
    wait_until(lambda: client.count("rejections") == 1)
    assert client.changes == []
    assert client.is_up


# --- outages -------------------------------------------------------------------------------------


def test_outage_is_reported_once_and_ends(server, host, redis_server, expect_warnings):
    expect_warnings("shared cache .* failed")
    first, second = host(), host()
    first.reading().all_training_runs()
    redis_server.kill()
    for _ in range(3):
        second.reading().all_training_runs()
    wait_until(lambda: not second.is_up)
    second.reading().all_training_runs()
    assert len(second.errors()) == 1
    redis_server.start()
    wait_until(lambda: first.is_up and second.is_up)
    before = server.journal.count(RUNS)
    first.reading().all_training_runs()
    second.reading().all_training_runs()
    assert server.journal.count(RUNS) == before + 1
    assert len(second.errors()) == 1


def test_server_that_hangs_delays_no_later_request(
    server, host, redis_server, monkeypatch, expect_warnings
):
    expect_warnings("shared cache .* failed")
    monkeypatch.setattr(shared_cache, "SERVER_TIMEOUT_S", 1.0)
    client = host()
    redis_server.send_signal(signal.SIGSTOP)
    client.reading().all_training_runs()
    assert not client.is_up
    for _ in range(3):
        client.reading().all_training_runs()
    assert client.count("failures") <= 1
    redis_server.send_signal(signal.SIGCONT)
    wait_until(lambda: client.is_up)
    assert len(client.errors()) == 1


@pytest.mark.expect_warnings("shared cache .* failed")
@pytest.mark.parametrize(
    ("options", "url", "message"),
    [
        (["--requirepass", "right"], "", "Authentication required"),
        (["--requirepass", "right"], ":wrong@", "invalid username-password"),
        (["--maxmemory", "1"], "", "OOM|maxmemory"),
        (["--replicaof", "127.0.0.1 1", "--replica-read-only", "yes"], "", "READONLY|read only"),
        (["--user", "default", "on", "nopass", "~*", "&*", "+@pubsub"], "", "permission"),
    ],
)
def test_server_that_refuses_is_reported_in_one_line(server, host, options, url, message):
    with RedisProcess(*options) as process:
        client = host(url=process.url.replace("unix://", f"unix://{url}"))
        client.reading().all_training_runs()
        wait_until(lambda: client.errors())
        client.reading().all_training_runs()
        assert re.search(message, client.errors()[0])
        assert len(client.errors()) == 1
        assert "wrong" not in client.errors()[0]
    assert server.journal.count(RUNS) == 2


@pytest.mark.expect_warnings("shared cache .* failed")
def test_server_of_another_protocol_is_reported_in_one_line(server, host):
    port = server.base_url.rpartition(":")[2].partition("/")[0]
    for url in (f"redis://127.0.0.1:{port}", f"rediss://127.0.0.1:{port}", "redis://127.0.0.1:1"):
        client = host(url=url)
        client.reading().all_training_runs()
        wait_until(lambda made=client: made.errors())
        assert len(client.errors()) == 1
    assert server.journal.count(RUNS) == 3


def test_tls_server_is_verified(server, host, monkeypatch, expect_warnings):
    certificate = str(ROOT / "tests" / "support" / "localhost.pem")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    options += ["--tls-cert-file", certificate, "--tls-key-file", certificate]
    with RedisProcess(*options):
        expect_warnings("certificate verify failed", "Connection refused|closed")
        refused = host(url=f"rediss://localhost:{port}")
        wait_until(lambda: refused.errors())
        monkeypatch.setenv("SSL_CERT_FILE", certificate)
        client = host(url=f"rediss://localhost:{port}")
        wait_until(lambda: client.is_up)
        client.reading().all_training_runs()
        assert client.count("misses") == 1
