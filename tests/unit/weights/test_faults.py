"""Faults of network and store: correct bytes or an error, in bounded time."""

import random
import threading
import time

import pytest

from tests.support.store_faults import FAULTS
from tests.unit.weights.conftest import subject_of, truth
from tinkerfs import errors
from tinkerfs.context import BACKGROUND_CONTEXT

MIB = 1 << 20
NAME = "adapter_model.safetensors"
#: Longer than a busy machine pauses, because a fault that occurs once must not become an error.
TIMEOUT_S = 1.0

pytestmark = pytest.mark.expect_warnings(r"telemetry")


def sequential(file):
    data, offset = bytearray(), 0
    while chunk := file.read(128 * 1024, offset, BACKGROUND_CONTEXT):
        data += chunk
        offset += len(chunk)
    return [(0, bytes(data))]


def scattered(file):
    """Read at random offsets from 4 threads."""
    found, failures = [], []

    def run(seed):
        rng = random.Random(seed)
        try:
            for _ in range(8):
                offset = rng.randrange(file.size_bytes)
                found.append((offset, file.read(200_000, offset, BACKGROUND_CONTEXT)))
        except (errors.ApiError, OSError) as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return found


def attempt(work):
    """Return the result of a function, or its error; the other one of the pair is empty."""
    try:
        return work(), None
    except (errors.ApiError, OSError) as error:
        return None, error


def check(found, expected):
    for offset, data in found:
        assert data == expected[offset : offset + len(data)]
    assert found


@pytest.mark.parametrize(("read", "times"), [(sequential, 1), (scattered, 1), (sequential, None)])
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_gives_the_right_bytes_or_an_error(fault, times, read, demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=9 * MIB)
    subject = subject_of(server)
    expected = truth(server, subject, NAME)
    mount = weights_of(server, timeout_s=TIMEOUT_S)
    inject, outcome = FAULTS[fault]
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        inject(server, times=times)
        began = time.monotonic()
        found, error = attempt(lambda: read(file))
        if error is None:
            check(found, expected)
        else:
            assert outcome == "any" or times is None, error
            assert "X-Signature" not in str(error)
        assert time.monotonic() - began < 10 * TIMEOUT_S
    server.faults.clear()
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        check(sequential(file), expected)
    assert "X-Signature" not in mount.telemetry.errors.text().decode()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("times", [1, None])
def test_fault_during_indexing_gives_an_error_or_the_right_list(
    fault, times, demo_server, weights_of
):
    server = demo_server(runs=1, size_bytes=MIB)
    subject = subject_of(server)
    mount = weights_of(server, timeout_s=TIMEOUT_S)
    FAULTS[fault][0](server, times=times)
    began = time.monotonic()
    listing, error = attempt(lambda: mount.weights.files(subject, BACKGROUND_CONTEXT))
    if error is not None:
        assert "X-Signature" not in str(error)
    else:
        sizes = {name: member.size_bytes for name, member in listing.members.items()}
        true = server.files(subject.ref.run_id, subject.ref.path_id)
        assert sizes == {name: content.size_bytes for name, content in true.items()}
    assert time.monotonic() - began < 10 * TIMEOUT_S
    server.faults.clear()
    expected = truth(server, subject, NAME)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        found, error = attempt(lambda: sequential(file))
    if error is None:
        check(found, expected)
        return
    assert "ETag" in fault, "an ETag that appears means another version"
    assert errors.is_stale(error)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        check(sequential(file), expected)
