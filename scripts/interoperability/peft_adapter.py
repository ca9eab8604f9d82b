"""Create adapters of tiny models; load them with PEFT, transformers, safetensors.

peft_loaders.py runs this script inside the environment of the loaders. Requests on standard
input and replies on standard output are lines of JSON. A reply is a result or `{"error": "..."}`.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import peft
import safetensors
import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

Tensors = dict[str, torch.Tensor]

#: One adapter fits into one read, the other has several blocks. Two layers are the minimum at which
#: the layers of a model can be confused.
MODELS = {
    "llama": (
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        torch.float32,
        16,
    ),
    "qwen2": (
        Qwen2Config(
            vocab_size=256,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
        ),
        torch.bfloat16,
        256,
    ),
}
TOKENS = torch.arange(48)[None]


class Adapter:
    """A saved adapter and its base model.

    Args:
        name: Name of the base model in `MODELS`.
        directory: Directory in which `base` and `adapter` are saved.
    """

    def __init__(self, name: str, directory: Path) -> None:
        config, self._dtype, rank = MODELS[name]
        self._directory = directory
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(self._dtype)
        model.save_pretrained(directory / "base")
        base = self.base()
        self._logits_of_base = logits(base)
        lora = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules="all-linear",
            init_lora_weights=False,  # with B = 0, an adapter would have no effect
            task_type="CAUSAL_LM",
        )
        self.saved = peft.get_peft_model(base, lora, autocast_adapter_dtype=False).eval()
        self.tensors = copy.deepcopy(peft.get_peft_model_state_dict(self.saved))
        self.logits = logits(self.saved)
        assert not torch.equal(self.logits, self._logits_of_base), "the adapter changes nothing"
        # Its name below --base-models.
        self.saved.peft_config["default"].base_model_name_or_path = f"{name}/base"
        self.saved.save_pretrained(directory / "adapter")

    def base(self) -> Any:
        """Load the base model from its file."""
        path = self._directory / "base"
        return AutoModelForCausalLM.from_pretrained(path, dtype=self._dtype).eval()

    def loaded(self, path: str) -> Any:
        """Load the base model and an adapter with PEFT, in the dtypes of the files."""
        return peft.PeftModel.from_pretrained(
            self.base(), path, autocast_adapter_dtype=False
        ).eval()

    def check(self, tensors: Tensors, model: Any) -> dict[str, Any]:
        """Compare loaded tensors and logits of a model with those of the saved adapter."""
        result = compare(tensors, self.tensors)
        assert torch.equal(logits(model), self.logits), (
            "the logits differ from those of the saved adapter"
        )
        return result

    def peft(self, path: str) -> dict[str, Any]:
        """`PeftModel.from_pretrained`."""
        model = self.loaded(path)
        return self.check(peft.get_peft_model_state_dict(model), model)

    def transformers(self, path: str) -> dict[str, Any]:
        """`load_adapter` of the transformers integration, on the base model."""
        model = self.base()
        model.load_adapter(path)
        prefix = "base_model.model."
        tensors = {prefix + name: value for name, value in model.get_adapter_state_dict().items()}
        return self.check(tensors, model)

    def load_file(self, path: str) -> dict[str, Any]:
        """Load all tensors with `safetensors.torch.load_file`."""
        return compare(safetensors.torch.load_file(file_of(path)), self.tensors)

    def safe_open(self, path: str) -> dict[str, Any]:
        """Read one tensor and a slice of it with `safetensors.safe_open`."""
        with safetensors.safe_open(file_of(path), framework="pt") as file:
            names = sorted(file.keys())
            assert names == sorted(self.tensors)
            name = names[len(names) // 2]
            tensor, part = file.get_tensor(name), file.get_slice(name)[1:3]
        compare({"": part}, {"": self.tensors[name][1:3]})
        return compare({name: tensor}, {name: self.tensors[name]})

    def merge(self, path: str) -> dict[str, Any]:
        """Merge, save and load the model; compare it with a merge of the saved adapter."""
        merged = self.loaded(path).merge_and_unload()
        directory = self._directory / "merged"
        merged.save_pretrained(directory)
        again = AutoModelForCausalLM.from_pretrained(directory, dtype=self._dtype).eval()
        expected = copy.deepcopy(self.saved).merge_and_unload()
        compare(merged.state_dict(), expected.state_dict())
        result = compare(again.state_dict(), expected.state_dict())
        assert torch.equal(logits(again), logits(expected)), "the logits differ after the merge"
        assert not torch.equal(logits(again), self._logits_of_base), "the merge has no effect"
        return result


def logits(model: Any) -> torch.Tensor:
    """Return the logits of a forward pass."""
    with torch.inference_mode():
        return model(TOKENS).logits


def file_of(path: str) -> str:
    """Return the path of the tensor file in a directory."""
    return f"{path}/adapter_model.safetensors"


def compare(found: Tensors, expected: Tensors) -> dict[str, Any]:
    """Compare tensors bit for bit; return their number."""
    assert sorted(found) == sorted(expected), sorted(found.keys() ^ expected.keys())
    assert expected
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, (name, found[name].dtype, tensor.dtype)
        assert found[name].shape == tensor.shape, (name, found[name].shape, tensor.shape)
        assert torch.equal(bits(found[name]), bits(tensor)), f"different values in {name}"
    return {"tensors": len(expected)}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor; in these -0.0 is not 0.0 and NaN equals itself."""
    return tensor.detach().contiguous().view(torch.uint8)


def main() -> None:
    """Process requests until standard input ends."""
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries may print to standard output
    transformers.utils.logging.disable_progress_bar()
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, safetensors)}
    print(json.dumps({"versions": versions, "models": list(MODELS)}), file=replies, flush=True)
    adapters: dict[str, Adapter] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name, step, path = request["model"], request["step"], request["path"]
        try:
            if step == "make":
                adapters[name] = Adapter(name, Path(path))
                reply: dict[str, Any] = {"tensors": len(adapters[name].tensors)}
            else:
                reply = getattr(adapters[name], step)(path)
        except Exception as error:  # noqa: BLE001 - reported, and the next request is processed
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
