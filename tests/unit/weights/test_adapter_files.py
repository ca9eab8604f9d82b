"""Tests of the files that are made for serving engines: blocks, requests, refusals."""

import itertools
import json
import threading
from math import prod

import pytest

from tests.unit.weights.conftest import subject_of, truth
from tinkerfs import errors
from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.context import BACKGROUND_CONTEXT
from tinkerfs.demo.archive import tar_of
from tinkerfs.demo.content import Concat, Data, Noise
from tinkerfs.weights import adapters
from tinkerfs.weights.adapter_files import AdapterFiles
from tinkerfs.weights.prefetch import prefetch, required_cache_bytes
from tinkerfs.weights.readahead import HEADER_BYTES

MODEL = "adapter_model.safetensors"
ARCHIVE = "GET store/archive"
MIB = 1 << 20


@pytest.fixture
def moe_server(demo_server):
    """Return a server with a run of a mixture of experts."""
    server = demo_server(runs=1, size_bytes=40 * MIB)
    [run] = server.account.runs()
    run.base_model = "Qwen/Qwen3-30B-A3B"
    return server


def files_of(mount, name="unused"):
    return AdapterFiles(mount.weights, lambda _ctx: name)


def read(source, subject, name=MODEL):
    with source.open(subject, name, BACKGROUND_CONTEXT) as file:
        ranges = range(0, file.size_bytes, 256 << 10)
        return b"".join(file.read(256 << 10, offset, BACKGROUND_CONTEXT) for offset in ranges)


def traffic(server):
    """Return the number of requests to the store and the bytes that it sent, and reset both."""
    server.journal.wait_until_idle()
    entries = server.journal.entries(ARCHIVE)
    server.journal.clear()
    return len(entries), sum(entry.sent_bytes for entry in entries)


def test_adapter_downloads_only_its_header_in_addition(moe_server, weights_of):
    subject, mount = subject_of(moe_server), weights_of(moe_server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    traffic(moe_server)
    listing = files_of(mount).files(subject, BACKGROUND_CONTEXT)
    header_requests, header_bytes = traffic(moe_server)
    assert header_requests <= 3
    assert header_bytes < MIB
    data = read(files_of(mount), subject)
    assert len(data) == listing.members[MODEL].size_bytes > len(truth(moe_server, subject, MODEL))
    _requests, sent_bytes = traffic(moe_server)
    assert sent_bytes <= 40 * MIB + 2 * BLOCK_BYTES
    assert read(mount.weights, subject) == truth(moe_server, subject, MODEL)
    assert traffic(moe_server) == (0, 0)


def test_first_tensor_costs_one_block(demo_server, weights_of):
    server = demo_server(runs=1, size_bytes=100 * MIB)
    server.account.runs()[0].base_model = "Qwen/Qwen3-30B-A3B"
    subject, mount = subject_of(server), weights_of(server)
    with files_of(mount).open(subject, MODEL, BACKGROUND_CONTEXT) as file:
        traffic(server)
        header_bytes = int.from_bytes(file.read(8, 0, BACKGROUND_CONTEXT), "little")
        assert traffic(server) == (0, 0)
        file.read(header_bytes + 100, 8, BACKGROUND_CONTEXT)
        requests, sent_bytes = traffic(server)
    assert requests == 1
    assert sent_bytes <= BLOCK_BYTES


def test_long_header_is_read_without_requests(demo_server, weights_of):
    server = demo_server(runs=1)
    server.account.runs()[0].base_model = "Qwen/Qwen3-30B-A3B"
    entries, end = {}, 0
    for layer, leaf, side in itertools.product(range(12), ("w1", "w2", "w3"), "AB"):
        is_shared = (leaf == "w2") == (side == "B")
        shape = [1 if is_shared else 512, *((4, 256) if side == "A" else (256, 4))]
        begin, end = end, end + 4 * prod(shape)
        name = f"base_model.model.model.layers.{layer}.mlp.experts.{leaf}.lora_{side}.weight"
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    stored = Concat([Data(len(header).to_bytes(8, "little") + header), Noise(end, 0)])
    files = {MODEL: stored, "adapter_config.json": Data(CONFIG)}
    server.account.runs()[0].checkpoints[0].archive = tar_of(files, 1_700_000_000)
    subject, source = subject_of(server), files_of(weights_of(server), "Qwen/Qwen3-30B-A3B")
    with source.open(subject, MODEL, BACKGROUND_CONTEXT) as file:
        traffic(server)
        header_bytes = int.from_bytes(file.read(8, 0, BACKGROUND_CONTEXT), "little")
        assert header_bytes > HEADER_BYTES
        for offset in range(8, 8 + header_bytes, 256 << 10):
            size = min(256 << 10, 8 + header_bytes - offset)
            file.read(size, offset, BACKGROUND_CONTEXT)
        assert traffic(server) == (0, 0)
        file.read(100, 8 + header_bytes, BACKGROUND_CONTEXT)
        requests, sent_bytes = traffic(server)
    assert requests == 1
    assert sent_bytes <= BLOCK_BYTES


def test_adapter_of_a_later_mount_is_read_without_requests(moe_server, weights_of):
    subject, mount = subject_of(moe_server), weights_of(moe_server)
    expected = read(files_of(mount), subject)
    traffic(moe_server)
    later = files_of(weights_of(moe_server))
    listing = later.cached_files(subject)
    assert listing.members[MODEL].size_bytes == len(expected)
    assert later.cached_bytes(subject, MODEL) == len(expected)
    assert read(later, subject) == expected
    assert traffic(moe_server) == (0, 0)


def test_prefetched_adapter_is_cached_whole(moe_server, weights_of):
    subject, mount = subject_of(moe_server), weights_of(moe_server)
    with files_of(mount).open(subject, MODEL, BACKGROUND_CONTEXT) as file:
        assert 0 < file.cached_bytes() < file.size_bytes, "its own bytes are on disk"
        assert file.peek(file.size_bytes - 1, file.size_bytes) is None
        fetched = sum(each.size_bytes for each in prefetch([file], BACKGROUND_CONTEXT))
        assert file.cached_bytes() == file.size_bytes > fetched > 0
        data = file.peek(0, file.size_bytes)
        with mount.weights.open(subject, MODEL, BACKGROUND_CONTEXT) as stored:
            assert stored.key != file.key
            both = required_cache_bytes([file, stored])
            assert both == required_cache_bytes([stored]), "the blocks are the same"
    assert data == read(files_of(mount), subject)


def test_concurrent_callers_share_one_conversion(moe_server, weights_of, monkeypatch):
    conversions = []
    convert = adapters.convert

    def count(*args):
        conversions.append(args)
        return convert(*args)

    monkeypatch.setattr(adapters, "convert", count)
    subject, mount = subject_of(moe_server), weights_of(moe_server)
    mount.weights.files(subject, BACKGROUND_CONTEXT)
    files = files_of(mount)
    threads = [
        threading.Thread(target=files.files, args=(subject, BACKGROUND_CONTEXT)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files.files(subject, BACKGROUND_CONTEXT)
    assert len(conversions) == 1


CONFIG = b'{"r": 4, "lora_alpha": 8}'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({f"{MODEL}.age": b"x", "adapter_config.json.age": b"x"}, "encrypted"),
        ({"adapter_model.bin": b"x", "adapter_config.json": CONFIG}, "no rule for adapter_model"),
        ({"adapters.safetensors": b"x", "config.json": b"{}"}, "no rule for adapters.safetensors"),
        ({MODEL: b"\2" + bytes(7) + b"{}"}, "it has no adapter_config.json"),
        ({MODEL: b"\2" + bytes(7) + b"{}", "adapter_config.json": b"[]"}, "not a JSON object"),
        ({MODEL: b"\2" + bytes(7) + b"{}", "adapter_config.json": CONFIG}, "'unused' is unknown"),
    ],
)
def test_files_without_a_rule_are_listed_and_refused(demo_server, weights_of, files, message):
    server = demo_server(runs=1)
    content = {name: Data(data) for name, data in files.items()}
    server.account.runs()[0].checkpoints[0].archive = tar_of(content, 1_700_000_000)
    subject, source = subject_of(server), files_of(weights_of(server))
    listed = source.files(subject, BACKGROUND_CONTEXT).members
    assert {*listed} == {MODEL, "adapter_config.json", *(files.keys() & {"config.json"})}
    assert all(member.size_bytes for member in listed.values())
    for name in (MODEL, "adapter_config.json"):
        with pytest.raises(OSError, match=message) as caught:
            source.open(subject, name, BACKGROUND_CONTEXT)
        assert errors.is_unsupported(caught.value)
        assert "build_lora_adapter" in str(caught.value)


def test_base_model_is_that_of_the_checkpoint(weights_of, moe_server):
    subject = subject_of(moe_server)
    stored = {name: truth(moe_server, subject, name) for name in (MODEL,)}
    files = {MODEL: Data(stored[MODEL]), "adapter_config.json": Data(CONFIG)}
    moe_server.account.runs()[0].checkpoints[0].archive = tar_of(files, 1_700_000_000)
    source = files_of(weights_of(moe_server), "Qwen/Qwen3-30B-A3B")
    config = read(source, subject, "adapter_config.json")
    assert b'"base_model_name_or_path": "Qwen/Qwen3-30B-A3B"' in config
