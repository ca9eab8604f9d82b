"""Tests of WebDAV requests: what they cost, refuse and return."""

import re
import socket
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from urllib.parse import quote, urlsplit

import pytest

from tests.support.account import deletes
from tests.support.mount import wait_until

EXPENSIVE = ("archive_url", "archive.tar", "tensors.json")
LOCK = (
    '<D:lockinfo xmlns:D="DAV:"><D:lockscope><D:exclusive/></D:lockscope>'
    "<D:locktype><D:write/></D:locktype></D:lockinfo>"
)


def outcome_of(client, method, path, body=None, **headers):
    response = client.request(method, quote(path), body, **headers)
    return response.status, response.text.partition(":")[0] if response.status >= 400 else ""


# What looking costs.


def test_properties_of_a_checkpoint_request_no_archive(site):
    listed = site.client.listing(site.checkpoint)
    assert site.client.properties(f"{site.checkpoint}/files").is_directory
    for name in EXPENSIVE:
        assert not listed[name].is_directory
        assert (listed[name].size, listed[name].etag) == (None, None)
        head = site.client.request("HEAD", quote(f"{site.checkpoint}/{name}"))
        assert (head.status, head.headers["Content-Length"]) == (200, None)
    for target in ("files/", "files", "tensors.json?view"):
        assert site.client.request("HEAD", f"{quote(site.checkpoint)}/{target}").status == 200
    assert listed["files"].is_directory
    assert listed["info.json"].size == len(site.client.get(f"{site.checkpoint}/info.json"))
    assert site.client.request("OPTIONS", quote(f"{site.checkpoint}/archive.tar")).status == 200
    assert "GET archive" not in site.calls()


def test_client_that_needs_a_length_gets_an_upper_bound(site):
    client = site.connect(agent="davfs2/1.6.1 neon/0.32.5")
    listed = client.listing(site.checkpoint)
    head = client.request("HEAD", quote(f"{site.checkpoint}/archive.tar"))
    assert head.headers["Content-Length"] is None
    assert "GET archive" not in site.calls()
    for name in EXPENSIVE:
        assert listed[name].size > len(client.get(f"{site.checkpoint}/{name}"))
    listed = client.listing(site.checkpoint)
    for name in EXPENSIVE:
        assert listed[name].size == len(client.get(f"{site.checkpoint}/{name}"))


def test_listing_of_files_requests_the_archive(site):
    members = site.client.listing(f"{site.checkpoint}/files")
    assert "GET archive" in site.calls()
    for name, properties in members.items():
        assert properties.size == len(site.client.get(f"{site.checkpoint}/files/{name}"))
    archive = site.client.listing(site.checkpoint)["archive.tar"]
    assert archive.size == len(site.client.get(f"{site.checkpoint}/archive.tar"))


@pytest.mark.expect_warnings("EBUSY")
def test_walk_into_files_is_limited_for_each_client(make_site):
    site = make_site(settings={"archive_build_limit": 1})
    run = site.server.account.runs()[0]
    first, second = (f"{site.run}/checkpoints/{each.id}/files" for each in run.checkpoints[:2])
    walker = site.connect(agent="walker")
    assert walker.listdir(first)
    response = site.connect(agent="walker").request("PROPFIND", quote(second), Depth="1")
    assert (response.status, response.text.partition(":")[0]) == (503, "EBUSY")
    assert "--archive-burst" in response.text
    assert site.connect(agent="other").listdir(second)


def test_listing_of_a_view_requests_only_the_account_listing(make_site):
    site = make_site(runs=10, checkpoints=3)
    assert all(each.is_directory for each in site.client.listing("/checkpoints").values())
    assert site.calls() == ["GET checkpoints"]


def test_listing_of_names_requests_no_weights_info(site):
    assert "info.json" in site.client.listdir(site.checkpoint)
    assert "POST weights_info" not in site.calls()


@pytest.mark.parametrize("name", ["._info.json", ".DS_Store", "desktop.ini", "Thumbs.db"])
def test_probe_name_is_absent_without_a_request(site, name):
    site.client.listing(f"{site.run}/checkpoints")
    site.calls()
    for directory in ("", site.run, f"{site.run}/checkpoints", site.checkpoint):
        for method in ("PROPFIND", "GET", "HEAD"):
            response = site.client.request(method, quote(f"{directory}/{name}"), Depth="0")
            assert response.status == 404
    assert site.calls() == []


def test_unbounded_listing_is_refused_with_its_condition(shared_site):
    for headers in ({}, {"Depth": "infinity"}):
        response = shared_site.client.request("PROPFIND", "/runs/", **headers)
        assert response.status == 403
        assert b"propfind-finite-depth" in response.body
    assert shared_site.client.request("PROPFIND", "/README.md", Depth="infinity").status == 207


# Content.


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=2-5", slice(2, 6)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-7", slice(-7, None)),
    ],
)
def test_range_returns_these_bytes(shared_site, header, expected):
    path = f"{shared_site.checkpoint}/files/adapter_model.safetensors"
    data = shared_site.client.get(path)
    response = shared_site.client.request("GET", quote(path), Range=header)
    assert (response.status, response.body) == (206, data[expected])
    assert response.headers["Content-Range"].endswith(f"/{len(data)}")


def test_unsatisfiable_range_is_refused(shared_site):
    path = quote(f"{shared_site.checkpoint}/files/adapter_config.json")
    response = shared_site.client.request("GET", path, Range="bytes=9999999-")
    assert response.status == 416
    assert response.headers["Content-Range"].startswith("bytes */")


def test_conditional_requests_compare_the_entity_tag(site):
    path = f"{site.checkpoint}/published"
    first = site.client.send("GET", path)
    tag = first.headers["ETag"]
    assert site.client.properties(path).etag == tag
    assert site.client.request("GET", quote(path), If_None_Match=tag).status == 304
    assert site.client.request("PUT", quote(path), b"1", If_Match='"other"').status == 412
    assert site.client.request("PUT", quote(path), b"1", If_Match=tag).status == 204
    second = site.client.request("GET", quote(path), If_None_Match=tag)
    assert (second.status, second.body) == (200, b"1\n")
    old = site.client.request("GET", quote(path), Range="bytes=0-0", If_Range=tag)
    assert (old.status, old.body) == (200, b"1\n")


def test_member_has_an_entity_tag_of_its_version(shared_site):
    path = f"{shared_site.checkpoint}/files/adapter_config.json"
    tag = shared_site.client.send("GET", path).headers["ETag"]
    assert shared_site.client.properties(path).etag == tag
    assert shared_site.client.request("HEAD", quote(path), If_None_Match=tag).status == 304


def test_checkpoint_without_a_time_has_no_entity_tags_of_content(site):
    run_id = site.run.rpartition("/")[2]
    site.server.account.add_checkpoint(run_id, "weights/timeless", time_s=None)
    members = site.client.listing(f"{site.run}/checkpoints/weights/timeless/files")
    assert len(members) > 1
    assert {properties.etag for properties in members.values()} == {None}


# Changes.


def test_put_on_a_control_acts(site):
    assert outcome_of(site.client, "PUT", f"{site.checkpoint}/published", b"1\n") == (204, "")
    assert site.client.get(f"{site.checkpoint}/published") == b"1\n"
    assert site.server.account.runs()[0].checkpoints[0].is_public
    assert "tests at 127.0.0.1[0] uid" in site.client.get("/.tinkerfs/changes").decode()


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("published", b"perhaps", (422, "EINVAL")),
        ("expires_at", b"1s", (422, "ERANGE")),
        ("info.json", b"{}", (403, "EPERM")),
        ("new", b"", (403, "EPERM")),
        ("files/new", b"", (403, "EPERM")),
    ],
)
@pytest.mark.expect_warnings("EPERM", "ERANGE", "EINVAL")
def test_refused_put_has_the_reason_in_its_body(site, name, value, expected):
    assert outcome_of(site.client, "PUT", f"{site.checkpoint}/{name}", value) == expected


def test_truncated_put_changes_nothing(site):
    parts = urlsplit(site.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as connection:
        head = f"PUT {quote(site.checkpoint)}/expires_at HTTP/1.1\r\nHost: {parts.netloc}\r\n"
        connection.sendall(f"{head}Content-Length: 5\r\n\r\n9000".encode())
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass
    assert site.client.get(f"{site.checkpoint}/expires_at") == b"never\n"


def test_put_in_chunks_acts(site):
    response = site.client.request("PUT", quote(f"{site.checkpoint}/published"), iter([b"1", b""]))
    assert response.status == 204
    assert site.client.get(f"{site.checkpoint}/published") == b"1\n"


@pytest.mark.expect_warnings("EPERM")
@pytest.mark.parametrize("method", ["MOVE", "COPY"])
@pytest.mark.parametrize("destination", ["new", "published"])
def test_move_and_copy_are_refused_and_lose_nothing(site, method, destination):
    target = quote(f"{site.run}/checkpoints/weights/{destination}")
    if destination == "published":
        target = quote(f"{site.checkpoint}/published")
    for source in (site.checkpoint, f"{site.checkpoint}/info.json", site.run):
        outcome = outcome_of(site.client, method, source, Destination=target, Overwrite="T")
        assert outcome[0] in (403, 409)
    assert site.client.properties(site.checkpoint).is_directory
    assert deletes(site.server) == 0


@pytest.mark.expect_warnings("EPERM")
def test_new_collections_and_properties_are_refused(site):
    assert outcome_of(site.client, "MKCOL", f"{site.run}/new") == (403, "EPERM")
    update = (
        '<D:propertyupdate xmlns:D="DAV:"><D:set><D:prop><D:displayname>x</D:displayname>'
        "</D:prop></D:set></D:propertyupdate>"
    )
    response = site.client.request("PROPPATCH", quote(site.checkpoint), update)
    assert response.status == 207
    assert b"403" in response.body


@pytest.mark.expect_warnings("EPERM")
def test_deletion_of_other_directories_is_refused_with_words(site):
    first = site.client.listdir("/checkpoints")[0]
    for path in (site.run, "/runs", f"/checkpoints/{first}", "/README.md", "/"):
        client = site.connect(agent=path)
        assert outcome_of(client, "DELETE", path) == (403, "EPERM")
        # The guard counts all connections of a program.
        again = site.connect(agent=path).request("DELETE", quote(site.checkpoint))
        assert (again.status, "less than a minute ago" in again.text) == (403, True)
    assert deletes(site.server) == 0
    assert outcome_of(site.client, "DELETE", site.checkpoint) == (204, "")
    assert deletes(site.server) == 1
    assert outcome_of(site.client, "GET", site.checkpoint) == (404, "Not Found")


@pytest.mark.expect_warnings("EPERM")
def test_member_by_member_deletion_removes_nothing(site):
    for name in site.client.listdir(f"{site.checkpoint}/files"):
        outcome = outcome_of(site.client, "DELETE", f"{site.checkpoint}/files/{name}")
        assert outcome == (403, "EPERM")
    assert outcome_of(site.client, "DELETE", site.checkpoint) == (403, "EPERM")
    assert deletes(site.server) == 0


def test_deletion_moves_to_the_trash(make_site):
    site = make_site(settings={"trash_s": 86400.0})
    assert outcome_of(site.client, "DELETE", site.checkpoint) == (204, "")
    assert deletes(site.server) == 0
    [name] = site.client.listdir("/.tinkerfs/trash")
    restored = outcome_of(site.client, "PUT", f"/.tinkerfs/trash/{name}/expires_at", b"never")
    assert restored == (204, "")
    assert site.client.properties(site.checkpoint).is_directory


def test_lock_is_for_control_files_and_excludes_others(site):
    path = quote(f"{site.checkpoint}/published")
    assert site.client.request("LOCK", quote(site.checkpoint), LOCK).status == 403
    lock = site.client.request("LOCK", path, LOCK, Timeout="Infinite")
    assert lock.status == 200
    assert 500 < int(re.search(rb"Second-(\d+)", lock.body)[1]) <= 600
    token = lock.headers["Lock-Token"]
    assert site.client.request("PUT", path, b"1").status == 423
    assert site.client.request("PUT", path, b"1", If=f"({token})").status == 204
    assert site.client.request("UNLOCK", path, Lock_Token=token).status == 204


def test_read_only_server_offers_methods_that_read(make_site):
    site = make_site(settings={"read_only": True})
    options = site.client.request("OPTIONS", "/")
    assert (options.headers["DAV"], options.headers["Allow"]) == (
        "1",
        "OPTIONS, HEAD, GET, PROPFIND",
    )
    for method in ("PUT", "DELETE", "MKCOL", "LOCK"):
        response = site.client.request(method, quote(f"{site.checkpoint}/published"), b"")
        assert response.status == 405
    assert deletes(site.server) == 0


# Names and failures.


@pytest.mark.parametrize(
    "target",
    [
        "/../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/runs/..%2f..%2fetc",
        "/runs/%00",
        "/./runs",
    ],
)
def test_path_that_leaves_its_directory_is_refused(shared_site, target):
    for method in ("GET", "PROPFIND", "PUT", "DELETE"):
        assert shared_site.client.request(method, target, Depth="0").status == 400


@pytest.mark.expect_warnings("EPERM")
@pytest.mark.parametrize(
    ("method", "target", "headers", "body", "status"),
    [
        ("OPTIONS", "*", {}, None, 200),
        ("MOVE", "/README.md", {"Destination": "http://["}, None, 400),
        ("MOVE", "/README.md", {}, None, 400),
        ("COPY", "/README.md", {"Destination": "http://evil.example/x"}, None, 502),
        ("COPY", "/README.md", {"Destination": "/x/../../y"}, None, 400),
        ("PROPFIND", "/", {"Depth": "7"}, None, 400),
        ("PROPFIND", "/", {"Depth": "0"}, "<a>", 400),
        ("LOCK", "/.tinkerfs/refresh", {}, "<a/>", 400),
        ("TRACE", "/", {}, None, 405),
        ("POST", "/.tinkerfs/refresh", {}, "1", 405),
        ("PUT", "/.tinkerfs/refresh", {"Content-Range": "bytes 0-1/2"}, "1", 400),
        ("PUT", "/runs/", {}, "1", 405),
        ("GET", "/runs/?sort=%FF&" + "a&" * 999, {}, None, 200),
        ("GET", "/%FF%FE", {}, None, 404),
    ],
)
def test_malformed_request_is_refused(shared_site, method, target, headers, body, status):
    response = shared_site.client.request(method, target, body, **headers)
    assert response.status == status
    assert "Traceback" not in response.text


def test_entities_in_a_body_are_refused(shared_site):
    body = '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>'
    response = shared_site.client.request("PROPFIND", "/", body, Depth="0")
    assert (response.status, "root:" in response.text) == (400, False)


def test_backslashes_are_part_of_a_name(shared_site):
    assert shared_site.client.request("GET", "/runs%5C..%5C..%5Cetc").status == 404
    assert shared_site.client.request("GET", "/..%5Cetc").status == 404


@pytest.mark.expect_warnings("EHOSTUNREACH|EIO|EBUSY|EACCES")
@pytest.mark.parametrize(
    ("status", "expected"), [(401, (403, "EACCES")), (402, (402, "EDQUOT")), (400, (422, "EINVAL"))]
)
def test_failure_of_the_api_has_its_status(site, status, expected, expect_warnings):
    expect_warnings("EDQUOT", "EINVAL", "key")
    site.server.faults.add("GET training_runs", times=None, status=status)
    response = site.client.request("PROPFIND", "/runs/", Depth="1")
    assert (response.status, response.text.partition(":")[0]) == expected


def test_members_are_downloads_and_never_html(shared_site):
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        headers = shared_site.client.send("GET", f"{shared_site.checkpoint}/files/{name}").headers
        assert headers.get_content_type() in ("application/octet-stream", "application/json")
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "sandbox" in headers["Content-Security-Policy"]


def test_archive_url_is_not_stored_by_caches(shared_site):
    response = shared_site.client.send("GET", f"{shared_site.checkpoint}/archive_url")
    assert response.text.startswith("http")
    assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.expect_warnings("read E")
def test_failure_before_the_first_byte_has_its_status(site):
    path = f"{site.checkpoint}/files/adapter_model.safetensors"
    site.client.listdir(f"{site.checkpoint}/files")
    site.server.faults.add("store", times=None, status=403)
    status, name = outcome_of(site.client, "GET", path)
    assert (status, name) in ((403, "EACCES"), (500, "EIO"))


# Concurrency.


def test_waiting_clients_hold_up_nothing(site):
    fault = site.server.faults.add("GET archive", hang=True)
    path = f"{site.checkpoint}/files/adapter_model.safetensors"
    with ThreadPoolExecutor(64) as pool:
        try:
            reads = [pool.submit(site.connect().get, path) for _ in range(64)]
            fault.wait_for(1)
            other = site.connect()
            assert site.run.rpartition("/")[2] in other.listdir("/runs")
            assert other.get(f"{site.checkpoint}/published") == b"0\n"
        finally:
            fault.release()
        assert len({read.result(60) for read in reads}) == 1


def test_slow_clients_hold_up_nothing(make_site):
    site = make_site(runs=1, checkpoints=1, size_bytes=32 << 20)
    path = f"{site.checkpoint}/files/adapter_model.safetensors"
    size_bytes = site.client.listing(f"{site.checkpoint}/files")["adapter_model.safetensors"].size
    with ExitStack() as stack:
        slow = [stack.enter_context(closing(_request(site, "GET", path))) for _ in range(48)]
        for connection in slow:  # the server has begun to send, and the buffers are full
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert site.client.get(f"{site.checkpoint}/published") == b"0\n"
        assert site.client.request("GET", quote(path), Range="bytes=-5").status == 206
        received = 100
        while part := slow[0].recv(1 << 20):
            received += len(part)
            if received > size_bytes:
                break
    assert received > size_bytes


def test_client_that_leaves_ends_its_wait(site):
    fault = site.server.faults.add("GET archive", hang=True)
    try:
        with closing(_request(site, "GET", f"{site.checkpoint}/archive.tar")):
            fault.wait_for(1)
            wait_until(lambda: _waiting_threads() > 0, 60)
        wait_until(lambda: _waiting_threads() == 0, 60)
    finally:
        fault.release()


def test_stop_ends_waiting_requests(make_site):
    site = make_site()
    fault = site.server.faults.add("GET archive", hang=True)
    try:
        with closing(_request(site, "GET", f"{site.checkpoint}/archive.tar")) as connection:
            fault.wait_for(1)
            wait_until(lambda: _waiting_threads() > 0, 60)
            site.webdav.stop()
            assert b"503" in connection.recv(65536).partition(b"\r\n")[0]
    finally:
        fault.release()


def test_stop_disconnects_clients_that_do_not_read(make_site):
    site = make_site(runs=1, checkpoints=1, size_bytes=32 << 20)
    path = f"{site.checkpoint}/files/adapter_model.safetensors"
    with closing(_request(site, "GET", path)) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        site.webdav.stop()
        assert time.monotonic() - began < 30, "the time-out of the connection is a minute"


def _request(site, method, path):
    """Send a request without a body, and return the socket."""
    parts = urlsplit(site.url)
    connection = socket.create_connection((parts.hostname, parts.port), timeout=60)
    connection.sendall(f"{method} {quote(path)} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
    return connection


def _waiting_threads():
    """Return the number of the server's threads that wait for an archive."""
    return sum(
        frame.name == "open" and frame.filename.endswith("vfs/filesystem.py")
        for stack in sys._current_frames().values()
        for frame in traceback.extract_stack(stack)
    )
