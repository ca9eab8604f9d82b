"""Freshness on real mounts, with the system clock and the kernel's caches of one second."""

import ctypes
import mmap
import os
import time

from tests.support.account import account, api_calls, every_binding, make_account

__all__ = ["account", "make_account"]

#: Time until names and attributes expire in the kernel.
KERNEL_EXPIRY_S = 1.1

RUN_CHECKPOINTS = "GET training_runs/{run}/checkpoints"


@every_binding
def test_server_change_is_visible_after_ttl_and_a_second(make_account):
    account = make_account(runs=1, checkpoints=1, settings={"ttl_s": 0.5})
    run = account.server.account.runs()[0]
    flag = account.path(f"runs/{run.id}/checkpoints/weights/0001/published")
    before = flag.read_text()
    run.checkpoints[0].is_public = not run.checkpoints[0].is_public
    account.server.account.add_checkpoint(run.id, "weights/new")
    started = time.monotonic()
    assert account.eventually(lambda: flag.read_text() != before)
    assert account.eventually((flag.parent.parent / "new").is_dir)
    assert account.eventually(
        lambda: os.readlink(account.path(f"runs/{run.id}/latest")).endswith("weights/new")
    )
    assert time.monotonic() - started < 3.0


def test_value_cached_before_a_suspend_is_reloaded(make_account, tmp_path):
    slept_s, later = tmp_path / "slept", tmp_path / "later"
    slept_s.write_text("0")
    later.write_text("7200")
    settings = {"ttl_s": 3600, "clock_offset_file": str(slept_s)}
    account = make_account(runs=1, checkpoints=1, settings=settings)
    run = account.server.account.runs()[0]
    flag = account.path(f"runs/{run.id}/checkpoints/weights/0001/published")
    before = flag.read_text()
    run.checkpoints[0].is_public = not run.checkpoints[0].is_public
    assert flag.read_text() == before
    later.rename(slept_s)
    assert account.eventually(lambda: flag.read_text() != before)


def test_repeated_reads_within_ttl_send_no_request(account):
    run = account.server.account.run_ids[0]
    account.refresh()
    account.server.journal.clear()
    for _ in range(3):
        assert account.sh(f"ls runs; ls -R runs/{run}; cat runs/{run}/info.json").returncode == 0
    assert api_calls(account.server) == {"GET training_runs": 1, RUN_CHECKPOINTS: 1}


def test_refresh_shows_changes_at_once(account):
    run = account.new_run("weights/1")
    assert account.sh(f"ls {run}/checkpoints/weights").stdout == "1\n"
    account.server.account.add_checkpoint(run.partition("/")[2], "weights/2")
    done = account.sh(
        f"ls {run}/checkpoints/weights; echo > .tinkerfs/refresh; ls {run}/checkpoints/weights;"
        f" readlink {run}/latest"
    )
    assert done.stdout.split()[:3] == ["1", "1", "2"]
    assert account.eventually(
        lambda: account.sh(f"readlink {run}/latest").stdout == "checkpoints/weights/2\n"
    )


def test_new_name_is_visible_at_once(account):
    account.sh("ls runs")
    assert account.sh("ls -d runs/not-yet").returncode != 0
    account.server.account.add_run("not-yet")
    account.refresh()
    assert account.sh("ls -d runs/not-yet").returncode == 0


def test_local_change_is_visible_everywhere_at_once(account):
    run = account.new_run("weights/1", "weights/2")
    done = account.sh(
        f"""ls -lR {run} > /dev/null
        echo 1 > {run}/checkpoints/weights/2/published
        cat {run}/latest/published {run}/checkpoints/weights/2/published
        grep -c '"public": true' {run}/latest/info.json {run}/info.json
        rm -r {run}/checkpoints/weights/2
        ls {run}/checkpoints/weights
        grep -c weights/2 {run}/info.json
        """
    )
    lines = done.stdout.splitlines()
    assert lines[:2] == ["1", "1"]
    assert [line[-1] for line in lines[2:4]] == ["1", "1"]
    assert lines[4:] == ["1", "0"], done


@every_binding
def test_change_keeps_cached_pages_of_weights(account):
    run = account.new_run("weights/1", "weights/2")
    (file,) = account.path(run).glob("checkpoints/weights/1/files/*.safetensors")
    content = file.read_bytes()
    assert are_pages_cached(file)
    assert account.sh(f"rm -r {run}/checkpoints/weights/2").returncode == 0
    account.server.account.add_checkpoint(run.partition("/")[2], "weights/3")
    account.refresh()
    time.sleep(KERNEL_EXPIRY_S)
    assert account.sh(f"ls {run}/checkpoints/weights").stdout.split() == ["1", "3"]
    assert are_pages_cached(file)
    assert file.read_bytes() == content


def are_pages_cached(file):
    """Return whether every page of a file is in the kernel's page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE) as mapped,
    ):
        is_cached = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = (ctypes.c_char * len(mapped)).from_buffer(mapped)
        size = ctypes.c_size_t(len(mapped))
        result = libc.mincore(ctypes.byref(start), size, is_cached)
        del start  # otherwise the mapping cannot be closed
    assert result == 0, os.strerror(ctypes.get_errno())
    return all(page & 1 for page in is_cached)


@every_binding
def test_change_keeps_mounts_below(account, needs_root):
    run = account.new_run("weights/1", "weights/2")
    directory = f"{run}/checkpoints/weights/1"
    done = account.sh(
        f"""mount --bind /usr {directory}
        rm -r {run}/checkpoints/weights/2
        echo > .tinkerfs/refresh
        sleep {KERNEL_EXPIRY_S}
        ls {run}/checkpoints/weights
        mountpoint {directory}
        """,
        shell=("unshare", "-m", "bash", "-c"),
    )
    assert done.stdout.splitlines() == ["1", f"{directory} is a mountpoint"], done


def test_outage_serves_last_known_good_value_at_once(make_account):
    account = make_account(runs=2, checkpoints=2, settings={"ttl_s": 0.1, "timeout_s": 2.0})
    known = account.sh("ls -lR runs; cat runs/*/info.json")
    assert known.returncode == 0
    fault = account.server.faults.add(
        "api", times=None, status=503, headers={"x-should-retry": "false"}
    )
    time.sleep(0.15)  # the TTL
    started = time.monotonic()
    done = account.sh("ls -lR runs; cat runs/*/info.json")
    assert time.monotonic() - started < 5.0
    assert (done.returncode, done.stdout) == (0, known.stdout)
    assert "503" in account.errors()
    assert '"stale_if_error_hits"' in account.path(".tinkerfs/stats.json").read_text()
    fault.remove()


def test_hanging_server_delays_cached_listing_by_2_s_at_most(make_account):
    account = make_account(runs=2, checkpoints=2, settings={"ttl_s": 0.1})
    known = account.sh("ls -lR runs")
    fault = account.server.faults.add("api", times=None, hang=True)
    time.sleep(0.15)  # the TTL
    started = time.monotonic()
    done = account.sh("ls runs")
    assert time.monotonic() - started < 5.0  # and not the timeout of 30 s
    assert done.returncode == 0
    assert set(done.stdout.split()) == set(account.server.account.run_ids)
    # Later listings do not wait again.
    started = time.monotonic()
    assert account.sh("ls runs; ls runs; ls runs").returncode == 0
    assert time.monotonic() - started < 4.0  # and not 2 s each
    fault.remove()
    assert known.returncode == 0


def test_64_blocked_reads_do_not_delay_others(account):
    runs = [account.new_run("weights/1") for _ in range(64)]
    other, known = account.server.account.run_ids[-2:]
    new = account.server.account.add_checkpoint(other, "weights/new")
    cold = f"runs/{other}/checkpoints/{new.id}"
    account.refresh()
    account.sh(f"ls -R runs/{other} runs/{known}; cat runs/{known}/latest/info.json")
    account.server.journal.wait_until_idle()
    fault = account.server.faults.add(RUN_CHECKPOINTS, times=None, hang=True)
    processes = [account.start("ls", f"{run}/checkpoints") for run in runs]
    try:
        fault.wait_for(7)  # an endpoint may use all but one of the --concurrency permits
        requests = account.server.journal.count("POST weights_info")
        started = time.monotonic()
        done = account.sh(
            f"ls runs > /dev/null && ls -lR runs/{known} > /dev/null"
            f" && cat runs/{known}/latest/info.json > /dev/null && cat .tinkerfs/stats.json"
            f" && cat {cold}/info.json > /dev/null",
            timeout_s=20,
        )
        took_s = time.monotonic() - started
        assert done.returncode == 0, done
        assert took_s < 4
        assert account.server.journal.count("POST weights_info") > requests
    finally:
        fault.remove()
        for process in processes:
            process.communicate(timeout=30)
    assert all(process.returncode == 0 for process in processes)
