import io
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinkerfs.demo.content import Data


@pytest.fixture
def url(server):
    """A signed URL of an archive of 1,000 bytes, 0..249 four times."""
    run_id = server.account.run_ids[0]
    archive = Data(bytes(range(250)) * 4)
    server.account.add_checkpoint(run_id, "weights/tiny", archive=archive)
    return server.archive_url(run_id, "weights/tiny")


BODY = bytes(range(250)) * 4


def test_get_returns_the_whole_file(web, url):
    response = web.get(url)
    assert (response.status_code, response.content) == (200, BODY)
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-length"] == "1000"
    assert response.headers["etag"].startswith('"')
    assert "last-modified" in response.headers


@pytest.mark.parametrize(
    ("header", "content_range", "body"),
    [
        ("bytes=0-", "bytes 0-999/1000", BODY),
        ("bytes=0-0", "bytes 0-0/1000", BODY[:1]),
        ("bytes=10-19", "bytes 10-19/1000", BODY[10:20]),
        ("bytes=990-2000", "bytes 990-999/1000", BODY[990:]),
        ("bytes=-10", "bytes 990-999/1000", BODY[990:]),
        ("bytes=-2000", "bytes 0-999/1000", BODY),
    ],
)
def test_get_with_a_range_returns_it(web, url, header, content_range, body):
    response = web.get(url, headers={"Range": header})
    assert (response.status_code, response.headers["content-range"]) == (206, content_range)
    assert response.content == body
    assert response.headers["content-length"] == str(len(body))


@pytest.mark.parametrize("header", ["bytes=0-1,5-6", "lines=1-2", "bytes=x", "bytes=9-1"])
def test_get_with_an_invalid_range_returns_everything(web, url, header):
    response = web.get(url, headers={"Range": header})
    assert (response.status_code, response.content) == (200, BODY)
    assert "content-range" not in response.headers


@pytest.mark.parametrize("header", ["bytes=1000-", "bytes=5000-6000", "bytes=-0"])
def test_get_with_a_range_past_the_end_fails(web, url, header):
    response = web.get(url, headers={"Range": header})
    assert (response.status_code, response.headers["content-range"]) == (416, "bytes */1000")
    # The connection stays usable: the next request on it succeeds.
    assert web.get(url, headers={"Range": "bytes=1-1"}).content == BODY[1:2]


def test_get_with_if_range_compares_validators(web, url):
    first = web.get(url)
    for validator, status in (
        (first.headers["etag"], 206),
        (first.headers["last-modified"], 206),
        ('"another"', 200),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 200),
    ):
        response = web.get(url, headers={"Range": "bytes=0-9", "If-Range": validator})
        assert response.status_code == status, validator


def test_get_with_preconditions_checks_the_etag(web, url):
    etag = web.get(url).headers["etag"]
    assert web.get(url, headers={"If-None-Match": etag}).status_code == 304
    assert web.get(url, headers={"If-Match": '"another"'}).status_code == 412
    assert web.get(url, headers={"If-Match": etag}).status_code == 200


def test_head_returns_headers_only(web, url):
    response = web.head(url, headers={"Range": "bytes=0-9"})
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-length"] == "1000"


def test_get_of_an_empty_file_ignores_ranges(web, server):
    run_id = server.account.run_ids[0]
    server.account.add_checkpoint(run_id, "weights/empty", archive=Data(b""))
    url = server.archive_url(run_id, "weights/empty")
    assert web.get(url).content == b""
    assert web.head(url).headers["content-length"] == "0"
    assert web.get(url, headers={"Range": "bytes=-5"}).status_code == 200
    response = web.get(url, headers={"Range": "bytes=0-"})
    assert (response.status_code, response.headers["content-range"]) == (416, "bytes */0")


def test_other_methods_and_paths_fail(web, server, url):
    assert web.put(url).status_code == 405
    assert web.get(f"{server.store_url}/nothing").status_code == 404
    assert web.get(f"{server.store_url}/").status_code == 404


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(st.data())
def test_archive_range_is_a_slice_of_the_whole(web, server, data):
    run_id = server.account.run_ids[1]
    url = server.archive_url(run_id, "weights/0001")
    whole = web.get(url).content
    start = data.draw(st.integers(0, len(whole) - 1))
    last = data.draw(st.integers(start, len(whole) - 1))
    response = web.get(url, headers={"Range": f"bytes={start}-{last}"})
    assert response.content == whole[start : last + 1]


def test_archive_contains_the_files_of_the_record(web, server):
    for run, checkpoint in server.account.checkpoints():
        if checkpoint.kind == "external_weights":
            continue
        body = web.get(server.archive_url(run.id, checkpoint.id)).content
        with tarfile.open(fileobj=io.BytesIO(body)) as archive:
            assert sum(m.size for m in archive) == checkpoint.size_bytes
            assert {m.mtime for m in archive} == {int(checkpoint.time_s)}


def test_signed_urls_expire(demo_server, web):
    now = [1_800_000_000.0]
    server = demo_server(clock=lambda: now[0], signed_url_lifetime_s=60)
    url = server.archive_url(server.account.run_ids[0], "weights/0001")
    now[0] += 59.9
    assert web.get(url).status_code == 200
    now[0] += 0.1
    response = web.get(url)
    assert (response.status_code, "ExpiredToken" in response.text) == (403, True)
    server.signer.lifetime_s = 0
    assert web.get(server.archive_url(server.account.run_ids[0], "weights/0001")).is_error


def test_signed_urls_can_be_revoked(server, web, url):
    assert web.get(url).status_code == 200
    server.signer.revoke_all()
    assert web.get(url).status_code == 403
    run_id = server.account.run_ids[0]
    assert web.get(server.archive_url(run_id, "weights/tiny")).status_code == 200


def test_signature_is_valid_for_one_path_and_expiry(web, url):
    for altered in (
        url.replace("weights/tiny", "weights/0001"),
        url.replace("X-Expires=", "X-Expires=9"),
        url.replace("X-Id=", "X-Id=1"),
        url.partition("?")[0],
        url[:-1] + ("0" if url[-1] != "0" else "1"),
    ):
        assert web.get(altered).status_code == 403, altered


def test_deleted_checkpoint_has_no_archive(server, web, url):
    server.account.delete_checkpoint(server.account.run_ids[0], "weights/tiny")
    assert web.get(url).status_code == 404


def test_saved_again_checkpoint_has_another_etag_and_content(server, web):
    run_id = server.account.run_ids[0]
    server.account.add_checkpoint(run_id, "weights/again")
    first = web.get(server.archive_url(run_id, "weights/again"))
    server.account.add_checkpoint(run_id, "weights/again")
    second = web.get(server.archive_url(run_id, "weights/again"))
    assert first.headers["etag"] != second.headers["etag"]
    assert first.content != second.content


def test_store_ignores_keys_and_logs_them(server, web, url):
    web.get(url)
    assert not any(entry.had_key for entry in server.journal.entries("store"))
    web.get(url, headers={"X-API-Key": server.api_key})
    assert server.journal.entries("store")[-1].had_key
