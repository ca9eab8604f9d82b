import os
import threading

from tinkerfs.context import Caller
from tinkerfs.fuse import callers as callers_module
from tinkerfs.fuse.callers import Callers


def test_caller_of_thread_has_process_and_group():
    found = []
    thread = threading.Thread(
        target=lambda: found.append(Callers().get(threading.get_native_id(), os.getuid()))
    )
    thread.start()
    thread.join()
    (caller,) = found
    assert caller.pid != os.getpid()
    assert caller == Caller(caller.pid, os.getuid(), os.getpgrp(), os.getpid())


def test_callers_of_other_pid_namespace_share_group_per_user():
    groups = {uid: Caller.from_ids(0, uid).pgid for uid in (0, 1000, 1001)}
    assert len(set(groups.values())) == 3
    assert all(group < 0 for group in groups.values())
    assert Caller.from_ids(0, 1000) == Caller.from_ids(0, 1000)
    gone = 2**22 + 1  # above any process id of Linux (proc(5), PID_MAX_LIMIT)
    assert Caller.from_ids(gone, 1000).pgid == groups[1000]


def test_callers_are_cached_for_one_second(monkeypatch):
    now, lookups = [0.0], []
    monkeypatch.setattr(
        Caller, "from_ids", lambda pid, uid: lookups.append((pid, uid)) or Caller(pid, uid, 5)
    )
    callers = Callers(lambda: now[0])
    assert callers.get(9, 0) is callers.get(9, 0)
    callers.get(9, 1000)
    callers.get(8, 1000)
    assert lookups == [(9, 0), (9, 1000), (8, 1000)]
    now[0] = 1.0
    callers.get(8, 1000)
    assert lookups[3:] == [(8, 1000)]


def test_callers_cache_is_bounded(monkeypatch):
    monkeypatch.setattr(callers_module, "_MAX_CALLERS", 10)
    callers = Callers()
    for pid in range(1, 40):
        callers.get(pid, 0)
        assert len(callers._callers) <= 10
