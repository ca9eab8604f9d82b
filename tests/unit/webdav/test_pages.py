"""Tests of the pages for a browser: what they show, escape and cost."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from urllib.parse import quote

import pytest

from tests.support.account import HOSTILE_NAMES


class Page(HTMLParser):
    """The tags, links and table cells of a page."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tags, self.links, self.rows = text, set(), [], []
        self._cell = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "a":
            self.links.append(dict(attrs)["href"])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._cell = ""

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.rows[-1].append(self._cell)
            self._cell = None


def page_of(site, path, query=""):
    response = site.client.request("GET", quote(path, errors="surrogateescape") + query)
    assert response.status == 200
    assert response.headers.get_content_type() == "text/html"
    return Page(response.text)


def test_page_of_1000_runs_requests_only_the_listing(make_site):
    site = make_site(runs=1000, checkpoints=1)
    page = page_of(site, "/runs/")
    assert set(site.calls()) == {"GET training_runs"}
    header, *rows = page.rows
    assert [name.split(" ")[0] for name in header] == ["Name", "Time", "Base", "LoRA"]
    assert len(rows) == 1000
    times = [row[1] for row in rows]
    assert times == sorted(times, reverse=True)
    page_of(site, "/models/")
    assert site.calls() == []


def test_page_of_a_view_requests_only_the_account_listing(make_site):
    site = make_site(runs=20, checkpoints=3)
    page = page_of(site, "/checkpoints/")
    assert set(site.calls()) == {"GET checkpoints"}
    assert len(page.rows) == 61
    assert sum("tinker://" in cell for row in page.rows for cell in row) == 60


def test_page_of_a_checkpoint_shows_its_values(site):
    page = page_of(site, f"{site.checkpoint}/")
    values = dict(row for row in page.rows if len(row) == 2)
    run = site.server.account.runs()[0]
    assert values["base_model"] == run.base_model
    assert f"tinker://{run.id}/{run.checkpoints[0].id}" in page.text
    assert "GET archive" not in site.calls()
    assert quote(f"{site.checkpoint}/tensors.json", safe="/:") not in page.text
    assert any(link.endswith("/tensors.json?view") for link in page.links)
    assert any(link.endswith("/files/") for link in page.links)


def test_tensors_are_shown_as_a_table(shared_site):
    page = page_of(shared_site, f"{shared_site.checkpoint}/tensors.json", "?view")
    start = next(index for index, row in enumerate(page.rows) if "dtype" in row)
    header, *rows = page.rows[start:]
    assert set(header) == {"name", "bytes", "dtype", "shape"}
    assert len(rows) > 3
    assert all("lora" in row[0] for row in rows)


def test_json_file_without_a_query_is_sent_as_it_is(shared_site):
    response = shared_site.client.send("GET", f"{shared_site.run}/info.json")
    assert response.headers.get_content_type() == "application/json"


@pytest.mark.parametrize("column", ["name", "time", "model", "rank", "size", "expires", "public"])
def test_pages_sort_by_every_column(shared_site, column):
    ascending = page_of(shared_site, "/checkpoints/", f"?sort={column}").rows[1:]
    descending = page_of(shared_site, "/checkpoints/", f"?sort={column}&order=desc").rows[1:]
    assert sorted(ascending) == sorted(descending)
    page = page_of(shared_site, "/checkpoints/", "?sort=nothing&order=%00&sort=%3Cscript%3E")
    assert "script" not in page.tags


@pytest.mark.expect_warnings("weights info EINVAL")
def test_pages_escape_every_name(site):
    run = site.server.account.add_run(base_model="<script>alert(1)</script>/<img src=x>")
    for name in (*HOSTILE_NAMES, '<script>alert("x")</script>', "'\"><img src=x onerror=x>"):
        if "/" not in name:
            site.server.account.add_checkpoint(run.id, f"weights/{name}")
    site.client.send("PUT", "/.tinkerfs/refresh", b"1")
    directory = f"/runs/{run.id}/checkpoints/weights"
    names = site.client.listdir(directory)
    page = page_of(site, directory)
    assert not page.tags & {"script", "img", "iframe", "form", "input", "object"}
    for link in page.links:
        assert link.startswith(("/", "?"))
        assert not link.startswith("//")
    for name in names:
        inner = page_of(site, f"{directory}/{name}/")
        assert not inner.tags & {"script", "img"}


def test_policy_of_a_page_allows_its_style_alone(shared_site):
    response = shared_site.client.send("GET", "/runs/")
    style = re.search(r"<style>(.*?)</style>", response.text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; ")
    assert "on" not in Page(response.text).tags


def test_root_page_shows_the_guide(shared_site):
    page = page_of(shared_site, "/")
    assert "Your Tinker training runs" in page.text
    assert "/runs/" in page.links
    head = shared_site.client.request("HEAD", "/")
    assert (head.status, head.body) == (200, b"")
    assert head.headers.get_content_type() == "text/html"


@pytest.mark.expect_warnings("EIO")
def test_page_of_a_failed_listing_has_the_status(site):
    headers = {"x-should-retry": "false"}
    site.server.faults.add("GET training_runs", times=None, status=500, headers=headers)
    response = site.client.request("GET", "/runs/")
    assert (response.status, response.text.partition(":")[0]) == (500, "EIO")
