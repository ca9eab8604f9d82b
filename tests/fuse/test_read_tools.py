"""Tools that list and read, beyond those of every shell: their output and their requests.

One binding is enough, because `test_tools.py` covers the differences between bindings.
"""

import itertools
import json
import os
import re
import sys
import zipfile
from dataclasses import dataclass

import pytest

from tests.support.account import account, api_calls, make_account, needs
from tests.support.mount import running, wait_until

__all__ = ["account", "make_account"]

RUNS, CHECKPOINTS = 3, 4
COUNT = RUNS * CHECKPOINTS

RUNS_LISTED = {"GET training_runs": 1}
ALL_RUNS_LISTED = RUNS_LISTED | {"GET training_runs/{run}/checkpoints": RUNS}
VIEWS_LISTED = {"GET checkpoints": 1, "POST sessions/search": 1, "GET sessions/{session}": 2}
ALL_LISTED = ALL_RUNS_LISTED | VIEWS_LISTED
#: Maximum requests for the whole mount. A tool that reads a view before the runs requests each run
#: of the view, and `samplers` lists those of the sessions that were listed before. `shared` lists
#: the accessible runs.
WHOLE = ALL_LISTED | {
    "GET training_runs": 2,
    "GET training_runs/{run}": RUNS,
    "GET samplers/{sampler}": 5,
}

#: The default of dircolors: directories, links, and broken links in red.
LS_COLORS = "di=01;34:ln=01;36:or=40;31;01:mi=00"


@pytest.fixture(scope="module")
def warm(account):
    """Return an account with cached weights infos, which never expire."""
    account.sh("cat runs/*/checkpoints/*/*/info.json")
    account.server.journal.wait_until_idle()
    return account


@pytest.fixture
def calls_of(warm, tmp_path):
    """Return a function that runs a script with only weights infos cached, and counts requests."""

    def run_script(script):
        run = warm.server.account.run_ids[0]
        assignments = f"R=runs/{run} CK=runs/{run}/checkpoints/weights/0001 OUT={tmp_path}\n"
        assignments += f"PYTHON={sys.executable}\n"
        warm.refresh()
        warm.server.journal.clear()
        done = warm.sh(assignments + script)
        warm.server.journal.wait_until_idle()
        assert warm.server.journal.count("GET archive") == 0
        return done, api_calls(warm.server)

    return run_script


def unexpected(calls, allowed):
    """Return requests beyond those allowed; fewer are possible, as the kernel caches for 1 s."""
    return {endpoint: n for endpoint, n in calls.items() if n > allowed.get(endpoint, 0)}


@dataclass(frozen=True)
class Look:
    """A script, patterns of its output, and the requests that it may cause."""

    script: str
    shows: tuple[str, ...]
    calls: dict[str, int]
    needs: tuple[str, ...] = ()


LOOKS = {
    "ls --color -la of the root": Look(
        "ls --color=always -la",
        (r"dr.x.* \x1b\[01;34mruns\x1b\[0m", r"-r--r--r-- .* README.md", r"\.tinkerfs"),
        {},
    ),
    "ls --color -la": Look(
        f"LS_COLORS='{LS_COLORS}' ls --color=always -la runs runs/* runs/*/checkpoints/*/*",
        (
            r"\x1b\[01;36mlatest\x1b\[0m -> \x1b\[01;34mcheckpoints/weights/",
            # The target exists, so the name does not have the color of a broken link.
            r"\x1b\[01;36marchive_url\x1b\[0m -> \.\./.*/archive_url\n",
            r"-rw-r--r-- .* published",
        ),
        ALL_RUNS_LISTED,
    ),
    "tree": Look("tree", (r"-- README.md", r"\d+ directories, \d+ files"), WHOLE, ("tree",)),
    "tree with sizes": Look("tree --du -spDh runs", (r"info\.json", r"directories"),
        ALL_RUNS_LISTED, ("tree",)),
    "find -newer": Look(
        "find runs checkpoints -newer $CK/info.json -mindepth 1 -maxdepth 1",
        (r"(?m)^runs/", r"(?m)^checkpoints/.*@.*@"),
        RUNS_LISTED | {"GET training_runs/{run}/checkpoints": 1, "GET checkpoints": 1},
    ),
    "find -printf": Look(
        r"find $CK -printf '%f %s %y %M %l\n'",
        (
            r"0001 \d{4,} d drwxr-xr-x \n",
            r"published 2 f -rw-r--r-- \n",
            r"archive_url \d+ l .* \.\./",
        ),
        {"GET training_runs/{run}": 1, "GET training_runs/{run}/checkpoints": 1},
    ),
    "find -size": Look(
        "find README.md runs -type f ! -name export -size +0 -size -100k | wc -l",
        (rf"^{1 + RUNS + 4 * COUNT}\n",),
        ALL_RUNS_LISTED,
    ),
    "find -mtime": Look("find $R -newermt 2000-01-01 ! -newermt 2001-01-01", ("^$",),
        {"GET training_runs/{run}": 1, "GET training_runs/{run}/checkpoints": 1}),
    "stat": Look(
        "stat README.md runs $CK $CK/* && stat -Lc '%n %F %s' $CK/archive_url && stat -f .",
        (r"Access: \(0444/-r--r--r--\)", r"Modify: 20", r"archive_url regular file [1-9]",
         r"Namelen: 255"),
        {"GET training_runs/{run}": 1, "GET training_runs/{run}/checkpoints": 1},
    ),
    "file": Look(
        "file README.md $CK/*",
        (r"info.json: +JSON", r"published: +ASCII text", r"archive_url: +symbolic link to \.\./"),
        {"GET training_runs/{run}": 1, "GET training_runs/{run}/checkpoints": 1},
        ("file",),
    ),
    "wc": Look("wc -c runs/*/info.json", (r"(?m)^ *\d{3,} runs/.*\n *\d{4,} total",), RUNS_LISTED),
    "md5sum": Look(
        "md5sum README.md $CK/tinker_path > $OUT/sums && md5sum -c $OUT/sums",
        (r"README.md: OK", r"tinker_path: OK"),
        {"GET training_runs/{run}": 1, "GET training_runs/{run}/checkpoints": 1},
    ),
    "grep -r": Look("grep -rl lora_rank . | wc -l", (rf"^{1 + RUNS + COUNT}\n",), WHOLE),
    "rg": Look("rg -l lora_rank | wc -l", (rf"^{1 + RUNS + COUNT}\n",), WHOLE, ("rg",)),
    "rg --hidden": Look("rg --hidden -l tinker:// runs | wc -l", (rf"^{RUNS + 2 * COUNT}\n",),
        ALL_RUNS_LISTED, ("rg",)),
    "fd": Look(
        "$(command -v fdfind || command -v fd) -t f published | wc -l", (rf"^{COUNT}\n",), WHOLE
    ),
    "fd --hidden": Look(
        "$(command -v fdfind || command -v fd) -H -t l archive_url runs", (r"/archive_url\n",),
        ALL_RUNS_LISTED,
    ),
    "jq": Look(
        "jq -r .base_model runs/*/info.json | sort | uniq -c", (r" 1 \w+.*/",), RUNS_LISTED, ("jq",)
    ),
    "zip -ry": Look(
        "zip -qry $OUT/x.zip . && unzip -l $OUT/x.zip 2>&1 | tail -1; test -s $OUT/x.zip", (),
        WHOLE, ("zip",),
    ),
    "xargs -P8": Look(
        "find runs -type f -print0 | xargs -0 -P8 -n1 cat | wc -c", (r"^\d{4,}\n",), ALL_RUNS_LISTED
    ),
    "ncdu -o": Look(
        "ncdu -o - -0 runs", (r'"name":"archive_url","asize":\d+,"notreg":true',), ALL_RUNS_LISTED,
        ("ncdu",),
    ),
    "df": Look("df -Th .", (r"tinkerfs +fuse.tinkerfs +\d",), {}),
    "gio list": Look(
        "gio list -l . && gio list -lh $CK",
        (r"README.md\t\d+\t\(regular\)", r"published\t2\t\(regular\)"),
        {"GET training_runs/{run}": 1, "GET training_runs/{run}/checkpoints": 1},
        ("gio",),
    ),
    "gio info": Look(
        "gio info $CK; gio info $CK/info.json; gio info -n $CK/archive_url; gio info -f $CK",
        (r"standard::content-type: application/json", r"standard::is-symlink: TRUE",
         r"unix::mode: 33188"),
        {"GET training_runs/{run}": 1, "GET training_runs/{run}/checkpoints": 1},
        ("gio",),
    ),
    "gio tree": Look(
        "gio tree runs", (r"archive_url -> \.\./",), ALL_RUNS_LISTED, ("gio",)
    ),
    "gio cat": Look(
        "gio cat $CK/tinker_path", (r"^tinker://.*/weights/0001\n$",),
        {"GET training_runs/{run}": 1, "GET training_runs/{run}/checkpoints": 1}, ("gio",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOKS)
def test_tool_shows_content_with_listing_requests_only(calls_of, name):
    tool = LOOKS[name]
    needs(tool.needs)
    done, calls = calls_of(tool.script)
    assert (done.returncode, done.stderr) == (0, "")
    for pattern in tool.shows:
        assert re.search(pattern, done.stdout), (pattern, done.stdout)
    assert unexpected(calls, tool.calls) == {}


def test_ls_color_shows_no_broken_link(calls_of):
    done, _calls = calls_of(f"LS_COLORS='{LS_COLORS}' ls --color=always -lR")
    assert done.returncode == 0
    assert "\x1b[01;36m" in done.stdout
    assert "\x1b[40;31;01m" not in done.stdout
    done, _calls = calls_of("find . -xtype l")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_cp_a_of_everything_is_complete(calls_of, warm, tmp_path):
    done, calls = calls_of("cp -a . $OUT/copy")
    assert (done.returncode, done.stderr) == (0, "")
    assert unexpected(calls, WHOLE) == {}
    for view in ("runs", "checkpoints", "published", "expiring", "models", "sessions"):
        for directory, directories, files in os.walk(tmp_path / "copy" / view):
            mounted = warm.path(os.path.relpath(directory, tmp_path / "copy"))
            assert sorted(directories + files) == sorted(os.listdir(mounted))
    # Links are relative, so that they point to the copies.
    for pattern in ("checkpoints/*/info.json", "models/*/*/*/checkpoints/*/*/info.json"):
        assert len(list((tmp_path / "copy").glob(pattern))) == COUNT


def test_rsync_of_name_with_colon_needs_a_path_prefix(calls_of, warm, tmp_path):
    needs(["rsync"])
    run = warm.server.account.run_ids[0]
    done, calls = calls_of(f"cd runs && rsync -a -e false {run} $OUT/")
    assert done.returncode != 0
    assert not (tmp_path / run).exists()
    for location in (f"./{run}", f"$MNT/runs/{run}"):
        done, calls = calls_of(
            f"cd runs && rsync -a {location} $OUT/ && rm -r $OUT/{run}/info.json"
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert calls["GET training_runs/{run}/checkpoints"] == 1


def test_zip_keeps_times_and_links(calls_of, warm, tmp_path):
    needs(["zip"])
    done, calls = calls_of("zip -qry $OUT/x.zip runs")
    assert (done.returncode, done.stderr) == (0, "")
    assert calls == ALL_RUNS_LISTED
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.testzip() is None
        for run, location in itertools.product(
            warm.server.account.run_ids, ("info.json", "latest")
        ):
            content = archive.read(f"runs/{run}/{location}").decode()
            assert content.startswith("{" if location == "info.json" else "checkpoints/weights/")


def test_jq_reads_every_info_json(calls_of, warm):
    needs(["jq"])
    done, calls = calls_of(
        "jq -s 'map({(.tinker_path): .size_bytes}) | add' runs/*/checkpoints/*/*/info.json"
    )
    wanted = {
        f"tinker://{run.id}/{c.id}": c.size_bytes
        for run in warm.server.account.runs()
        for c in run.checkpoints
    }
    assert json.loads(done.stdout) == wanted
    assert calls == ALL_RUNS_LISTED


# --- probes of software ---------------------------------------------------------------------------


def test_probes_of_desktop_software_send_no_request(make_account):
    account = make_account(runs=100, checkpoints=1)
    names = (".git", ".Trash-1000", ".hidden", "desktop.ini", ".gitignore", "HEAD", "index.html")
    runs = os.listdir(account.path("runs"))
    assert len(runs) == 100
    account.server.journal.clear()
    code = f"""
import itertools, os
found = 0
for run, name in itertools.product({runs!r}, {names!r} * 2):
    found += os.path.lexists(f"runs/{{run}}/{{name}}")
for view, name in itertools.product(os.listdir(), {names!r}):
    found += os.path.lexists(f"{{view}}/{{name}}")
print(found)
"""
    done = account.python(code)
    assert (done.stdout, done.stderr) == ("0\n", "")
    assert api_calls(account.server) == {}


def test_prompt_with_git_status_sends_no_request(warm):
    needs(["git"])
    run = warm.server.account.run_ids[0]
    location = f"runs/{run}/checkpoints/weights/0001"
    warm.sh(f"ls {location}")
    warm.server.journal.clear()
    # The command of a shell prompt, also with the setting to cross file systems.
    done = warm.sh(
        f"cd {location} && git rev-parse --git-dir; git status --porcelain --branch;"
        " GIT_DISCOVERY_ACROSS_FILESYSTEM=1 GIT_CEILING_DIRECTORIES=/ git status"
    )
    assert done.stderr.count("not a git repository") == 3
    assert api_calls(warm.server) == {}


def test_python_http_server_serves_the_mount(warm, tmp_path):
    needs(["curl"])
    run = warm.server.account.run_ids[0]
    location = f"runs/{run}/checkpoints/weights/0001"
    warm.refresh()
    warm.server.journal.clear()
    ready = tmp_path / "port"
    code = (
        "import functools, http.server as h, pathlib, sys\n"
        "handler = functools.partial(h.SimpleHTTPRequestHandler, directory=sys.argv[1])\n"
        "server = h.ThreadingHTTPServer(('127.0.0.1', 0), handler)\n"
        "pathlib.Path(sys.argv[2]).write_text(str(server.server_port) + '\\n')\n"
        "server.serve_forever()\n"
    )
    with running([[sys.executable, "-c", code, warm.root, ready]]):
        wait_until(lambda: ready.exists() and ready.read_text().endswith("\n"))
        url = f"http://127.0.0.1:{ready.read_text().strip()}"
        done = warm.sh(f"curl -s {url}/ {url}/runs/ {url}/{location}/ {url}/sessions/")
        assert done.stdout.count("<!DOCTYPE HTML>") == 4
        assert f"{run}/</a>" in done.stdout
        assert '<a href="published">' in done.stdout
        done = warm.sh(f"curl -s {url}/{location}/info.json")
        assert json.loads(done.stdout)["checkpoint_id"] == "weights/0001"
        done = warm.sh(f"curl -sI {url}/{location}/info.json")
        assert "application/json" in done.stdout
        assert f"Content-Length: {warm.path(location + '/info.json').stat().st_size}" in done.stdout
    assert warm.server.journal.count("GET archive") == 0
    calls = api_calls(warm.server)
    assert calls == {
        "GET training_runs": 1,
        "GET training_runs/{run}/checkpoints": 1,
        "POST sessions/search": 1,
    }


# --- changes by gio -------------------------------------------------------------------------------


def test_gio_trash_and_remove_fail_and_delete_nothing(warm):
    needs(["gio"])
    run = warm.new_run("weights/1", "weights/2")
    location = f"{run}/checkpoints/weights/1"
    done = warm.sh(f"gio trash {location}")
    assert done.returncode != 0
    assert "Unable to find or create trash directory" in done.stderr
    done = warm.sh(f"gio remove {location}")
    assert done.returncode != 0
    assert "Directory not empty" in done.stderr
    for path in (run, f"{run}/info.json", "README.md"):
        done = warm.sh(f"gio remove {path}")
        assert "Operation not permitted" in done.stderr
    assert "only checkpoints can be removed" in warm.errors()
    assert warm.checkpoint_ids(run) == {"weights/1", "weights/2"}
    done = warm.sh(f"gio remove {location}/* {location}")
    assert (done.returncode, done.stderr) == (0, "")
    assert warm.checkpoint_ids(run) == {"weights/2"}
    warm.server.account.remove_run(run.partition("/")[2])
