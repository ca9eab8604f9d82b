"""Tests of weights that come from an export, because the server has no archives."""

import errno
import json

import pytest

from tests.unit.weights.conftest import subject_of, truth
from tinkerfs import errors
from tinkerfs.api import exports as api_exports
from tinkerfs.api.checkpoint_ids import CheckpointRef
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.demo.exports import ExportOptions
from tinkerfs.retry import Backoff
from tinkerfs.tinker_path import TinkerPath
from tinkerfs.weights.checkpoint_version import CheckpointVersion

MIB = 1 << 20
NAME = "adapter_model.safetensors"
ARCHIVE, URLS = "GET archive", "GET external_weights_urls"


@pytest.fixture(autouse=True)
def _quick_polls(monkeypatch):
    monkeypatch.setattr(api_exports, "POLL", Backoff(0.01, 0.05))


@pytest.fixture
def server(demo_server):
    return demo_server(
        runs=1, size_bytes=20 * MIB, profile="official-0.36", exports=ExportOptions()
    )


@pytest.fixture
def subject(server):
    return subject_of(server)


@pytest.fixture
def mount(server, weights_of):
    return weights_of(server, burst=8)


def export(mount, subject, recipients=()):
    path = f"{subject.path}/export"
    return mount.exports.export(subject, 3600, path, BACKGROUND_CONTEXT, recipients)


def delete_on_server(server, record):
    path = TinkerPath.parse(record.path)
    assert server.account.delete_checkpoint(path.run_id, f"{path.kind}/{path.name}")


def read(mount, subject, name=NAME, size=1 << 40, offset=0):
    with mount.weights.open(subject, name, BACKGROUND_CONTEXT) as file:
        return file.read(min(size, file.size_bytes), offset, BACKGROUND_CONTEXT)


def refusal_of(action):
    """Return the text of the OSError EOPNOTSUPP that an action raises."""
    with pytest.raises(OSError, match="hint: ") as caught:
        action()
    assert caught.value.errno == errno.EOPNOTSUPP
    return str(caught.value)


def test_export_provides_the_files_of_a_checkpoint(server, mount, weights_of, subject):
    export(mount, subject)
    server.journal.clear()
    listing = mount.weights.files(subject, BACKGROUND_CONTEXT)
    assert set(listing.members) == set(server.files(subject.ref.run_id, subject.ref.path_id))
    for name in listing.members:
        assert read(mount, subject, name) == truth(server, subject, name)
    assert json.loads(mount.weights.tensors(subject, BACKGROUND_CONTEXT))["tensors"]
    assert server.journal.count(ARCHIVE) == 1
    assert server.journal.count(URLS) == 1
    server.journal.clear()
    later = weights_of(server)
    assert later.weights.cached_files(subject) == listing
    assert read(later, subject) == truth(server, subject, NAME)
    assert server.journal.count() == 0


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("weights", ["`echo 1h > export`", "tinkerfs get --export", "training session", "minutes"]),
        (
            "sampler_weights",
            ["not provide a sampler checkpoint", "save a training checkpoint or external weights"],
        ),
    ],
)
def test_refusal_says_what_to_do(server, mount, kind, words):
    server.account.add_checkpoint(server.account.run_ids[0], f"{kind}/new")
    refused = subject_of(server, kind)
    for action in (
        lambda: mount.weights.files(refused, BACKGROUND_CONTEXT),
        lambda: mount.weights.open(refused, NAME, BACKGROUND_CONTEXT),
        lambda: mount.weights.tensors(refused, BACKGROUND_CONTEXT),
    ):
        text = refusal_of(action)
        assert "this server has no such endpoint (GET " in text
        assert all(word in text for word in words), text
    assert server.journal.endpoints() == {ARCHIVE: 3}


@pytest.mark.parametrize(("kind", "source"), [("weights", "export"), ("external_weights", "its")])
def test_url_of_the_archive_is_refused_for_separate_files(server, mount, kind, source):
    server.account.add_checkpoint(server.account.run_ids[0], f"{kind}/new")
    refused = subject_of(server, kind)
    text = refusal_of(lambda: mount.weights.archive_url(refused, BACKGROUND_CONTEXT))
    assert "separate files have no URL of an archive (hint: read archive.tar" in text
    assert source in text.partition("made of")[2]


def test_archives_are_preferred_to_exports(demo_server, weights_of):
    server = demo_server(runs=1, exports=ExportOptions())
    subject, mount = subject_of(server), weights_of(server)
    export(mount, subject)
    server.journal.clear()
    assert read(mount, subject) == truth(server, subject, NAME)
    assert server.journal.count(ARCHIVE) == 1
    assert server.journal.count(URLS) == 0


def test_missing_archives_are_requested_rarely(server, mount):
    run_id = server.account.run_ids[0]
    for number in range(50):
        server.account.add_checkpoint(run_id, f"weights/many-{number}")
        ref = CheckpointRef(run_id, f"weights/many-{number}", f"weights/many-{number}", exists=True)
        key = (run_id, "weights", f"many-{number}", 1.0)
        each = CheckpointVersion(server.base_url, key, ref, "/x", 0)
        refusal_of(lambda each=each: mount.weights.files(each, BACKGROUND_CONTEXT))
    assert server.journal.endpoints() == {ARCHIVE: 3}


def test_cached_blocks_outlive_the_export(server, mount, weights_of, subject):
    record = export(mount, subject)
    expected = truth(server, subject, NAME)
    assert read(mount, subject, size=4 * MIB) == expected[: 4 * MIB]
    delete_on_server(server, record)
    later = weights_of(server)
    assert read(later, subject, size=MIB) == expected[:MIB]
    with later.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        text = refusal_of(lambda: file.read(MIB, 19 * MIB, BACKGROUND_CONTEXT))
        assert "has no export any more" in text
        assert "`echo 1h > export`" in text
        assert later.exports.describe(subject) == "none"
        assert file.read(MIB, 0, BACKGROUND_CONTEXT) == expected[:MIB]
    # The files of another export have other versions, so they are opened again.
    export(later, subject)
    with later.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert file.read(MIB, 19 * MIB, BACKGROUND_CONTEXT) == expected[19 * MIB :][:MIB]


def test_new_export_invalidates_the_index(server, mount, weights_of, subject):
    server.behaviour.exports.encrypt = lambda data, _recipients: b"age" + data
    record = export(mount, subject)
    assert NAME in mount.weights.files(subject, BACKGROUND_CONTEXT).members
    delete_on_server(server, record)
    mount.exports.forget(subject)
    export(mount, subject, recipients=["age1x"])
    assert NAME not in mount.weights.files(subject, BACKGROUND_CONTEXT).members
    name = f"{NAME}.age"
    assert read(mount, subject, name) == b"age" + truth(server, subject, NAME)
    with pytest.raises(FileNotFoundError):
        read(weights_of(server), subject)


def test_expired_urls_of_an_export_are_requested_again(server, mount, subject):
    export(mount, subject)
    expected = truth(server, subject, NAME)
    with mount.weights.open(subject, NAME, BACKGROUND_CONTEXT) as file:
        assert file.read(MIB, 0, BACKGROUND_CONTEXT) == expected[:MIB]
        mount.weights.drop_urls()
        server.journal.clear()
        assert file.read(MIB, 19 * MIB, BACKGROUND_CONTEXT) == expected[19 * MIB :][:MIB]
    assert server.journal.count(URLS) == 1


def test_failed_request_for_urls_does_not_forget_the_export(server, mount, subject):
    export(mount, subject)
    rule = server.faults.add(URLS, times=None, status=403, body={"detail": "not now"})
    with pytest.raises(errors.Unauthorized, match="not now"):
        mount.weights.files(subject, BACKGROUND_CONTEXT)
    rule.remove()
    assert mount.weights.files(subject, BACKGROUND_CONTEXT).members
