"""Whatever network and store do: the right bytes or an error, in bounded time; no wrong byte."""

import random
import threading
import time

import pytest

from tests.unit.weights.conftest import subject_of, truth
from tinkerfs import errors
from tinkerfs.call import IN_PROCESS

MIB = 1 << 20
NAME = "adapter_model.safetensors"
TIMEOUT_S = 0.3

pytestmark = pytest.mark.expect_warnings(r"telemetry")


def lie_about_range(server, **effects):
    """Answers to ranges that say they are of another part."""
    wrong = {"Content-Range": "bytes 7-4194310/25166336"}
    server.faults.add("store", headers=wrong, **effects)


def other_etag(server, **effects):
    server.faults.add("store", headers={"ETag": '"another"'}, **effects)


def revoke(server, **effects):
    server.signer.revoke_all()


def redirect(url):
    return lambda server, **effects: server.faults.add("store", redirect_to=url, **effects)


def redirect_to_itself(server, **effects):
    """A redirect to another name of the host, without a signature."""
    other = server.store_url.replace("127.0.0.1", "localhost")
    server.faults.add("store", redirect_to=f"{other}/archives/x", **effects)


def rule(**effects):
    return lambda server, **more: server.faults.add("store", **effects, **more)


#: What goes wrong, and what becomes of it when it happens once: "right", or "any".
FAULTS = {
    "no answer": (rule(refuse=True), "right"),
    "reset": (rule(reset=True), "right"),
    "cut at once": (rule(cut_after_bytes=0), "right"),
    "cut in the middle": (rule(cut_after_bytes=1_000_001), "right"),
    "stall before the body": (rule(stall_after_bytes=0), "right"),
    "stall in the middle": (rule(stall_after_bytes=1_000_001), "right"),
    "hang": (rule(hang=True), "right"),
    "1 byte a second": (rule(bytes_per_s=20), "right"),
    "403": (rule(status=403), "right"),
    "403 of a URL that was good": (revoke, "right"),
    "401": (rule(status=401), "right"),
    "400": (rule(status=400), "right"),
    "404": (rule(status=404), "right"),
    "410": (rule(status=410), "right"),
    "500": (rule(status=500), "right"),
    "503 with Retry-After": (rule(status=503, headers={"Retry-After": "0"}), "right"),
    "503 with a long Retry-After": (rule(status=503, headers={"Retry-After": "3600"}), "any"),
    "429": (rule(status=429), "right"),
    "an HTML page": (rule(html=True, status=200), "any"),
    "204": (rule(status=204), "any"),
    "304": (rule(status=304), "any"),
    "another Content-Range": (lie_about_range, "right"),
    "no Content-Range": (rule(headers={"Content-Range": None}), "right"),
    "nonsense in Content-Range": (rule(headers={"Content-Range": "bytes 0-1"}), "right"),
    "a larger length": (rule(headers={"Content-Length": "4194999"}), "right"),
    "a smaller length": (rule(headers={"Content-Length": "999"}), "right"),
    "200 for a range": (rule(ignore_range=True), "right"),
    "200 for a range, cut": (rule(ignore_range=True, cut_after_bytes=9_000_001), "right"),
    "416": (rule(status=416), "right"),
    "416 with another length": (
        rule(status=416, headers={"Content-Range": "bytes */5"}),
        "any",
    ),
    "gzip on identity": (rule(headers={"Content-Encoding": "gzip"}), "right"),
    "no ETag": (rule(headers={"ETag": None}), "right"),
    "another ETag": (other_etag, "any"),
    "redirect to http of another host": (redirect_to_itself, "right"),
    "redirect to a file": (redirect("file:///etc/passwd"), "any"),
    "redirect to nowhere": (redirect("http://127.0.0.1:1/"), "right"),
    "redirect to a name that is none": (redirect("http://nothing.invalid/"), "right"),
    "redirect to TLS that is none": (
        lambda server, **more: redirect(server.store_url.replace("http:", "https:"))(
            server, **more
        ),
        "right",
    ),
    "redirect round in circles": (
        lambda server, **more: redirect(f"{server.store_url}/archives/x")(server, **more),
        "right",
    ),
}


def sequential(file):
    data, at = bytearray(), 0
    while piece := file.read(128 * 1024, at, IN_PROCESS):
        data += piece
        at += len(piece)
    return [(0, bytes(data))]


def scattered(file):
    """4 threads that read anywhere, each as far as it comes."""
    found, failures = [], []

    def run(seed):
        rng = random.Random(seed)
        try:
            for _ in range(8):
                at = rng.randrange(file.size_bytes)
                found.append((at, file.read(200_000, at, IN_PROCESS)))
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
    """Return what came of it, and its failure."""
    try:
        return work(), None
    except (errors.ApiError, OSError) as error:
        return None, error


def check(found, expected):
    for at, data in found:
        assert data == expected[at : at + len(data)]
    assert found


@pytest.mark.parametrize(("read", "times"), [(sequential, 1), (scattered, 1), (sequential, None)])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_gives_the_right_bytes_or_an_error(fault, times, read, demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=9 * MIB)
    subject = subject_of(server)
    expected = truth(server, subject, NAME)
    mount = weights_of(server, timeout_s=TIMEOUT_S)
    spoil, outcome = FAULTS[fault]
    with mount.weights.open(subject, NAME, IN_PROCESS) as file:
        spoil(server, times=times)
        began = time.monotonic()
        found, error = attempt(lambda: read(file))
        if error is None:
            check(found, expected)
        else:
            assert outcome == "any" or times is None, error
            assert "X-Signature" not in str(error)
        assert time.monotonic() - began < 20 * TIMEOUT_S
    server.faults.clear()
    with mount.weights.open(subject, NAME, IN_PROCESS) as file:
        check(sequential(file), expected)
    assert "X-Signature" not in mount.telemetry.errors_text()


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("times", [1, None])
def test_a_fault_of_the_index_is_told_or_made_good(fault, times, demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=MIB)
    subject = subject_of(server)
    mount = weights_of(server, timeout_s=TIMEOUT_S)
    FAULTS[fault][0](server, times=times)
    began = time.monotonic()
    listing, error = attempt(lambda: mount.weights.files(subject, IN_PROCESS))
    if error is not None:
        assert "X-Signature" not in str(error)
    else:
        sizes = {name: member.size_bytes for name, member in listing.members.items()}
        true = server.files(subject.ref.run_id, subject.ref.path_id)
        assert sizes == {name: content.size_bytes for name, content in true.items()}
    assert time.monotonic() - began < 20 * TIMEOUT_S
    server.faults.clear()
    with mount.weights.open(subject, NAME, IN_PROCESS) as file:
        check(sequential(file), truth(server, subject, NAME))
