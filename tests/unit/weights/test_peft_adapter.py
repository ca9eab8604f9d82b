import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load, save

from tinkerfs.weights import peft_adapter
from tinkerfs.weights.adapter_families import family_of
from tinkerfs.weights.base_models import BaseModel
from tinkerfs.weights.peft_adapter import ConversionError, convert, pass_on

CONFIG = {"r": 4, "lora_alpha": 8}
LLAMA = BaseModel(name="meta-llama/Llama-3.1-8B", model_type="llama", has_lm_head=True)
TIED = BaseModel(name="Qwen/Qwen3-4B", model_type="qwen3", has_lm_head=False)
TIED_VISION = BaseModel(
    name="Qwen/Qwen3.5-4B", model_type="qwen3_5", has_lm_head=False, has_prefix=True
)
VISION = BaseModel(
    name="Qwen/Qwen3.5-9B",
    model_type="qwen3_5",
    has_lm_head=True,
    has_prefix=True,
    rows={("1", "in_proj_qkv"): 20},
)
GPT_OSS = BaseModel(
    name="openai/gpt-oss-20b",
    model_type="gpt_oss",
    architectures=("GptOssForCausalLM",),
    has_lm_head=True,
)
NEMOTRON = BaseModel(
    name="nvidia/Nemotron-3-Nano",
    model_type="nemotron_h",
    architectures=("NemotronHForCausalLM",),
    has_lm_head=True,
    rows={("0", "in_proj"): 20},
)
NEMOTRON_VISION = BaseModel(
    name="nvidia/Nemotron-3.5-Super-VL",
    model_type="nemotron_h_vl",
    architectures=("NemotronH_VL",),
    has_lm_head=True,
)
DEEPSEEK = BaseModel(name="deepseek-ai/DeepSeek-V3.1", model_type="deepseek_v3", has_lm_head=True)


def factors(module, rank=4, rows=6, columns=5, experts=None, dtype=np.float32, seed=0):
    """Return the two factors of a module by name; `experts` is (experts of A, experts of B)."""
    rng = np.random.default_rng(abs(hash((module, seed))) % 2**32)
    before_a, before_b = ((), ()) if experts is None else ((experts[0],), (experts[1],))
    a = rng.standard_normal((*before_a, rank, columns)).astype(dtype)
    b = rng.standard_normal((*before_b, rows, rank)).astype(dtype)
    prefix = f"base_model.model.{module}"
    return {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return data[8 : 8 + length]


def materialize(data, adapter, step=None):
    """Return the bytes of the converted file, read in steps."""

    def read_source(view, start):
        view[:] = data[start : start + len(view)]

    size = adapter.extents.size_bytes
    result = bytearray(size)
    step = step or max(size, 1)
    for offset in range(0, size, step):
        adapter.extents.read_into(memoryview(result)[offset : offset + step], offset, read_source)
    return bytes(result)


def converted(tensors, base, config=CONFIG, step=None, layout="peft"):
    """Return the tensors and the config that `convert` makes of some tensors."""
    data = save(tensors)
    adapter = convert(header_of(data), len(data), config, base, layout)
    return load(materialize(data, adapter, step)), json.loads(adapter.config)


def assert_equal(found, expected):
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert found[name].tobytes() == value.tobytes(), name


def test_dense_adapter_is_passed_on_as_it_is():
    tensors = factors("model.layers.0.self_attn.q_proj") | factors("model.layers.0.mlp.up_proj")
    data = save(tensors)
    adapter = convert(header_of(data), len(data), CONFIG, LLAMA)
    assert materialize(data, adapter) == data
    assert json.loads(adapter.config)["target_modules"] == ["q_proj", "up_proj"]


@pytest.mark.parametrize("base", [LLAMA, VISION])
def test_unembedding_is_named_lm_head(base):
    found, config = converted(factors("model.unembed_tokens"), base)
    expected = factors("model.unembed_tokens").values()
    names = [f"base_model.model.lm_head.lora_{side}.weight" for side in "AB"]
    assert_equal(found, dict(zip(names, expected, strict=True)))
    assert config["target_modules"] == ["lm_head"]


@pytest.mark.parametrize("module", ["model.unembed_tokens", "model.embed_tokens"])
@pytest.mark.parametrize("base", [TIED, TIED_VISION])
def test_tied_unembedding_is_refused(base, module):
    with pytest.raises(ConversionError, match="train_unembed=False") as caught:
        converted(factors(module), base)
    assert "build_hf_model" in caught.value.hint


@pytest.mark.parametrize(
    ("base", "module", "renamed"),
    [
        (GPT_OSS, "model.layers.0.attn.q_proj", "model.layers.0.self_attn.q_proj"),
        (VISION, "model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),
        (NEMOTRON, "backbone.layers.0.mixer.q_proj", "model.layers.0.mixer.q_proj"),
        (NEMOTRON, "model.lm_head", "lm_head"),
    ],
)
def test_modules_get_the_names_of_the_family(base, module, renamed):
    found, _config = converted(factors(module), base)
    expected = {name.replace(module, renamed): value for name, value in factors(module).items()}
    assert_equal(found, expected)
    again, _config = converted(found, base)
    assert_equal(again, expected)


def test_data_keep_their_place_in_a_page():
    data = save(factors("model.layers.0.attn.q_proj", columns=2000))
    adapter = convert(header_of(data), len(data), CONFIG, GPT_OSS)
    result = materialize(data, adapter)
    start, new_start = 8 + len(header_of(data)), 8 + len(header_of(result))
    assert (new_start - start) % 4096 == 0
    assert result[new_start:] == data[start:]
    assert len(adapter.extents) == 2, "a header, and all data in one range"


EXPERTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


@given(
    st.dictionaries(
        st.sampled_from(sorted(EXPERTS)),
        st.tuples(st.booleans(), st.booleans()).filter(lambda shared: not all(shared)),
        min_size=1,
    ),
    st.integers(2, 9),
    st.sampled_from([np.float32, np.float16]),
    st.integers(1, 300),
)
def test_experts_are_divided_and_shared_factors_repeated(projections, count, dtype, step):
    tensors, expected = {}, {}
    for leaf, (is_a_shared, is_b_shared) in projections.items():
        module = f"model.layers.3.mlp.experts.{leaf}"
        experts = (1 if is_a_shared else count, 1 if is_b_shared else count)
        pair = factors(module, experts=experts, dtype=dtype)
        tensors |= pair
        for side, value in zip("AB", pair.values(), strict=True):
            for index in range(count):
                name = f"base_model.model.model.layers.3.mlp.experts.{index}.{EXPERTS[leaf]}"
                expected[f"{name}.lora_{side}.weight"] = value[index if len(value) > 1 else 0]
    found, config = converted(tensors, LLAMA, step=step)
    assert_equal(found, expected)
    assert config["target_modules"] == sorted(EXPERTS[leaf] for leaf in projections)


def layer_of_experts(count, dtype=np.float32, rank=4, names=("w1", "w3", "w2"), path="mlp"):
    """Return the factors of experts, with A of w1 and w3 and B of w2 shared by all."""
    tensors = {}
    for leaf in names:
        experts = (count, 1) if leaf == "w2" else (1, count)
        module = f"model.layers.3.{path}.experts.{leaf}"
        tensors |= factors(module, rank=rank, experts=experts, dtype=dtype)
    return tensors


@given(
    st.integers(2, 9),
    st.integers(1, 5),
    st.sampled_from([np.float32, np.float16]),
    st.integers(1, 300),
    st.sampled_from([LLAMA, GPT_OSS, VISION]),
)
def test_packed_experts_are_the_stacked_ones_of_peft(count, rank, dtype, step, base):
    tensors = layer_of_experts(count, dtype, rank) | factors("model.layers.3.attn.q_proj")
    packed, packed_config = converted(tensors, base, step=step, layout="packed")
    peft, config = converted(tensors, base, step=step)
    assert packed_config == config
    for name, value in packed.items():
        before, _, rest = name.partition(".experts.")
        if not rest:
            assert value.tobytes() == peft.pop(name).tobytes()
            continue
        leaf, side = rest.split(".", 1)
        ones = [peft.pop(f"{before}.experts.{i}.{EXPERTS[leaf]}.{side}") for i in range(count)]
        is_shared = (leaf == "w2") == side.startswith("lora_B")
        assert len(value) == (1 if is_shared else count)
        assert value.dtype == ones[0].dtype
        assert np.array_equal(np.broadcast_to(value, (count, *value.shape[1:])), np.stack(ones))
    assert not peft, "no expert is missing"


def test_packed_experts_of_a_plain_base_are_the_stored_bytes():
    data = save(layer_of_experts(3))
    adapter = convert(header_of(data), len(data), CONFIG, LLAMA, "packed")
    assert materialize(data, adapter) == data
    targets = json.loads(adapter.config)["target_modules"]
    assert targets == ["down_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize("with_empty_w3", [False, True])
def test_packed_experts_without_a_gate_have_an_empty_w3(with_empty_w3):
    tensors = layer_of_experts(3, names=("w1", "w2"), path="mixer")
    module = "base_model.model.model.layers.3.mixer.experts"
    empty = {
        f"{module}.w3.lora_A.weight": np.zeros((3, 0, 5), np.float32),
        f"{module}.w3.lora_B.weight": np.zeros((3, 6, 0), np.float32),
    }
    found, config = converted(tensors | (empty if with_empty_w3 else {}), NEMOTRON, layout="packed")
    a = np.zeros((1, 0, 5), np.float32)
    b = np.zeros((3, 0, 4), np.float32)
    assert_equal(
        found, tensors | {f"{module}.w3.lora_A.weight": a, f"{module}.w3.lora_B.weight": b}
    )
    assert config["target_modules"] == ["down_proj", "up_proj"]


def test_dense_adapter_is_the_same_in_both_layouts():
    tensors = factors("model.layers.0.attn.q_proj") | factors("model.unembed_tokens")
    packed, config = converted(tensors, GPT_OSS, layout="packed")
    expected, expected_config = converted(tensors, GPT_OSS)
    assert_equal(packed, expected)
    assert config == expected_config


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (layer_of_experts(3, names=("w1", "w2")), "has w1, w2, but the packed layout requires"),
        (
            layer_of_experts(3) | factors("model.layers.3.mlp.experts.w1", experts=(3, 3)),
            "each expert has its own A of model.layers.3.mlp.experts.w1",
        ),
        (
            layer_of_experts(3) | factors("model.layers.3.mlp.experts.w2", experts=(3, 3)),
            "each expert has its own B of model.layers.3.mlp.experts.w2",
        ),
        (
            layer_of_experts(3) | factors("model.layers.3.mlp.experts.w3", experts=(1, 2)),
            "has projections of 2 and 3 experts",
        ),
    ],
)
def test_experts_that_cannot_be_packed_are_refused(tensors, message):
    with pytest.raises(ConversionError, match=message):
        converted(tensors, LLAMA, layout="packed")


def test_empty_projection_of_experts_is_left_out():
    module = "model.layers.0.mixer.experts"
    tensors = factors(f"{module}.w1", experts=(1, 2)) | factors(f"{module}.w2", experts=(2, 1))
    empty = {
        f"base_model.model.{module}.w3.lora_A.weight": np.zeros((2, 0, 5), np.float32),
        f"base_model.model.{module}.w3.lora_B.weight": np.zeros((2, 6, 0), np.float32),
    }
    found, config = converted(tensors | empty, NEMOTRON)
    assert config["target_modules"] == ["down_proj", "up_proj"]
    assert len(found) == 8


def test_fused_module_stacks_a_and_places_b_diagonally():
    mixer = "model.layers.0.mixer"
    gate, x = factors(f"{mixer}.gate_proj", rows=7), factors(f"{mixer}.x_proj", rows=9)
    found, config = converted(gate | x, NEMOTRON, step=13)
    (gate_a, gate_b), (x_a, x_b) = gate.values(), x.values()
    b = np.zeros((20, 8), np.float32)
    b[:7, :4], b[7:16, 4:] = gate_b, x_b
    name = f"base_model.model.{mixer}.in_proj"
    expected = {
        f"{name}.lora_A.weight": np.concatenate([gate_a, x_a]),
        f"{name}.lora_B.weight": b,
    }
    assert_equal(found, expected)
    assert config["rank_pattern"] == {"in_proj": 8}
    assert config["alpha_pattern"] == {"in_proj": 16}


@pytest.mark.parametrize("rows", [{("1", "in_proj_qkv"): 20}, {}])
def test_split_qkv_is_joined_with_the_same_product(rows):
    path = "model.layers.1.linear_attn"
    sizes = {"q": 4, "k": 4, "v": 12}
    parts = {part: factors(f"{path}.in_proj_{part}", rows=size) for part, size in sizes.items()}
    tensors = {name: value for pair in parts.values() for name, value in pair.items()}
    z = factors(f"{path}.in_proj_z")
    base = BaseModel(name="x", model_type="qwen3_5_moe", has_lm_head=True, rows=rows)
    found, config = converted(tensors | z, base, step=17)
    name = f"base_model.model.{path}.in_proj_qkv"
    a, b = (found.pop(f"{name}.lora_{side}.weight") for side in "AB")
    assert_equal(found, z)
    assert (a.shape, b.shape) == ((12, 5), (20, 12))
    expected = np.concatenate([b @ a for a, b in (pair.values() for pair in parts.values())])
    assert np.array_equal(b @ a, expected)
    assert config["rank_pattern"] == {"in_proj_qkv": 12}
    assert config["alpha_pattern"] == {"in_proj_qkv": 24}
    assert config["target_modules"] == ["in_proj_qkv", "in_proj_z"]


@pytest.mark.parametrize(
    ("targets", "is_kept"),
    [
        (["q_proj"], True),
        (["self_attn.q_proj"], True),
        (["model.layers.0.self_attn.q_proj", "v_proj"], True),
        (["proj", "layers.0"], False),
        ("all-linear", False),
    ],
)
def test_config_that_names_all_modules_is_kept(targets, is_kept):
    config = CONFIG | {"peft_type": "LORA", "base_model_name_or_path": "x"}
    data = save(factors("model.layers.0.self_attn.q_proj"))
    adapter = convert(header_of(data), len(data), config | {"target_modules": targets}, LLAMA)
    assert (adapter.config is None) == is_kept


def test_config_is_that_of_a_peft_adapter():
    _found, config = converted(factors("model.layers.0.mlp.up_proj"), LLAMA)
    assert config == {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": "meta-llama/Llama-3.1-8B",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "r": 4,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["up_proj"],
        "task_type": "CAUSAL_LM",
    }


@pytest.mark.parametrize(
    ("base", "tensors", "message"),
    [
        (DEEPSEEK, factors("model.layers.0.mlp.up_proj"), "DeepSeek V3"),
        (NEMOTRON_VISION, factors("model.layers.0.mlp.up_proj"), "with vision or sound"),
        (LLAMA, {"x": np.zeros(3, np.float32)}, "'x' is not the name"),
        (LLAMA, dict([*factors("model.a").items()][:1]), "one of the two factors of 'model.a'"),
        (LLAMA, {}, "no LoRA factors"),
        (LLAMA, factors("m.experts.w1", experts=(2, 3)), "are of"),
        (LLAMA, factors("m.experts.w1", experts=(1, 1)), "are of"),
        (LLAMA, factors("m.experts.w1"), "no dimension of experts"),
        (LLAMA, factors("model.layers.0.up_proj", experts=(2, 2)), "have the shapes"),
        (NEMOTRON, factors("model.layers.0.mixer.x_proj"), "lacks its part gate_proj"),
        (
            NEMOTRON,
            factors("model.layers.1.mixer.x_proj") | factors("model.layers.1.mixer.gate_proj"),
            r"the rows of model.layers.1.mixer.in_proj \(hint: --base-models\)",
        ),
        (
            NEMOTRON,
            factors("model.layers.0.mixer.x_proj", rows=15)
            | factors("model.layers.0.mixer.gate_proj"),
            "do not fit together",
        ),
        (VISION, factors("model.layers.1.linear_attn.in_proj_q"), "lacks its part in_proj_k"),
        (
            VISION,
            {
                name: value
                for part in "qkv"
                for name, value in factors(f"model.layers.1.linear_attn.in_proj_{part}").items()
            },
            "the parts of .*in_proj_qkv do not fit together",
        ),
        (
            GPT_OSS,
            factors("model.attn.q_proj") | factors("model.self_attn.q_proj"),
            "two tensors would be named",
        ),
        (
            BaseModel(name="new/model", model_type="new"),
            factors("model.unembed_tokens"),
            "not known of new/model: whether its output layer is tied",
        ),
    ],
)
def test_adapter_without_a_rule_is_refused(base, tensors, message):
    with pytest.raises(ConversionError, match=message):
        converted(tensors, base)


PEFT_CONFIG = CONFIG | {"peft_type": "LORA", "base_model_name_or_path": "someone/new"}
EXPERT = "model.layers.0.mlp.experts.0.gate_proj"


def passed_on(tensors, base, targets, layout="peft"):
    """Return whether an adapter with PEFT's configuration is passed on as it is."""
    data = save(tensors)
    config = PEFT_CONFIG | {"target_modules": targets, "use_rslora": True}
    adapter = pass_on(header_of(data), len(data), config, base and family_of(base), layout)
    if adapter is None:
        return False
    assert materialize(data, adapter) == data
    assert (adapter.config, adapter.header) == (None, None)
    return True


@pytest.mark.parametrize("base", [None, LLAMA, DEEPSEEK, GPT_OSS, VISION])
def test_adapter_in_the_form_of_peft_is_passed_on(base):
    tensors = factors(EXPERT) | factors("model.layers.0.self_attn.q_proj")
    embedding = "base_model.model.model.embed_tokens.lora_embedding"
    tensors |= {f"{embedding}_A": np.zeros((4, 9)), f"{embedding}_B": np.zeros((5, 4))}
    assert passed_on(tensors, base, ["gate_proj", "q_proj", "embed_tokens"])


@pytest.mark.parametrize(
    ("base", "tensors", "targets"),
    [
        (None, factors(EXPERT), "all-linear"),
        (None, factors(EXPERT), ["up_proj"]),
        (None, factors("model.unembed_tokens"), ["unembed_tokens"]),
        (None, factors("model.embed_tokens"), ["embed_tokens"]),
        (None, factors("m.experts.w1", experts=(1, 2)), ["w1"]),
        (None, factors("m.experts.w1"), ["w1"]),
        (None, factors("m.q_proj", experts=(2, 2)), ["q_proj"]),
        (None, factors("m.q_proj") | {"x": np.zeros(3)}, ["q_proj"]),
        (GPT_OSS, factors("model.layers.0.attn.q_proj"), ["q_proj"]),
        (VISION, factors("model.layers.0.linear_attn.in_proj_q"), ["in_proj_q"]),
        (NEMOTRON, factors("backbone.layers.0.mixer.q_proj"), ["q_proj"]),
    ],
)
def test_adapter_that_needs_a_rule_is_not_passed_on(base, tensors, targets):
    assert not passed_on(tensors, base, targets)


def test_experts_of_peft_are_refused_in_the_packed_layout():
    with pytest.raises(ConversionError, match="one tensor per expert already"):
        passed_on(factors(EXPERT), LLAMA, ["gate_proj"], "packed")
    assert passed_on(factors("model.layers.0.mlp.gate_proj"), LLAMA, ["gate_proj"], "packed")


@pytest.mark.parametrize("config", [{}, {"r": 4}, {"r": "4", "lora_alpha": 8}, {"r": True}])
def test_config_without_rank_and_alpha_is_refused(config):
    with pytest.raises(ConversionError, match=r"adapter_config\.json has no number"):
        converted(factors("model.layers.0.mlp.up_proj"), LLAMA, config)


def test_header_over_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(peft_adapter, "MAX_HEADER_BYTES", 10_000)
    with pytest.raises(ConversionError, match="longer than the format allows"):
        converted(factors("m.experts.w1", experts=(1, 500)), LLAMA)


def test_experts_without_bytes_are_refused_before_they_are_named():
    module = "base_model.model.m.experts.w1"
    tensors = {
        f"{module}.lora_A.weight": np.zeros((10**12, 4, 0), np.float32),
        f"{module}.lora_B.weight": np.zeros((1, 6, 4), np.float32),
    }
    with pytest.raises(ConversionError, match="experts"):
        converted(tensors, LLAMA)


def test_names_are_escaped_in_the_header():
    module = 'model.a"\\\t, é.b'
    found, _config = converted(factors(f"{module}.experts.w1", experts=(2, 2)), LLAMA)
    names = {f"base_model.model.{module}.experts.{i}.gate_proj.lora_A.weight" for i in range(2)}
    assert names < set(found)


@given(st.binary(max_size=200))
def test_damaged_header_is_refused(header):
    with pytest.raises(ConversionError):
        convert(header, 8 + len(header) + 100, CONFIG, LLAMA)


def test_file_with_a_hole_or_trailing_bytes_is_refused():
    data = save(factors("model.layers.0.attn.q_proj"))
    header = header_of(data)
    with pytest.raises(ConversionError, match="after its last tensor"):
        convert(header, len(data) + 1, CONFIG, GPT_OSS)
    entries = json.loads(header)
    name = "base_model.model.model.layers.0.attn.q_proj.lora_A.weight"
    begin, end = entries[name]["data_offsets"]
    entries[name]["data_offsets"] = [begin + 4, end + 4]
    header = json.dumps(entries).encode()
    with pytest.raises(ConversionError, match="a hole or overlaps"):
        convert(header, 8 + len(header) + len(data), CONFIG, GPT_OSS)
