"""Adapters on a real mount, accessed as serving engines do."""

import os
import sys

import pytest

from tests.support.account import api_calls, make_account
from tests.support.mount import tinkerfs

__all__ = ["make_account"]

#: An engine's steps for each requested adapter: check that its real path is within the directory,
#: then load it. Prints the number of bytes read, or the name of the errno.
ENGINE = """
import errno, os, sys
root = os.path.realpath(sys.argv[1])
for name in sys.argv[2:]:
    path = os.path.realpath(os.path.join(root, name))
    assert os.path.commonpath((root, path)) == root, path
    try:
        os.listdir(path)
        print(sum(len(open(f"{path}/{n}", "rb").read()) for n in os.listdir(path)))
    except OSError as error:
        print(errno.errorcode[error.errno])
"""

BURST = 2


@pytest.fixture
def adapters(make_account):
    """Return an account with six adapters and a burst of two, and their names in `/adapters`."""
    account = make_account(runs=0, settings={"archive_build_limit": BURST})
    run = account.new_run(*(f"sampler_weights/{n}" for n in range(6)))
    return account, [f"{run[5:]}@sampler_weights@{n}" for n in range(6)]


def run_engine(account, names):
    """Return the output of an engine that loads these adapters in one process."""
    done = account.sh(
        f"exec {sys.executable} -S -E -c '{ENGINE}' adapters {' '.join(names)}",
        shell=("bash", "-c"),
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.split()


def test_prefetched_adapters_do_not_count_towards_burst(adapters, tmp_path):
    account, names = adapters
    fetched, others = names[:3], names[3:]
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TINKER_API_KEY": account.server.api_key,
    }
    paths = [account.path(f"adapters/{name}") for name in fetched]
    done = tinkerfs("prefetch", *paths, env=env)
    assert done.returncode == 0, done.stderr
    printed = run_engine(account, [*others[:1], *fetched, *others[1:], *fetched])
    sizes = [int(word) for word in printed if word.isdigit()]
    assert len(sizes) == 2 * len(fetched) + BURST
    assert printed[len(fetched) + BURST] == "EBUSY", "the third adapter that was not prefetched"
    [line] = [line for line in account.errors().splitlines() if "\tEBUSY\t" in line]
    assert "a process that opens many adapters" in line
    assert "tinkerfs prefetch" in line


def test_listing_adapters_requests_no_archive(adapters):
    account, names = adapters
    account.server.journal.clear()
    done = account.sh(
        "ls -a adapters && find adapters -printf '%f\\n' && ls -a adapters/.content/*"
    )
    assert ".content" not in done.stdout.split()
    assert all(done.stdout.split().count(name) == 2 for name in names)
    done = account.sh(
        "du -s adapters && ls -ld adapters/*/ && stat -L adapters/* && file adapters/*"
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    account.server.journal.wait_until_idle()
    assert "GET archive" not in api_calls(account.server)


def test_url_of_adapter_is_that_of_its_checkpoint(adapters):
    account, names = adapters
    run_id = account.server.account.run_ids[0]
    for name in (names[0], f"{names[0]}/adapter_config.json"):
        done = tinkerfs("url", account.path(f"adapters/{name}"))
        assert done.stdout == f"tinker://{run_id}/sampler_weights/0\n", done
