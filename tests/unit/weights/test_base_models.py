import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tinkerfs.weights.base_models import _KNOWN, BaseModel, BaseModels, default_hub_cache

CONFIG = {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"]}


def write_model(directory, names, config=CONFIG):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        {name: np.zeros((20, 3), np.float16) for name in names}, directory / "model.safetensors"
    )
    return directory


def test_known_models_need_no_files(tmp_path):
    models = BaseModels(None, str(tmp_path))
    assert models.get("Qwen/Qwen3-8B").has_lm_head
    assert models.get("meta-llama/Llama-3.2-1B").has_lm_head is False
    assert models.get("Qwen/Qwen3.5-4B").has_prefix
    assert models.get("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16").rows_of("7", "in_proj") == 10304


@pytest.mark.parametrize(
    "name",
    [
        "nobody/knows",
        "Qwen/Qwen3-4B",
        "thinkingmachines/Inkling",
        "zai-org/GLM-5.3",
        "deepseek-ai/DeepSeek-V4.1-Flash",
        "../../etc",
        "",
    ],
)
def test_models_without_sources_are_unknown(tmp_path, name):
    assert BaseModels(None, str(tmp_path)).get(name) is None


def test_each_known_model_is_listed_once():
    names = [name for names, _, _ in _KNOWN for name in names]
    assert len(names) == len(set(names))


def test_name_of_a_variant_is_that_of_its_model(tmp_path):
    models = BaseModels(None, str(tmp_path))
    assert models.get("openai/gpt-oss-20b:peft:131072") == models.get("openai/gpt-oss-20b")


@pytest.mark.parametrize("path", ["org/name", "name"])
def test_directory_of_models_has_precedence(tmp_path, path):
    names = [
        "backbone.layers.3.mixer.in_proj.weight",
        "model.language_model.embed_tokens.weight",
    ]
    write_model(tmp_path / path, names)
    assert BaseModels(str(tmp_path), str(tmp_path / "hub")).get("org/name") == BaseModel(
        name="org/name",
        model_type="nemotron_h",
        architectures=("NemotronHForCausalLM",),
        has_lm_head=False,
        has_prefix=True,
        rows={("3", "in_proj"): 20},
    )


def test_base_without_known_embedding_is_not_called_tied(tmp_path):
    write_model(tmp_path / "org/name", ["head.weight", "embed.weight"])
    assert BaseModels(str(tmp_path), str(tmp_path / "hub")).get("org/name").has_lm_head is None


def test_directory_without_tensor_names_counts_after_the_table(tmp_path):
    directory = tmp_path / "Qwen/Qwen3-8B"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text('{"model_type": "qwen3"}')
    assert BaseModels(str(tmp_path), str(tmp_path / "hub")).get("Qwen/Qwen3-8B").has_lm_head


def test_rows_of_mamba_layers_follow_from_the_config(tmp_path):
    sizes = {"mamba_num_heads": 64, "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128}
    write_model(tmp_path / "org/name", ["lm_head.weight"], CONFIG | sizes)
    base = BaseModels(str(tmp_path), str(tmp_path / "hub")).get("org/name")
    assert base.rows_of("7", "in_proj") == 10304
    assert base.rows_of("7", "out_proj") is None


def test_hub_cache_is_read_through_its_links(tmp_path):
    repository = tmp_path / "models--org--name"
    blobs = write_model(repository / "blobs", ["lm_head.weight"])
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc\n")
    assert BaseModels(None, str(tmp_path)).get("org/name").has_lm_head


def test_index_lists_names_of_absent_files(tmp_path):
    directory = tmp_path / "org/name"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert BaseModels(str(tmp_path), str(tmp_path)).get("org/name").has_lm_head


def test_config_without_tensors_leaves_the_output_layer_unknown(tmp_path):
    directory = tmp_path / "org/name"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    assert BaseModels(str(tmp_path), str(tmp_path)).get("org/name").has_lm_head is None


@pytest.mark.parametrize("text", ["", "[]", '{"a"'])
def test_damaged_config_is_an_error(tmp_path, text):
    directory = tmp_path / "org/name"
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(text)
    with pytest.raises(ValueError, match="not a JSON object"):
        BaseModels(str(tmp_path), str(tmp_path)).get("org/name")


def test_hub_cache_follows_the_environment(monkeypatch):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/u")
    assert default_hub_cache() == "/home/u/.cache/huggingface/hub"
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert default_hub_cache() == "/c/huggingface/hub"
    monkeypatch.setenv("HF_HOME", "/h")
    assert default_hub_cache() == "/h/hub"
    monkeypatch.setenv("HF_HUB_CACHE", "/hub")
    assert default_hub_cache() == "/hub"
