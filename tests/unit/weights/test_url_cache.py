"""Archive builds, and servers that hold the response while they build."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.support.hostile import HostileServer, close, drip, genuine, hold, response
from tests.support.mount import wait_until
from tinkerfs import errors
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.api.client import Client
from tinkerfs.api.credentials import Credentials
from tinkerfs.clock import SYSTEM_CLOCK
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.retry import Backoff
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.url_cache import SignedUrlCache

ARCHIVE = "GET archive"
#: Longer than a busy machine pauses.
TIMEOUT_S = 1.0


@pytest.fixture
def server():
    with HostileServer(runs=1, checkpoints=9) as server:
        yield server


@pytest.fixture
def telemetry():
    return Telemetry()


@pytest.fixture
def get_url(server, tmp_path, telemetry):
    """Return a function for the archive URL of the n-th checkpoint; its client times out soon."""
    with ExitStack() as stack:
        caches = {}

        def url(number, archive_timeout_s=60.0, outage_timeout_s=60.0, **options):
            if not caches:
                credentials = Credentials(server.environment, home=str(tmp_path))
                client = stack.enter_context(
                    Client(
                        server.base_url,
                        credentials,
                        telemetry,
                        timeout_s=TIMEOUT_S,
                        backoff=Backoff(0.1, 2.0),
                    )
                )
                caches[0] = SignedUrlCache(
                    client,
                    telemetry,
                    SYSTEM_CLOCK,
                    timeout_s=archive_timeout_s,
                    outage_timeout_s=outage_timeout_s,
                    burst=0,
                    **options,
                )
            caches[0].clear()  # as if every URL had expired
            (run,) = server.account.runs()
            have_archives = [c.id for c in run.checkpoints if not c.id.startswith("external")]
            checkpoint = have_archives[number]
            ref = CheckpointRef(run.id, checkpoint, checkpoint, exists=True)
            return caches[0].url(number, ref, f"/{checkpoint}", BACKGROUND_CONTEXT).url

        yield url


def builds(seconds):
    """Return the steps of a server that responds once the archive is built."""
    return (lambda handler: handler.pause(seconds), genuine())


def test_archive_response_held_by_the_server_is_awaited(server, get_url):
    server.on(ARCHIVE, *builds(2 * TIMEOUT_S), times=None)
    with ThreadPoolExecutor() as pool:
        urls = list(pool.map(get_url, range(5)))
    assert all(url.startswith(server.store_url) for url in urls)
    assert server.journal.count(ARCHIVE) == 5


def test_archive_response_that_trickles_is_awaited(server, get_url):
    server.on(ARCHIVE, genuine(lambda head, body: (drip(head, 0.02, 9), body)))
    assert get_url(0).startswith(server.store_url)
    assert server.journal.count(ARCHIVE) == 1


def test_archives_held_forever_do_not_block_others(server, get_url):
    server.on(ARCHIVE, hold, times=4)
    for number in range(4):
        with pytest.raises((errors.RequestTimeout, TimeoutError)):
            get_url(number, archive_timeout_s=TIMEOUT_S)
    assert get_url(5).startswith(server.store_url)
    server.journal.wait_until_idle()
    assert server.journal.count(ARCHIVE) == 5


def test_archive_held_after_not_ready_has_the_remaining_time(server, get_url):
    server.on(ARCHIVE, response(425, b"", "Retry-After: 0"))
    server.on(ARCHIVE, *builds(2 * TIMEOUT_S))
    assert get_url(0).startswith(server.store_url)
    assert server.journal.count(ARCHIVE) == 2


@pytest.mark.parametrize("steps", [(response(500),), (close,), (response(429),)])
def test_archive_that_fails_is_not_retried_for_its_whole_time(server, get_url, steps):
    rule = server.on(ARCHIVE, *steps, times=None)
    with pytest.raises(errors.ApiError):
        get_url(0)
    assert 1 < rule.applied < 6


def test_archive_cut_off_while_held_is_not_sent_again(server, get_url):
    server.on(ARCHIVE, lambda handler: handler.pause(2 * TIMEOUT_S), close, times=None)
    with pytest.raises(errors.ConnectionFailed):
        get_url(0)
    assert server.journal.count(ARCHIVE) == 1


# --- the API is unreachable ----------------------------------------------------------------------


def unreachable(telemetry):
    """Return how many archive requests failed to connect."""
    calls = telemetry.snapshot()["api_requests"]
    return sum(count.get("unreachable", 0) for name, count in calls.items() if "archive" in name)


@pytest.mark.parametrize("is_one_transfer", [False, True])
def test_outage_during_a_transfer_is_waited_out(server, get_url, telemetry, is_one_transfer):
    get_url(0, is_one_transfer=is_one_transfer)
    server.stop_listening("api")
    number = 1 if is_one_transfer else 0
    with ThreadPoolExecutor() as pool:
        renewal = pool.submit(get_url, number)
        wait_until(lambda: unreachable(telemetry) >= 3)  # the second one opened the circuit breaker
        assert not renewal.done()
        server.resume_listening()
        assert renewal.result(20).startswith(server.store_url)


@pytest.mark.parametrize("is_one_transfer", [False, True])
def test_outage_before_a_transfer_fails_at_once(server, get_url, telemetry, is_one_transfer):
    server.stop_listening("api")
    with pytest.raises(errors.ConnectionFailed):
        get_url(0, is_one_transfer=is_one_transfer)
    assert 1 <= unreachable(telemetry) <= 2


def test_outage_at_the_first_request_fails_at_once(server, get_url, telemetry):
    get_url(0)
    server.stop_listening("api")
    with pytest.raises(errors.ConnectionFailed):
        get_url(1)
    assert 1 <= unreachable(telemetry) <= 2


def test_long_outage_during_a_transfer_is_an_error(server, get_url, telemetry):
    get_url(0, outage_timeout_s=2.0)
    server.stop_listening("api")
    with pytest.raises(errors.ConnectionFailed):
        get_url(0)
    assert unreachable(telemetry) > 2


def test_renewal_that_breaks_off_is_retried(server, get_url):
    get_url(0)
    server.on(ARCHIVE, close, times=7)
    assert get_url(0).startswith(server.store_url)
