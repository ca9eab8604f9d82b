"""Exchange of the API key for tokens, on a server that requires it and on others."""

import logging
import time as real_time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.clocks import FakeTime
from tests.unit.api.test_credentials import jwt
from tinkerfs import errors
from tinkerfs.api.jwt import expiry_of

RUNS = "GET training_runs"
CONFIG = "POST client/config"
TOKEN = "POST auth/token"


@pytest.fixture
def time():
    return FakeTime()


@pytest.fixture
def exchanging(demo_server, time):
    """A server that accepts API keys only in exchange for tokens."""
    return demo_server(requires_token=True, clock=lambda: time.now)


@pytest.fixture
def exchanging_client(exchanging, client_of, time):
    return client_of(exchanging, clock=time.clock)


def requests(server):
    return [(entry.endpoint, entry.status) for entry in server.journal.entries()]


def sent(server):
    return [entry.api_key for entry in server.journal.entries(RUNS) if entry.status == 200]


def test_accepted_key_is_not_exchanged(server, client):
    client.list_training_runs()
    assert requests(server) == [(RUNS, 200)]


def test_required_token_is_fetched_once(exchanging, exchanging_client):
    for _ in range(3):
        exchanging_client.list_training_runs()
    assert requests(exchanging) == [(RUNS, 401), (CONFIG, 200), (TOKEN, 200), *[(RUNS, 200)] * 3]
    (token,) = set(sent(exchanging))
    assert token.startswith("eyJ")
    keys = {entry.api_key for entry in exchanging.journal.entries(TOKEN)}
    assert keys == {exchanging.api_key}


def test_command_output_is_only_exchanged(exchanging, client_of, time):
    command = {"TINKER_CREDENTIAL_CMD": f"echo {exchanging.api_key}"}
    client = client_of(exchanging, environ=command, clock=time.clock)
    client.list_training_runs()
    exchanging.journal.clear()
    client.list_training_runs()
    client.list_sessions()
    assert exchanging.api_key not in {e.api_key for e in exchanging.journal.entries()}


def test_concurrent_requests_share_one_exchange(exchanging, exchanging_client):
    exchanging.latency_s = 0.05
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _n: exchanging_client.list_training_runs(), range(8)))
    assert exchanging.journal.count(CONFIG) == 1
    assert exchanging.journal.count(TOKEN) == 1
    assert len(set(sent(exchanging))) == 1


def test_token_is_renewed_after_half_its_life(exchanging, exchanging_client, time):
    exchanging_client.list_training_runs()
    time.advance(1799)
    exchanging_client.list_training_runs()
    assert exchanging.journal.count(TOKEN) == 1
    time.advance(2)
    exchanging_client.list_training_runs()  # does not wait for the renewal
    deadline = real_time.monotonic() + 10
    while exchanging.journal.count(TOKEN) < 2 and real_time.monotonic() < deadline:
        real_time.sleep(0.01)
    exchanging.journal.wait_until_idle()
    for _ in range(100):
        exchanging_client.list_training_runs()
        if len(set(sent(exchanging))) == 2:
            break
    assert len(set(sent(exchanging))) == 2
    assert exchanging.journal.count(TOKEN) == 2


def test_failed_renewal_keeps_the_valid_token(exchanging, exchanging_client, time):
    exchanging_client.list_training_runs()
    exchanging.faults.add(TOKEN, status=403, times=None)
    time.advance(1801)
    for _ in range(5):
        exchanging_client.list_training_runs()
        exchanging.journal.wait_until_idle()
    assert exchanging.journal.count(TOKEN) == 2
    time.advance(1800)
    with pytest.raises(errors.Unauthorized):
        exchanging_client.list_training_runs()


def test_rejected_token_is_replaced_once(exchanging, exchanging_client):
    exchanging_client.list_training_runs()
    invalid = {"error": "invalid_token"}
    exchanging.faults.add(RUNS, status=401, body=invalid)
    exchanging_client.list_training_runs()
    assert exchanging.journal.count(TOKEN) == 2
    exchanging.journal.clear()
    exchanging.faults.add(RUNS, status=401, body=invalid, times=None)
    for _ in range(3):
        with pytest.raises(errors.Unauthorized):
            exchanging_client.list_training_runs()
    assert requests(exchanging) == [(RUNS, 401), (TOKEN, 200), (RUNS, 401)]


def test_rejected_key_is_exchanged_again_after_rotation(exchanging, client_of, time, tmp_path):
    key = tmp_path / "key"
    key.write_text("tml-old")
    exchanging.behaviour.api_keys.add("tml-old")
    environ = {"TINKER_CREDENTIAL_CMD": f"cat {key}"}
    client = client_of(exchanging, environ=environ, clock=time.clock)
    client.list_training_runs()
    exchanging.behaviour.api_keys.remove("tml-old")
    key.write_text(exchanging.api_key)
    time.advance(3601)
    client.list_training_runs()
    assert [e.api_key for e in exchanging.journal.entries(TOKEN)][-2:] == [
        "tml-old",
        exchanging.api_key,
    ]


def test_wrong_key_asks_for_the_configuration_rarely(server, client_of):
    time = FakeTime()
    client = client_of(server, key="tml-wrong", clock=time.clock)
    for _ in range(10):
        with pytest.raises(errors.Unauthorized):
            client.list_training_runs()
        time.advance(50)
    assert server.journal.count(CONFIG) == 1


def test_server_without_exchange_gets_the_key_again(exchanging, exchanging_client, time):
    exchanging_client.list_training_runs()
    exchanging.behaviour.requires_token = False
    exchanging.faults.add(TOKEN, status=404, times=None)
    time.advance(3601)
    exchanging_client.list_training_runs()
    assert sent(exchanging)[-1] == exchanging.api_key


@pytest.mark.parametrize("body", [{}, {"jwt": 1}, {"jwt": "a b"}, {"jwt": "a\nb"}, {"jwt": ""}])
def test_invalid_token_response_raises_protocol_error(exchanging, exchanging_client, body):
    exchanging.faults.add(TOKEN, status=200, body=body, times=None)
    with pytest.raises(errors.ProtocolError):
        exchanging_client.list_training_runs()


def test_token_is_neither_logged_nor_in_errors(exchanging, exchanging_client, caplog):
    caplog.set_level(logging.DEBUG)
    exchanging_client.list_training_runs()
    (token,) = set(sent(exchanging))
    exchanging.faults.add(RUNS, status=400, body={"detail": f"no {token}"})
    with pytest.raises(errors.BadRequest) as caught:
        exchanging_client.list_training_runs()
    assert token not in str(caught.value)
    assert token not in caplog.text


def test_expiry_of_reads_the_claim():
    assert expiry_of(jwt(1.5e9)) == 1.5e9
    assert expiry_of("tml-key") is None
    assert expiry_of("eyJ.e30.x") is None
