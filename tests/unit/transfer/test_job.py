"""What all transfers share: resolution, retry of new versions, failures."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from tinkerfs import errors
from tinkerfs.errors import StartupError, TinkerfsError
from tinkerfs.telemetry import Telemetry
from tinkerfs.transfer import job as jobs
from tinkerfs.transfer.failure import Failure
from tinkerfs.transfer.job import TransferJob
from tinkerfs.transfer.progress import Item, TransferProgress
from tinkerfs.transfer.resolve import path_of, select_members


@dataclass(frozen=True)
class Checkpoint:
    tinker_path: str


@dataclass(frozen=True)
class Ref:
    checkpoint: Checkpoint
    version: str
    is_archive: bool = False
    member_path: str = ""

    @property
    def label(self):
        return self.checkpoint.tinker_path

    def files(self, weights):
        return weights


@dataclass
class Listing:
    members: tuple[str, ...]


class Weights:
    """Fake weights with one file per checkpoint."""

    def files(self, version, ctx):
        if version == "missing":
            raise errors.not_found("x")
        return Listing(("a",))

    @contextmanager
    def open(self, version, name, ctx):
        yield f"{version}/{name}"


class Job(TransferJob[str]):
    """Transfers every file, except for those with an error of their own."""

    def __init__(self, weights, **failing):
        super().__init__(None, weights, TransferProgress(Telemetry()))
        self.failing = failing
        self.passes = []

    def _transfer(self, checkpoints):
        self.passes.append([each.ref.version for each in checkpoints])
        for checkpoint in checkpoints:
            error = self.failing.get(checkpoint.ref.version)
            if error is None:
                self.results.append(checkpoint.ref.version)
            else:
                self._on_error(checkpoint.ref, Item(checkpoint.ref.version, 1, 0), error)


def ref(version):
    return Ref(Checkpoint(f"tinker://{version}"), version)


@pytest.fixture
def found(monkeypatch):
    """The references that a job finds."""
    refs = []
    monkeypatch.setattr(jobs, "find_weights", lambda *_: (refs, False))
    return refs


def test_job_retries_changed_checkpoint_once(found):
    found += [ref("new"), ref("old")]
    job = Job(Weights(), old=errors.stale("f", "changed"))
    job.run({})
    assert job.passes == [["new", "old"], ["old"]]
    assert job.results == ["new"]
    assert [failure.name for failure in job.failures] == ["old"]


def test_job_with_other_error_does_not_retry(found):
    found += [ref("bad"), ref("good")]
    job = Job(Weights(), bad=errors.corrupt("f", "cut"))
    job.run({})
    assert job.passes == [["bad", "good"]]
    assert (job.results, [failure.name for failure in job.failures]) == (["good"], ["bad"])


def test_job_reports_checkpoint_that_cannot_be_opened(found):
    found += [ref("missing"), ref("good")]
    job = Job(Weights())
    job.run({})
    assert job.results == ["good"]
    assert [failure.name for failure in job.failures] == ["tinker://missing"]


def test_failure_message_redacts_secret_and_appends_hint():
    error = TinkerfsError("lost https://s/x?sig=c0ffee&X-Amz-Signature=c0ffee")
    message = Failure("f", error, "again").message
    assert "c0ffee" not in message
    assert message.endswith(" (hint: again)")


def test_failure_message_of_bug_raises_it():
    with pytest.raises(ZeroDivisionError):
        assert Failure("f", ZeroDivisionError()).message


def test_progress_position_counts_received_bytes_before_blocks():
    telemetry = Telemetry()
    telemetry.count("bytes_received", 1000)
    progress = TransferProgress(telemetry)
    item = Item("f", 100, 20)
    progress.start([item, Item("g", 100, 0)])
    assert progress.position_bytes() == 20
    telemetry.count("bytes_received", 30)
    assert progress.position_bytes() == 50
    progress.advance(item, 80)
    assert progress.position_bytes() == 100
    telemetry.count("bytes_received", 1000)
    assert progress.position_bytes() == 200


@pytest.mark.parametrize(
    ("member_path", "selected"),
    [("", ["a", "d/b", "d/c"]), ("d", ["d/b", "d/c"]), ("d/b", ["d/b"])],
)
def test_select_members_returns_file_or_directory(member_path, selected):
    reference = Ref(Checkpoint("x"), "v", member_path=member_path)
    assert select_members(reference, Listing(("a", "d/b", "d/c"))) == selected


def test_select_members_without_match_is_enoent():
    with pytest.raises(FileNotFoundError):
        select_members(Ref(Checkpoint("x"), "v", member_path="d/x"), Listing(("d/xy",)))


def test_path_of_run_and_checkpoint():
    assert path_of("tinker://r:train:0") == "/runs/r:train:0"
    path = path_of("tinker://r:train:0/weights/0001")
    assert path == "/runs/r:train:0/checkpoints/weights/0001"
    with pytest.raises(StartupError):
        path_of("tinker://")
