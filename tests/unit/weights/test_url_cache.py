"""Archives whose response the server holds while it builds."""

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
from tinkerfs.telemetry import Telemetry
from tinkerfs.weights.url_cache import SignedUrlCache

ARCHIVE = "GET archive"
TIMEOUT_S = 0.2


@pytest.fixture
def server():
    with HostileServer(runs=1, checkpoints=9) as server:
        yield server


@pytest.fixture
def telemetry():
    return Telemetry()


@pytest.fixture
def ask(server, tmp_path, telemetry):
    """Return the archive URL of the n-th checkpoint; the client's own time-out is short."""
    with ExitStack() as stack:
        made = {}

        def url(number, archive_timeout_s=60.0, outage_timeout_s=60.0, **options):
            if not made:
                credentials = Credentials(server.environment, home=str(tmp_path))
                client = stack.enter_context(
                    Client(
                        server.base_url,
                        credentials,
                        telemetry,
                        timeout_s=TIMEOUT_S,
                        backoff_s=0.1,
                    )
                )
                made[0] = SignedUrlCache(
                    client,
                    telemetry,
                    SYSTEM_CLOCK,
                    timeout_s=archive_timeout_s,
                    outage_timeout_s=outage_timeout_s,
                    burst=0,
                    **options,
                )
            made[0].forget()  # every URL has expired
            (run,) = server.account.runs()
            have_archives = [c.id for c in run.checkpoints if not c.id.startswith("external")]
            checkpoint = have_archives[number]
            ref = CheckpointRef(run.id, checkpoint, checkpoint, exists=True)
            return made[0].url(number, ref, f"/{checkpoint}", BACKGROUND_CONTEXT).url

        yield url


def builds(seconds):
    """What a server does that responds once the archive is built."""
    return (lambda handler: handler.pause(seconds), genuine())


def test_archive_that_is_held_is_waited_for_once(server, ask):
    server.on(ARCHIVE, *builds(4 * TIMEOUT_S), times=None)
    with ThreadPoolExecutor() as pool:
        urls = list(pool.map(ask, range(5)))
    assert all(url.startswith(server.store_url) for url in urls)
    assert server.journal.count(ARCHIVE) == 5


def test_archive_that_trickles_is_waited_for_once(server, ask):
    server.on(ARCHIVE, genuine(lambda head, body: (drip(head, 0.02, 9), body)))
    assert ask(0).startswith(server.store_url)
    assert server.journal.count(ARCHIVE) == 1


def test_archives_held_for_good_leave_the_others_alone(server, ask):
    server.on(ARCHIVE, hold, times=4)
    for number in range(4):
        with pytest.raises((errors.RequestTimeout, TimeoutError)):
            ask(number, archive_timeout_s=2 * TIMEOUT_S)
    assert ask(5).startswith(server.store_url)
    server.journal.wait_until_idle()
    assert server.journal.count(ARCHIVE) == 5


def test_archive_held_after_not_ready_has_the_time_left(server, ask):
    server.on(ARCHIVE, response(425, b"", "Retry-After: 0"))
    server.on(ARCHIVE, *builds(4 * TIMEOUT_S))
    assert ask(0).startswith(server.store_url)
    assert server.journal.count(ARCHIVE) == 2


@pytest.mark.parametrize("steps", [(response(500),), (close,), (response(429),)])
def test_archive_that_fails_is_not_retried_for_its_whole_time(server, ask, steps):
    rule = server.on(ARCHIVE, *steps, times=None)
    with pytest.raises(errors.ApiError):
        ask(0)
    assert 1 < rule.applied < 6


def test_archive_cut_off_while_held_is_not_sent_again(server, ask):
    server.on(ARCHIVE, lambda handler: handler.pause(4 * TIMEOUT_S), close, times=None)
    with pytest.raises(errors.ConnectionFailed):
        ask(0)
    assert server.journal.count(ARCHIVE) == 1


# --- the API is unreachable ----------------------------------------------------------------------


def unreachable(telemetry):
    """How many archive requests met no server."""
    calls = telemetry.snapshot()["calls"]
    return sum(count.get("unreachable", 0) for name, count in calls.items() if "archive" in name)


@pytest.mark.parametrize("is_one_transfer", [False, True])
def test_blip_in_the_middle_of_a_transfer_is_waited_out(server, ask, telemetry, is_one_transfer):
    ask(0, is_one_transfer=is_one_transfer)
    server.stop_listening("api")
    number = 1 if is_one_transfer else 0
    with ThreadPoolExecutor() as pool:
        renewal = pool.submit(ask, number)
        wait_until(lambda: unreachable(telemetry) >= 3)  # 2 opened the breaker
        assert not renewal.done()
        server.resume_listening()
        assert renewal.result(20).startswith(server.store_url)


@pytest.mark.parametrize("is_one_transfer", [False, True])
def test_blip_before_a_transfer_fails_at_once(server, ask, telemetry, is_one_transfer):
    server.stop_listening("api")
    with pytest.raises(errors.ConnectionFailed):
        ask(0, is_one_transfer=is_one_transfer)
    assert 1 <= unreachable(telemetry) <= 2


def test_blip_at_a_first_look_fails_at_once(server, ask, telemetry):
    ask(0)
    server.stop_listening("api")
    with pytest.raises(errors.ConnectionFailed):
        ask(1)
    assert 1 <= unreachable(telemetry) <= 2


def test_outage_in_the_middle_of_a_transfer_ends(server, ask, telemetry):
    ask(0, outage_timeout_s=1.0)
    server.stop_listening("api")
    with pytest.raises(errors.ConnectionFailed):
        ask(0)
    assert unreachable(telemetry) > 2


def test_server_that_breaks_off_a_renewal_is_asked_again(server, ask):
    ask(0)
    server.on(ARCHIVE, close, times=7)
    assert ask(0).startswith(server.store_url)
