"""What is kept of former looks is what would be found anew, and is found at once."""

import contextlib
import errno
import functools
import gc
import itertools
import stat
import time
from posixpath import normpath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.clocks import FakeTime
from tests.support.drivers import opened
from tests.unit.fuse.test_callbacks import Libfuse
from tinkerfs.catalog.listings import RunListing
from tinkerfs.context import RequestContext
from tinkerfs.demo.server import DemoServer
from tinkerfs.vfs import directory_cache as listings_module
from tinkerfs.vfs import generated_files as renderings_module
from tinkerfs.vfs import resolver as nodes_module
from tinkerfs.vfs.copy_tracker import CopyTracker
from tinkerfs.vfs.filesystem import FileSystem

CALL = RequestContext(timeout_s=30.0)
RUNS = 2


@contextlib.contextmanager
def made(folder):
    hands = FakeTime()
    with (
        DemoServer(runs=RUNS, checkpoints=3, clock=hands.clock.now) as server,
        opened("process", server, folder, time=hands, trash_s=86_400.0) as driver,
    ):
        yield Account(server, driver.filesystem, hands)


@pytest.fixture
def account(tmp_path):
    """A server of two runs and a file system over it, whose clock the test turns."""
    with made(tmp_path) as account:
        yield account


def unlink(filesystem, path):
    """Unlink as a process that has copied nothing: this one reads all there is, and follows."""
    filesystem.guard._copies = CopyTracker(filesystem._model.clock)
    filesystem.unlink(path, CALL)


class Account:
    def __init__(self, server, filesystem, time):
        self.server, self.filesystem, self.time = server, filesystem, time
        self.names = itertools.count()

    @property
    def run(self):
        return f"/runs/{self.server.account.run_ids[0]}"

    @property
    def checkpoint(self):
        run_id, name = self.checkpoint_id(0)
        return f"/runs/{run_id}/checkpoints/{name}"

    def settle(self):
        """Look at everything until nothing is refreshed behind it any more."""
        catalogue = self.filesystem._model.catalogue
        epoch = None
        while epoch != catalogue.epoch:
            epoch = catalogue.epoch
            told(self.filesystem, checks=False)
            while catalogue._cache._flights:
                time.sleep(0.001)

    def anew(self):
        """A file system over the same model that has looked at nothing yet."""
        filesystem = FileSystem(self.filesystem._model, self.filesystem._cache_dir)
        filesystem.guard = self.filesystem.guard
        filesystem._nodes._removals = filesystem.guard.removals
        return filesystem

    # What may happen; each is a rule of the property below.

    def wait(self, seconds):
        self.time.advance(seconds)

    def save(self, index):
        run_id = self.server.account.run_ids[index % RUNS]
        name = f"weights/new-{next(self.names)}"
        self.server.account.add_checkpoint(run_id, name, time_s=self.time.now)

    def delete_elsewhere(self, index):
        self.server.account.delete_checkpoint(*self.checkpoint_id(index))

    def publish(self, index):
        run_id, name = self.checkpoint_id(index)
        path = f"/runs/{run_id}/checkpoints/{name}/published"
        value = b"0" if self.filesystem.open(path, 0, CALL).read(1, 0, CALL) == b"1" else b"1"
        self.filesystem.open(path, 1, CALL).write(value, CALL)

    def trash(self, index):
        model = self.filesystem._model
        run_id, (kind, name) = (each := self.checkpoint_id(index))[0], each[1].split("/")
        seen = model.catalogue.checkpoint(run_id, kind, name, CALL)
        if seen is not None:
            model.mutations.remove(seen, name, CALL)

    def restore(self, index):
        model = self.filesystem._model
        trashed = list(model.trash.checkpoints(CALL))
        model.mutations.undelete(trashed[index % len(trashed)], "trash", CALL)

    def unlink(self, index):
        run_id, name = self.checkpoint_id(index)
        unlink(self.filesystem, f"/runs/{run_id}/checkpoints/{name}/tinker_path")

    def refresh(self, _index):
        self.filesystem.open("/.tinkerfs/refresh", 1, CALL).write(b"1", CALL)

    def checkpoint_id(self, index):
        return self.ids()[index % len(self.ids())]

    def ids(self):
        return [(run.id, c.id) for run in self.server.account.runs() for c in run.checkpoints]


def told(filesystem, folder="/", *, checks=True):
    """Everything that a walk is told, by path: attributes, targets, the bytes of small files."""
    found = {}
    for entry in filesystem.listdir(folder, CALL):
        path = f"{folder.rstrip('/')}/{entry.name}"
        if entry.name in (".tinkerfs", ".content"):
            continue
        attr = filesystem.stat(path, CALL)
        if checks:
            assert entry.attr is None or entry.attr == attr, path
            assert (entry.ino, stat.S_IFMT(entry.mode)) == (attr.ino, stat.S_IFMT(attr.mode))
        found[path] = attr
        if stat.S_ISDIR(attr.mode):
            found |= told(filesystem, path, checks=checks)
        elif stat.S_ISLNK(attr.mode):
            found[path, "target"] = filesystem.readlink(path, CALL)
        else:
            data = filesystem.open(path, 0, CALL).read(1 << 20, 0, CALL)
            assert not checks or len(data) == attr.size_bytes
            found[path, "data"] = data
    return found


class Answers:
    """What libfuse is answered about every path that ever was, and one in each folder that is not.

    Each is asked about three times, and each folder is listed as often, so that most of what is
    told was kept before.
    """

    def __init__(self, account):
        self.account = account
        self.kept = Libfuse(3, account.filesystem)
        self.paths = set()

    def check(self):
        found = {path for path in told(self.account.filesystem) if isinstance(path, str)}
        self.paths |= {name for path in found for name in (path, f"{path}/nothing")}
        for _ in range(3):
            anew, beside = Libfuse(3, self.account.anew()), Libfuse(3, self.account.filesystem)
            for path in map(str.encode, sorted(self.paths)):
                for ask in (packed, Libfuse.target):
                    assert ask(self.kept, path) == ask(anew, path), path
                # Whether they pass the kernel's cache by is a matter of when they were made.
                assert Libfuse.bytes(self.kept, path) == Libfuse.bytes(beside, path), path
                if stat.S_ISDIR(anew.stat(path)[1].st_mode):
                    self.kept.operations.note_file_stat()
                    self.check_listing(path, anew)

    def check_listing(self, path, anew):
        kept = self.kept.listed(path, 9, 1)
        names = [(name, offset) for name, _status, offset, _plus in kept]
        assert names == [(name, at) for name, _status, at, _plus in anew.listed(path, 1000, 0)]
        for name, status, _offset, plus in kept:
            if plus:
                assert bytes(status) == packed(anew, b"%b/%b" % (path, name))[1], (path, name)


def list_all(libfuse):
    """List every folder, twice: so what they hold is known."""
    for path, attr in told(libfuse.filesystem).items():
        if is_folder(path, attr):
            for _ in range(2):
                libfuse.listed(path.encode(), 9, 1)


def packed(libfuse, path):
    status, attributes = libfuse.stat(path)
    return status, bytes(attributes)


STEPS = st.one_of(
    st.tuples(st.just("wait"), st.sampled_from([0.5, 2.0, 29.0, 31.0, 61.0, 700.0])),
    st.tuples(
        st.sampled_from(
            ["save", "delete_elsewhere", "publish", "trash", "restore", "unlink", "refresh"]
        ),
        st.integers(0, 20),
    ),
)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(STEPS, max_size=6))
def test_what_is_kept_is_what_would_be_found_anew(tmp_path_factory, steps):
    with made(tmp_path_factory.mktemp("kept")) as account:
        account.settle()
        answers = Answers(account)
        answers.check()
        for step, argument in steps:
            # A checkpoint may be gone by now.
            with contextlib.suppress(FileNotFoundError, ZeroDivisionError):
                getattr(account, step)(argument)
            account.settle()
            assert told(account.filesystem) == told(account.anew())
            in_trash = told(account.filesystem, "/.tinkerfs/trash")
            assert in_trash == told(account.anew(), "/.tinkerfs/trash")
            answers.check()


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize(
    ("change", "name", "ask"),
    [
        ("delete", "checkpoints/weights/new", packed),
        ("delete", "checkpoints/weights/new/info.json", packed),
        ("delete", "checkpoints/weights/new/files", Libfuse.target),
        ("save", "checkpoints/weights/new", packed),
        ("save", "checkpoints/weights/new/tinker_path", Libfuse.bytes),
        ("publish", "checkpoints/weights/new/published", Libfuse.bytes),
        ("publish", "checkpoints/weights/new/info.json", Libfuse.bytes),
        ("save another", "latest", Libfuse.target),
        ("begin", "../a-run:train:0", packed),
    ],
)
def test_an_answer_ends_with_what_it_rests_on(account, change, name, ask, is_listed):
    """With nobody else who looks: else a change is seen by any of those who do."""
    run_id, path = account.run.removeprefix("/runs/"), normpath(f"{account.run}/{name}").encode()
    save = functools.partial(account.server.account.add_checkpoint, run_id, time_s=account.time.now)
    if change != "save":
        save("weights/new")
    account.refresh(0)
    filesystem = account.anew()
    for _ in range(3):
        if is_listed:
            told(filesystem)
        ask(Libfuse(3, filesystem), path)
        account.time.advance(2.1)
    libfuse = Libfuse(3, filesystem)
    if is_listed:
        list_all(libfuse)
    before = ask(libfuse, path)
    assert [ask(libfuse, path) for _ in range(3)] == [before] * 3
    match change:
        case "delete":
            account.server.account.delete_checkpoint(run_id, "weights/new")
        case "publish":
            account.server.account.find(run_id, "weights/new")[1].is_public = True
        case "begin":
            account.server.account.add_run(name.removeprefix("../"))
        case _:
            save("weights/newer" if change == "save another" else "weights/new")
    account.time.advance(31)
    assert ask(libfuse, path) != before


def test_absence_that_is_remembered_holds_as_long_and_no_longer(account):
    (session_id,) = account.server.account.session_ids(0, 1)
    path = f"/sessions/{session_id}/info.json".encode()
    account.filesystem.listdir("/sessions", CALL)
    libfuse = Libfuse(3, account.filesystem)
    absent = {"status": 404, "body": {"detail": "Session not found"}}
    fault = account.server.faults.add("GET sessions/{session}", times=None, **absent)
    for _ in range(3):
        assert packed(libfuse, path)[0] == -errno.ENOENT
        account.time.advance(1)
    fault.remove()
    account.time.advance(5)
    assert packed(libfuse, path)[0] == 0


def test_what_was_hidden_is_there_again_for_who_looked_meanwhile(account, monkeypatch):
    path = f"{account.checkpoint}/tinker_path"
    account.filesystem.stat(path, CALL)
    libfuse = Libfuse(3, account.anew())
    packed(libfuse, path.encode())
    look = nodes_module.PathResolver._is_visible

    def hide_first(nodes, node, call):
        if node.row.name == "tinker_path":
            libfuse.filesystem.guard.removals.hide(
                node.parent.path, "tinker_path", call.caller().pgid
            )
        return look(nodes, node, call)

    monkeypatch.setattr(nodes_module.PathResolver, "_is_visible", hide_first)
    assert packed(libfuse, path.encode())[0] == -errno.ENOENT
    monkeypatch.undo()
    for key in list(libfuse.filesystem.guard.removals._tombstones):
        libfuse.filesystem.guard.removals.restore(key)
    assert packed(libfuse, path.encode())[0] == 0


def test_what_was_hidden_once_costs_other_paths_nothing_later(account):
    account.filesystem.stat(f"{account.checkpoint}/info.json", CALL)
    unlink(account.filesystem, f"{account.checkpoint}/tinker_path")
    assert account.filesystem.guard.removals.has_tombstones
    account.time.advance(61)
    assert not account.filesystem.guard.removals.has_tombstones
    assert account.filesystem.stat(f"{account.checkpoint}/tinker_path", CALL).size_bytes


def test_what_is_kept_keeps_no_listing_that_was_superseded(account):
    libfuse = Libfuse(3, account.filesystem)
    for number in range(10):
        account.server.account.add_run(f"run-{number}:train:0")
        account.time.advance(31)
        for path in (f"/runs/run-{number}:train:0", f"/runs/run-{number}:train:0/info.json"):
            account.filesystem.listdir("/runs", CALL)
            for ask in (packed, Libfuse.bytes) * 3:
                ask(libfuse, path.encode())
    gc.collect()
    listings = [each for each in gc.get_objects() if isinstance(each, RunListing)]
    assert len(listings) <= 2, "that of now, and what is kept for the next mount"


def test_a_listing_is_made_once_while_it_holds(account):
    folder = f"{account.run}/checkpoints/weights"
    account.filesystem.listdir(folder, CALL)  # which asked for it
    kept = account.filesystem.listdir(folder, CALL)
    assert account.filesystem.listdir(folder, CALL) is kept
    account.time.advance(29)
    assert account.filesystem.listdir(folder, CALL) is kept
    account.time.advance(2)
    account.filesystem.listdir(folder, CALL)
    assert account.filesystem.listdir(folder, CALL) is kept, "the server told the same"
    account.save(0)
    account.time.advance(31)
    assert len(account.filesystem.listdir(folder, CALL)) == len(kept) + 1


def test_what_is_known_of_a_folder_ends_with_what_it_rests_on(account):
    folder = account.checkpoint
    account.settle()
    filesystem = account.anew()
    filesystem.stat(f"{folder}/info.json", CALL)
    assert filesystem.cached_directory(folder) is None, "nobody has listed it"
    entries = filesystem.listdir(folder, CALL)
    assert filesystem.cached_directory(folder).entries is entries
    targets = {entry.name: entry.target for entry in entries if entry.target}
    assert set(targets) == {"archive_url", "archive.tar", "files", "tensors.json"}
    for name, target in targets.items():
        assert account.anew().readlink(f"{folder}/{name}", CALL) == target
    account.time.advance(31)
    assert filesystem.cached_directory(folder) is None
    account.settle()
    filesystem.listdir(folder, CALL)
    assert filesystem.cached_directory(folder) is not None
    unlink(filesystem, f"{folder}/tinker_path")
    assert filesystem.cached_directory(folder) is None, "something is hidden"


def test_a_listing_that_takes_anothers_place_counts_once(account, monkeypatch):
    filesystem = account.anew()
    account.settle()
    folders = [path for path, attr in told(filesystem).items() if is_folder(path, attr)]
    listings = filesystem._listings
    for number in range(4):
        account.save(number)
        account.refresh(0)
        account.settle()
        for folder in folders:
            filesystem.listdir(folder, CALL)
    assert listings._kept_entries == sum(len(each.entries) for each in listings._kept.values())
    monkeypatch.setattr(listings_module, "_MAX_ENTRIES", 40)
    before = set(listings._kept)
    fresh = account.anew()
    for folder in folders:
        fresh.listdir(folder, CALL)
        kept = fresh._listings
        assert kept._kept_entries == sum(len(each.entries) for each in kept._kept.values()) <= 40
    assert set(kept._kept) < before, "that was too much at a time"


def test_listings_that_hold_no_more_are_let_go_of(account):
    account.settle()
    list_all(Libfuse(3, account.filesystem))
    kept = account.filesystem._listings._kept
    assert len(kept) > 10
    account.save(0)
    account.refresh(0)
    for _ in range(2):
        account.filesystem.listdir(account.run, CALL)
    assert set(kept) == {account.run}


def is_folder(path, attr):
    return isinstance(path, str) and stat.S_ISDIR(attr.mode)


def test_what_changes_at_every_look_is_not_kept(account):
    for folder in ("/.tinkerfs", f"/.content/{'/'.join(account.run.split('/')[2:])}"):
        first = account.filesystem.listdir(folder, CALL)
        account.time.advance(1)
        second = account.filesystem.listdir(folder, CALL)
        assert first == () or second is not first
    stats = account.filesystem.open("/.tinkerfs/stats.json", 0, CALL).read(1 << 20, 0, CALL)
    account.time.advance(1)
    assert account.filesystem.open("/.tinkerfs/stats.json", 0, CALL).read(1 << 20, 0, CALL) != stats


def test_what_is_hidden_is_hidden_in_kept_listings_too(account):
    folder = account.checkpoint
    account.filesystem.stat(f"{folder}/info.json", CALL)
    names = [entry.name for entry in account.filesystem.listdir(folder, CALL)]
    unlink(account.filesystem, f"{folder}/tinker_path")
    left = [entry.name for entry in account.filesystem.listdir(folder, CALL)]
    assert left == [name for name in names if name != "tinker_path"]
    account.time.advance(61)
    assert [entry.name for entry in account.filesystem.listdir(folder, CALL)] == names


def test_a_known_folder_is_not_resolved_again(account, monkeypatch):
    folder = account.checkpoint
    for name in ("info.json", "published"):
        account.filesystem.stat(f"{folder}/{name}", CALL)
    found = []
    find = nodes_module.PathResolver._find
    monkeypatch.setattr(
        nodes_module.PathResolver, "_find", lambda *args: found.append(args) or find(*args)
    )
    for name in ("info.json", "published", "expires_at", "files"):
        account.filesystem.stat(f"{folder}/{name}", CALL)
    assert found == []
    account.time.advance(31)
    account.filesystem.stat(f"{folder}/published", CALL)
    assert found


def test_the_kernel_keeps_bytes_only_once_it_has_forgotten_the_length_of_others(account):
    path = f"{account.checkpoint}/info.json"

    def is_direct():
        account.filesystem.stat(path, CALL)
        return account.filesystem.open(path, 0, CALL).direct_io

    is_direct()  # asks for it
    assert is_direct()
    account.time.advance(2.1)
    assert not is_direct()
    account.publish(0)
    assert is_direct(), "its length may be another for a second"
    account.time.advance(2.1)
    assert not is_direct()
    account.time.advance(31)
    is_direct()
    assert not is_direct(), "the server told the same"
    assert account.filesystem.open(f"{account.run}/info.json", 0, CALL).keep_cache is False


def test_more_than_a_page_is_never_kept_by_the_kernel(account):
    run = account.server.account.runs()[0]
    run.user_metadata = {"notes": "x" * 5000}
    account.refresh(0)
    path = f"/runs/{run.id}/info.json"
    for _ in range(3):
        account.filesystem.stat(path, CALL)
        account.time.advance(2.1)
    handle = account.filesystem.open(path, 0, CALL)
    assert len(handle.read(1 << 20, 0, CALL)) > 4096
    assert handle.direct_io


def test_bytes_are_not_kept_for_a_length_that_costs_nothing_to_tell_again(account):
    account.settle()
    filesystem = account.anew()
    checkpoint = account.checkpoint
    filesystem.listdir(checkpoint, CALL)
    assert filesystem.stat(f"{checkpoint}/tinker_path", CALL).size_bytes > 0
    assert not filesystem._renderings._kept
    filesystem.stat(f"{checkpoint}/info.json", CALL)
    with contextlib.closing(filesystem.open(f"{checkpoint}/tinker_path", 0, CALL)) as file:
        file.read(1, 0, CALL)
    kept = {path.rpartition("/")[2] for path in filesystem._renderings._kept}
    assert kept == {"info.json", "tinker_path"}


def test_renderings_are_bounded_by_what_they_take_with_their_paths(account, monkeypatch):
    monkeypatch.setattr(renderings_module, "_MAX_BYTES", 2000)
    filesystem = account.anew()
    for run_id, name in account.ids():
        for _ in range(2):  # the first makes its weights info known
            filesystem.stat(f"/runs/{run_id}/checkpoints/{name}/info.json", CALL)
        assert len(filesystem._renderings._kept) <= 3


def test_names_of_the_table_are_kept_once(account):
    run_id = account.server.account.run_ids[0]
    entries = [
        account.filesystem.listdir(f"/runs/{run_id}/checkpoints/{name}", CALL)
        for _run_id, name in account.ids()
        if _run_id == run_id
    ]
    assert len(entries) == 3
    for other in entries[1:]:
        assert all(a.name is b.name for a, b in zip(entries[0], other, strict=True))
