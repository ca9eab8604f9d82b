"""Tests of cache coherence: cached replies equal those of a new file system."""

import contextlib
import errno
import functools
import gc
import itertools
import stat
from posixpath import normpath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.clocks import FakeTime
from tests.support.drivers import opened
from tests.support.faulty_server import FaultyServer
from tests.unit.fuse.test_callbacks import Libfuse
from tinkerfs.catalog.listings import RunListing
from tinkerfs.context import RequestContext
from tinkerfs.vfs import directory_cache, generated_files, resolver
from tinkerfs.vfs.copy_tracker import COPIED_FILES, COPIED_LINKS, CopyTracker
from tinkerfs.vfs.filesystem import FileSystem

CTX = RequestContext(timeout_s=30.0)
RUNS = 2


@contextlib.contextmanager
def make_account(tmp_path, runs=RUNS, **settings):
    fake_time = FakeTime()
    with (
        FaultyServer(runs=runs, checkpoints=3, clock=fake_time.clock.now) as server,
        opened("process", server, tmp_path, time=fake_time, trash_s=86_400.0, **settings) as driver,
    ):
        yield Account(server, driver.filesystem, fake_time)


@pytest.fixture
def account(tmp_path):
    """A server with two runs, and a file system with a fake clock."""
    with make_account(tmp_path) as account:
        yield account


def unlink(filesystem, path):
    """Unlink as a process that has not copied a checkpoint; this one reads all."""
    filesystem.guard._copies = CopyTracker(filesystem._backend.clock)
    filesystem.unlink(path, CTX)


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
        """Walk the tree until a walk loads nothing and no refresh is running."""
        misses = None
        while misses != self.misses():
            misses = self.misses()
            snapshot(self.filesystem, checks=False)
            self.filesystem.wait_idle(CTX)

    def misses(self):
        return self.filesystem._backend.telemetry.counter_value("metadata_cache_misses")

    def new_filesystem(self):
        """Return a file system with the same backend and empty caches."""
        filesystem = FileSystem(self.filesystem._backend)
        filesystem.guard = self.filesystem.guard
        filesystem._resolver._guard = filesystem.guard
        return filesystem

    # The events of the property test below.

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
        value = b"0" if self.filesystem.open(path, 0, CTX).read(1, 0, CTX) == b"1" else b"1"
        self.filesystem.open(path, 1, CTX).write(value, CTX)

    def trash(self, index):
        backend = self.filesystem._backend
        run_id, checkpoint_id = self.checkpoint_id(index)
        kind, name = checkpoint_id.split("/")
        checkpoint = backend.catalog.checkpoint(run_id, kind, name, CTX)
        if checkpoint is not None:
            backend.mutations.remove(checkpoint, name, CTX)

    def restore(self, index):
        backend = self.filesystem._backend
        trashed = list(backend.catalog.trashed_checkpoints(CTX))
        backend.mutations.undelete(trashed[index % len(trashed)], "trash", CTX)

    def unlink(self, index):
        run_id, name = self.checkpoint_id(index)
        unlink(self.filesystem, f"/runs/{run_id}/checkpoints/{name}/tinker_path")

    def refresh(self, _index):
        self.filesystem.open("/.tinkerfs/refresh", 1, CTX).write(b"1", CTX)

    def checkpoint_id(self, index):
        return self.ids()[index % len(self.ids())]

    def ids(self):
        return [(run.id, c.id) for run in self.server.account.runs() for c in run.checkpoints]


def snapshot(filesystem, directory="/", *, checks=True):
    """Return the results of a tree walk by path: attributes, targets, content."""
    found = {}
    for entry in filesystem.listdir(directory, CTX):
        path = f"{directory.rstrip('/')}/{entry.name}"
        if entry.name in (".tinkerfs", ".content"):
            continue
        attr = filesystem.stat(path, CTX)
        if checks:
            assert entry.attr is None or entry.attr == attr, path
            assert (entry.ino, stat.S_IFMT(entry.mode)) == (attr.ino, stat.S_IFMT(attr.mode))
        found[path] = attr
        if stat.S_ISDIR(attr.mode):
            found |= snapshot(filesystem, path, checks=checks)
        elif stat.S_ISLNK(attr.mode):
            found[path, "target"] = filesystem.readlink(path, CTX)
        else:
            data = filesystem.open(path, 0, CTX).read(1 << 20, 0, CTX)
            assert not checks or len(data) == attr.size_bytes
            found[path, "data"] = data
    return found


class ReplyChecker:
    """Compares the replies to libfuse with those of a new file system.

    It checks every path that ever existed, and an absent name in each directory. It repeats all
    requests three times, so that most replies come from a cache.
    """

    def __init__(self, account):
        self.account = account
        self.cached = Libfuse(3, account.filesystem)
        self.paths = set()

    def check(self):
        for path, attr in snapshot(self.account.filesystem).items():
            if isinstance(path, str):
                self.paths.add(path)
                if stat.S_ISDIR(attr.mode):
                    self.paths.add(f"{path}/nothing")
        paths = [path.encode() for path in sorted(self.paths)]
        fresh = Libfuse(3, self.account.new_filesystem())
        expected = {path: replies(fresh, path) for path in paths}
        listings = {
            path: [(name, offset) for name, _status, offset, _plus in fresh.listed(path, 1000, 0)]
            for path in paths
            if stat.S_ISDIR(fresh.stat(path)[1].st_mode)
        }
        for _ in range(3):
            for path in paths:
                assert replies(self.cached, path) == expected[path], path
                if path in listings:
                    self.cached.operations.note_file_stat()
                    self.check_listing(path, listings[path], fresh)

    def check_listing(self, path, names, fresh):
        cached = self.cached.listed(path, 9, 1)
        assert [(name, offset) for name, _status, offset, _plus in cached] == names
        for name, status, _offset, plus in cached:
            if plus:
                assert bytes(status) == packed(fresh, b"%b/%b" % (path, name))[1], (path, name)


def replies(libfuse, path):
    return packed(libfuse, path), libfuse.target(path), data(libfuse, path)


def list_all(libfuse):
    """List every directory twice, so that all listings are cached."""
    for path, attr in snapshot(libfuse.filesystem).items():
        if is_directory(path, attr):
            for _ in range(2):
                libfuse.listed(path.encode(), 9, 1)


def data(libfuse, path):
    """Return the content; direct_io depends on its age, which another file system does not know."""
    content = libfuse.content(path)
    return content[0] if isinstance(content, tuple) else content


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
def test_caches_after_any_changes_equal_a_new_filesystem(tmp_path_factory, steps):
    with make_account(tmp_path_factory.mktemp("cache")) as account:
        account.settle()
        checker = ReplyChecker(account)
        checker.check()
        for step, argument in steps:
            # The checkpoint may have been deleted by an earlier step.
            with contextlib.suppress(FileNotFoundError, ZeroDivisionError):
                getattr(account, step)(argument)
            account.settle()
            assert snapshot(account.filesystem) == snapshot(account.new_filesystem())
            in_trash = snapshot(account.filesystem, "/.tinkerfs/trash")
            assert in_trash == snapshot(account.new_filesystem(), "/.tinkerfs/trash")
            checker.check()


#: Directories of which the first listing sends requests, or which show what others have requested.
VISITS = (
    *("/", "/runs", "/models", "/checkpoints", "/adapters", "/shared", "/sessions", "/samplers"),
    *("{run}", "{run}/checkpoints", "{run}/checkpoints/weights", "{checkpoint}", "{session}"),
    "{session}/samplers",
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(st.sampled_from(VISITS), max_size=8))
def test_caches_after_any_first_loads_equal_a_new_filesystem(tmp_path_factory, visits):
    with make_account(tmp_path_factory.mktemp("cache")) as account:
        (session_id,) = account.server.account.session_ids(0, 1)
        places = {
            "run": account.run,
            "checkpoint": account.checkpoint,
            "session": f"/sessions/{session_id}",
        }
        visited = set()
        for visit in visits:
            visited.add(visit.format(**places))
            for path in visited:
                for _ in range(2):  # the first listing sends requests, the second one is cached
                    children(account.filesystem, path)
            for path in visited:
                expected = children(account.new_filesystem(), path)
                assert children(account.filesystem, path) == expected, path


def children(filesystem, directory):
    """Return the attributes of the entries of a directory by name, and the targets of links."""
    found = {}
    for entry in filesystem.listdir(directory, CTX):
        path = f"{directory.rstrip('/')}/{entry.name}"
        if entry.name != ".tinkerfs":
            attr = filesystem.stat(path, CTX)
            is_link = stat.S_ISLNK(attr.mode)
            found[entry.name] = (attr, filesystem.readlink(path, CTX) if is_link else None)
    return found


def test_first_listing_of_a_run_keeps_cached_listings_of_others(tmp_path):
    with make_account(tmp_path, runs=50) as account:
        filesystem = account.filesystem
        filesystem.listdir("/runs", CTX)
        generation, cached = filesystem.generation, {}
        for run_id in account.server.account.run_ids:
            directory = f"/runs/{run_id}/checkpoints/weights"
            filesystem.listdir(directory, CTX)  # requests the listing
            cached[directory] = filesystem.listdir(directory, CTX)
        for directory, entries in cached.items():
            assert filesystem.listdir(directory, CTX) is entries
        assert filesystem.generation == generation


def test_unchanged_refresh_keeps_everything_derived(tmp_path):
    # With a TTL this short no listing is prefetched, so that each refresh has one waiter.
    with make_account(tmp_path, runs=50, ttl_s=5.0) as account:
        account.settle()
        filesystem, generation = account.filesystem, account.filesystem.generation
        cached = {path: filesystem.cached_directory(path) for path in directories(filesystem)}
        cached = {path: listing for path, listing in cached.items() if listing is not None}
        assert len(cached) > 6 * 50
        for _ in range(3):
            account.time.advance(31)
            account.server.journal.clear()
            with pytest.raises(FileNotFoundError):
                filesystem.stat("/runs/none", CTX)
            account.settle()
            assert len(account.server.journal.entries()) > 50
            for path, listing in cached.items():
                assert filesystem.cached_directory(path) is listing, path
            assert filesystem.generation == generation


def directories(filesystem):
    return [path for path, attr in snapshot(filesystem).items() if is_directory(path, attr)]


@pytest.mark.parametrize("is_listed", [False, True])
@pytest.mark.parametrize(
    ("change", "name", "query"),
    [
        ("delete", "checkpoints/weights/new", packed),
        ("delete", "checkpoints/weights/new/info.json", packed),
        ("delete", "checkpoints/weights/new/info.json", Libfuse.content),
        ("delete", "checkpoints/weights/new/files", Libfuse.target),
        ("save", "checkpoints/weights/new", packed),
        ("save", "checkpoints/weights/new/tinker_path", Libfuse.content),
        ("publish", "checkpoints/weights/new/published", Libfuse.content),
        ("publish", "checkpoints/weights/new/info.json", Libfuse.content),
        ("save another", "latest", Libfuse.target),
        ("begin", "../a-run:train:0", packed),
    ],
)
def test_reply_expires_with_the_responses_it_depends_on(account, change, name, query, is_listed):
    """No other file system sends requests, because these would reveal the change."""
    run_id, path = account.run.removeprefix("/runs/"), normpath(f"{account.run}/{name}").encode()
    save = functools.partial(account.server.account.add_checkpoint, run_id, time_s=account.time.now)
    if change != "save":
        save("weights/new")
    account.refresh(0)
    filesystem = account.new_filesystem()
    for _ in range(3):
        if is_listed:
            snapshot(filesystem)
        query(Libfuse(3, filesystem), path)
        account.time.advance(2.1)
    libfuse = Libfuse(3, filesystem)
    if is_listed:
        list_all(libfuse)
    before = query(libfuse, path)
    assert [query(libfuse, path) for _ in range(3)] == [before] * 3
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
    assert query(libfuse, path) != before


def test_negative_entry_expires_after_its_ttl(account):
    (session_id,) = account.server.account.session_ids(0, 1)
    path = f"/sessions/{session_id}/info.json".encode()
    account.filesystem.listdir("/sessions", CTX)
    libfuse = Libfuse(3, account.filesystem)
    absent = {"status": 404, "body": {"detail": "Session not found"}}
    fault = account.server.faults.add("GET sessions/{session}", times=None, **absent)
    for _ in range(3):
        assert packed(libfuse, path)[0] == -errno.ENOENT
        account.time.advance(1)
    fault.remove()
    account.time.advance(5)
    assert packed(libfuse, path)[0] == 0


def test_lookup_during_a_hide_is_not_cached(account, monkeypatch):
    path = f"{account.checkpoint}/tinker_path"
    account.filesystem.stat(path, CTX)
    libfuse = Libfuse(3, account.new_filesystem())
    is_visible = resolver.PathResolver._is_visible

    def hide_first(self, node, ctx):
        if node.spec.name == "tinker_path":
            libfuse.filesystem.guard._hide(node.parent.path, "tinker_path", ctx.caller().pgid)
        return is_visible(self, node, ctx)

    monkeypatch.setattr(resolver.PathResolver, "_is_visible", hide_first)
    assert packed(libfuse, path.encode())[0] == -errno.ENOENT
    monkeypatch.undo()
    libfuse.filesystem.guard._show()
    assert packed(libfuse, path.encode())[0] == 0


def test_hidden_files_are_visible_after_a_minute(account):
    account.filesystem.stat(f"{account.checkpoint}/info.json", CTX)
    unlink(account.filesystem, f"{account.checkpoint}/tinker_path")
    assert account.filesystem.guard.has_hidden_files
    account.time.advance(61)
    assert not account.filesystem.guard.has_hidden_files
    assert account.filesystem.stat(f"{account.checkpoint}/tinker_path", CTX).size_bytes


def test_caches_do_not_retain_superseded_listings(account):
    libfuse = Libfuse(3, account.filesystem)
    for number in range(10):
        account.server.account.add_run(f"superseded-{number}:train:0")
        account.time.advance(31)
        run = f"/runs/superseded-{number}:train:0"
        for path in (run, f"{run}/info.json"):
            account.filesystem.listdir("/runs", CTX)
            for query in (packed, Libfuse.content) * 3:
                query(libfuse, path.encode())
    gc.collect()
    # Other tests of this process have listings too.
    listings = [object_ for object_ in gc.get_objects() if isinstance(object_, RunListing)]
    assert len([each for each in listings if "superseded-0:train:0" in each.by_id]) == 1


def test_listdir_while_valid_returns_the_cached_entries(account):
    directory = f"{account.run}/checkpoints/weights"
    account.filesystem.listdir(directory, CTX)  # requests the listing
    cached = account.filesystem.listdir(directory, CTX)
    assert account.filesystem.listdir(directory, CTX) is cached
    account.time.advance(29)
    assert account.filesystem.listdir(directory, CTX) is cached
    account.time.advance(2)
    account.filesystem.listdir(directory, CTX)
    assert account.filesystem.listdir(directory, CTX) is cached, "the server returned the same"
    account.save(0)
    account.time.advance(31)
    assert len(account.filesystem.listdir(directory, CTX)) == len(cached) + 1


def test_cached_directory_expires_with_its_listing(account):
    directory = account.checkpoint
    account.settle()
    filesystem = account.new_filesystem()
    filesystem.stat(f"{directory}/info.json", CTX)
    assert filesystem.cached_directory(directory) is None, "no listing was requested"
    entries = filesystem.listdir(directory, CTX)
    assert filesystem.cached_directory(directory).entries is entries
    targets = {entry.name: entry.target for entry in entries if entry.target}
    assert set(targets) == {"archive_url", "archive.tar", "files", "tensors.json"}
    for name, target in targets.items():
        assert account.new_filesystem().readlink(f"{directory}/{name}", CTX) == target
    account.time.advance(31)
    assert filesystem.cached_directory(directory) is None
    account.settle()
    filesystem.listdir(directory, CTX)
    assert filesystem.cached_directory(directory) is not None
    unlink(filesystem, f"{directory}/tinker_path")
    assert filesystem.cached_directory(directory) is None, "a file is hidden"


def test_directory_cache_is_bounded_by_entries(account, monkeypatch):
    account.settle()
    paths = snapshot(account.filesystem).items()
    directories = [path for path, attr in paths if is_directory(path, attr)]
    monkeypatch.setattr(directory_cache, "_MAX_ENTRIES", 40)
    filesystem = account.new_filesystem()
    for directory in directories:
        filesystem.listdir(directory, CTX)
        cached = list(filter(None, map(filesystem.cached_directory, directories)))
        assert sum(len(each.entries) for each in cached) <= 40
    assert 0 < len(cached) < len(directories)


def test_directory_cache_drops_listings_of_old_generations(account):
    account.settle()
    list_all(Libfuse(3, account.filesystem))
    cached = account.filesystem._directories._directories._entries
    assert len(cached) > 10
    account.save(0)
    account.refresh(0)
    for _ in range(2):
        account.filesystem.listdir(account.run, CTX)
    assert set(cached) == {account.run}


def is_directory(path, attr):
    return isinstance(path, str) and stat.S_ISDIR(attr.mode)


def test_volatile_content_is_not_cached(account):
    for directory in ("/.tinkerfs", f"/.content/{'/'.join(account.run.split('/')[2:])}"):
        first = account.filesystem.listdir(directory, CTX)
        account.time.advance(1)
        second = account.filesystem.listdir(directory, CTX)
        assert first == () or second is not first
    stats = account.filesystem.open("/.tinkerfs/stats.json", 0, CTX).read(1 << 20, 0, CTX)
    account.time.advance(1)
    assert account.filesystem.open("/.tinkerfs/stats.json", 0, CTX).read(1 << 20, 0, CTX) != stats


def test_hidden_files_are_absent_from_cached_listings(account):
    directory = account.checkpoint
    account.filesystem.stat(f"{directory}/info.json", CTX)
    names = [entry.name for entry in account.filesystem.listdir(directory, CTX)]
    unlink(account.filesystem, f"{directory}/tinker_path")
    left = [entry.name for entry in account.filesystem.listdir(directory, CTX)]
    assert left == [name for name in names if name != "tinker_path"]
    account.time.advance(61)
    assert [entry.name for entry in account.filesystem.listdir(directory, CTX)] == names


def test_cached_directory_is_not_resolved_again(account, monkeypatch):
    directory = account.checkpoint
    for name in ("info.json", "published"):
        account.filesystem.stat(f"{directory}/{name}", CTX)
    found = []
    look_up = resolver.PathResolver._look_up_in
    monkeypatch.setattr(
        resolver.PathResolver, "_look_up_in", lambda *args: found.append(args) or look_up(*args)
    )
    for name in ("info.json", "published", "expires_at", "files"):
        account.filesystem.stat(f"{directory}/{name}", CTX)
    assert found == []
    account.time.advance(31)
    account.filesystem.stat(f"{directory}/published", CTX)
    assert found


def test_page_cache_is_used_after_kernel_attrs_expired(account):
    path = f"{account.checkpoint}/info.json"

    def is_direct():
        account.filesystem.stat(path, CTX)
        return account.filesystem.open(path, 0, CTX).direct_io

    is_direct()  # requests the content
    assert is_direct()
    account.time.advance(2.1)
    assert not is_direct()
    account.publish(0)
    assert is_direct(), "the kernel may have another size cached"
    account.time.advance(2.1)
    assert not is_direct()
    account.time.advance(31)
    is_direct()
    assert not is_direct(), "the server returned the same"
    assert account.filesystem.open(f"{account.run}/info.json", 0, CTX).keep_cache is False


def test_opens_of_settled_content_share_a_handle(account, monkeypatch):
    path, filesystem = f"{account.checkpoint}/tinker_path", account.filesystem
    first = filesystem.open(path, 0, CTX)
    assert filesystem.open(path, 0, CTX) is not first, "the kernel may have another size cached"
    account.time.advance(2.1)
    shared = filesystem.open(path, 0, CTX)
    resolved = []
    resolve = resolver.PathResolver.resolve
    monkeypatch.setattr(
        resolver.PathResolver,
        "resolve",
        lambda *args, **options: resolved.append(args) or resolve(*args, **options),
    )
    assert filesystem.open(path, 0, CTX) is shared
    assert not resolved
    account.refresh(0)
    filesystem.open(path, 0, CTX)
    assert resolved, "the checkpoint may have been deleted"


def test_shared_handle_of_hidden_file_is_not_returned(account):
    path, filesystem = f"{account.checkpoint}/tinker_path", account.filesystem
    filesystem.open(path, 0, CTX)
    account.time.advance(2.1)
    assert filesystem.open(path, 0, CTX) is filesystem.open(path, 0, CTX)
    unlink(filesystem, path)
    with pytest.raises(FileNotFoundError):
        filesystem.open(path, 0, CTX)


def test_open_of_shared_handle_counts_as_read_of_a_copy(account):
    directory, filesystem = account.checkpoint, account.filesystem
    paths = [f"{directory}/{name}" for name in COPIED_FILES]
    for seconds in (0, 2.1, 0):
        account.time.advance(seconds)
        filesystem.guard._copies = CopyTracker(filesystem._backend.clock)
        for path in paths:
            filesystem.open(path, 0, CTX)
    for name in COPIED_LINKS:
        filesystem.readlink(f"{directory}/{name}", CTX)
    with pytest.raises(PermissionError):
        filesystem.unlink(paths[0], CTX)


def test_page_cache_is_not_used_beyond_one_page(account):
    run = account.server.account.runs()[0]
    run.user_metadata = {"notes": "x" * 5000}
    account.refresh(0)
    path = f"/runs/{run.id}/info.json"
    for _ in range(3):
        account.filesystem.stat(path, CTX)
        account.time.advance(2.1)
    handle = account.filesystem.open(path, 0, CTX)
    assert len(handle.read(1 << 20, 0, CTX)) > 4096
    assert handle.direct_io


def test_cheap_content_is_not_cached_by_stat(account):
    account.settle()
    filesystem = account.new_filesystem()
    checkpoint = account.checkpoint
    filesystem.listdir(checkpoint, CTX)
    assert filesystem.stat(f"{checkpoint}/tinker_path", CTX).size_bytes > 0
    assert not filesystem._generated_files._files._entries
    filesystem.stat(f"{checkpoint}/info.json", CTX)
    with contextlib.closing(filesystem.open(f"{checkpoint}/tinker_path", 0, CTX)) as file:
        file.read(1, 0, CTX)
    cached = {path.rpartition("/")[2] for path in filesystem._generated_files._files._entries}
    assert cached == {"info.json", "tinker_path"}


def test_generated_file_cache_is_bounded_by_memory(account, monkeypatch):
    monkeypatch.setattr(generated_files, "_MAX_BYTES", 8000)
    filesystem = account.new_filesystem()
    cached = filesystem._generated_files._files._entries
    for _ in range(2):  # the first one loads the weights info
        for run_id, name in account.ids():
            for file in ("info.json", "tinker_path"):
                path = f"/runs/{run_id}/checkpoints/{name}/{file}"
                filesystem.open(path, 0, CTX).read(1, 0, CTX)
            assert 0 < sum(320 + len(entry.value.data) for entry in cached.values()) <= 8000
    assert len(cached) < 2 * len(account.ids())


def test_names_of_the_table_are_shared_objects(account):
    run_id = account.server.account.run_ids[0]
    entries = [
        account.filesystem.listdir(f"/runs/{run_id}/checkpoints/{name}", CTX)
        for _run_id, name in account.ids()
        if _run_id == run_id
    ]
    assert len(entries) == 3
    for other in entries[1:]:
        # Only a training checkpoint has `export`, the last entry.
        assert all(a.name is b.name for a, b in zip(entries[0], other, strict=False))
