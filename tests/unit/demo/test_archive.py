import io
import json
import math
import struct
import tarfile

import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tinkerfs.demo.archive import MIN_SIZE_BYTES, Adapter, adapter_files, gzipped, tar_of

adapters = st.builds(
    Adapter,
    base_model=st.sampled_from(["Qwen/Qwen3-8B", "openai/gpt-oss-20b", "a"]),
    lora_rank=st.sampled_from([1, 4, 8, 32, 128]),
    size_bytes=st.integers(MIN_SIZE_BYTES, 3_000_000),
    identity=st.text(max_size=5),
)


def whole(content):
    return content.read(0, content.size_bytes)


@given(adapters)
def test_files_have_the_total_size_of_the_record(adapter):
    assert sum(c.size_bytes for c in adapter_files(adapter).values()) == adapter.size_bytes


@given(adapters)
def test_tensors_fill_the_safetensors_file(adapter):
    data = whole(adapter_files(adapter)["adapter_model.safetensors"])
    (header_bytes,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + header_bytes])
    assert header.pop("__metadata__") == {"format": "pt"}
    end = 0
    for tensor in header.values():
        begin, stop = tensor["data_offsets"]
        assert begin == end
        assert stop - begin == 4 * math.prod(tensor["shape"])
        end = stop
    assert 8 + header_bytes + end == len(data)


@given(adapters)
def test_values_are_small_and_finite(adapter):
    data = whole(adapter_files(adapter)["adapter_model.safetensors"])
    values = struct.unpack("<8f", data[-32:])
    assert all(0 < abs(value) < 1 for value in values)


@given(adapters)
def test_tar_of_is_readable_by_tarfile(adapter):
    files = adapter_files(adapter)
    with tarfile.open(fileobj=io.BytesIO(whole(tar_of(files, 1_700_000_000)))) as archive:
        assert archive.getnames() == list(files)
        for name, content in files.items():
            assert archive.extractfile(name).read() == whole(content)
            assert archive.getmember(name).mtime == 1_700_000_000


@given(adapters, st.data())
def test_tar_range_is_a_slice_of_the_whole(adapter, data):
    content = tar_of(adapter_files(adapter), 0)
    start = data.draw(st.integers(0, content.size_bytes))
    stop = data.draw(st.integers(start, content.size_bytes))
    assert content.read(start, stop) == whole(content)[start:stop]


def test_config_contains_model_and_rank():
    files = adapter_files(Adapter("Qwen/Qwen3-8B", 16, 100_000, "x"))
    config = json.loads(whole(files["adapter_config.json"]))
    assert (config["base_model_name_or_path"], config["r"]) == ("Qwen/Qwen3-8B", 16)
    assert config["peft_type"] == "LORA"


def test_other_identity_has_other_weights_of_the_same_size():
    first, second = (
        whole(adapter_files(Adapter("m", 8, 50_000, identity))["adapter_model.safetensors"])
        for identity in ("a", "b")
    )
    assert len(first) == len(second)
    assert first[-1000:] != second[-1000:]


def test_huge_archive_is_read_at_any_offset_at_once():
    content = tar_of(adapter_files(Adapter("m", 64, 40 << 30, "huge")), 0)
    assert content.size_bytes > 40 << 30
    assert len(content.read(39 << 30, (39 << 30) + 4096)) == 4096
    assert content.read(content.size_bytes - 1024, content.size_bytes) == bytes(1024)


def test_gzipped_archive_is_readable_by_tarfile():
    content = gzipped(tar_of(adapter_files(Adapter("m", 8, 300_000, "x")), 0))
    with tarfile.open(fileobj=io.BytesIO(whole(content)), mode="r:gz") as archive:
        assert "adapter_model.safetensors" in archive.getnames()


@pytest.mark.parametrize(
    ("base_model", "name", "shape"),
    [
        ("Qwen/Qwen3-8B", "self_attn.q_proj.lora_A", 2),
        ("openai/gpt-oss-20b", "attn.q_proj.lora_A", 2),
        ("Qwen/Qwen3-30B-A3B", "mlp.experts.w1.lora_B", 3),
    ],
)
def test_adapter_has_the_names_of_its_family(base_model, name, shape):
    adapter = Adapter(base_model, 8, 1_000_000, "x")
    content = adapter_files(adapter)["adapter_model.safetensors"]
    tensors = safetensors.numpy.load(content.read(0, content.size_bytes))
    assert len(tensors[f"base_model.model.model.layers.0.{name}.weight"].shape) == shape
