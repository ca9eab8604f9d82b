"""Make adapters of tiny models, and load them as users of PEFT, transformers and safetensors do.

Run inside the loaders' environment, by interop_loaders.py. Takes requests on standard input and
answers each on standard output, a line of JSON: what was done, or `{"error": "..."}`.
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

#: Of one size that is read at once and one of several blocks; as many layers as tell them apart.
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
    """An adapter as it was saved, and the base that it is of.

    Args:
        name: of the base model, in `MODELS`.
        folder: where the base is saved, in `base`, and the adapter, in `adapter`.
    """

    def __init__(self, name: str, folder: Path) -> None:
        config, self._dtype, rank = MODELS[name]
        self._folder = folder
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config).to(self._dtype)
        made.save_pretrained(folder / "base")
        base = self.base()
        self._logits_of_base = logits(base)
        lora = peft.LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules="all-linear",
            init_lora_weights=False,  # where B is zero an adapter that is not loaded is not missed
            task_type="CAUSAL_LM",
        )
        self.saved = peft.get_peft_model(base, lora, autocast_adapter_dtype=False).eval()
        self.tensors = copy.deepcopy(peft.get_peft_model_state_dict(self.saved))
        self.logits = logits(self.saved)
        assert not torch.equal(self.logits, self._logits_of_base), "the adapter changes nothing"
        self.saved.save_pretrained(folder / "adapter")

    def base(self) -> Any:
        """Return the base model, as it is in a file."""
        path = self._folder / "base"
        return AutoModelForCausalLM.from_pretrained(path, dtype=self._dtype).eval()

    def loaded(self, path: str) -> Any:
        """Return the base with an adapter by PEFT, in the types that its file has."""
        return peft.PeftModel.from_pretrained(
            self.base(), path, autocast_adapter_dtype=False
        ).eval()

    def check(self, tensors: Tensors, model: Any) -> dict[str, Any]:
        """Compare what was loaded to what was saved."""
        told = compare(tensors, self.tensors)
        assert torch.equal(logits(model), self.logits), "other logits than those of what was saved"
        return told

    def peft(self, path: str) -> dict[str, Any]:
        """`PeftModel.from_pretrained`."""
        model = self.loaded(path)
        return self.check(peft.get_peft_model_state_dict(model), model)

    def transformers(self, path: str) -> dict[str, Any]:
        """The integration of PEFT into transformers, on the bare base model."""
        model = self.base()
        model.load_adapter(path)
        prefix = "base_model.model."
        tensors = {prefix + name: value for name, value in model.get_adapter_state_dict().items()}
        return self.check(tensors, model)

    def load_file(self, path: str) -> dict[str, Any]:
        """All tensors, by safetensors."""
        return compare(safetensors.torch.load_file(file_of(path)), self.tensors)

    def safe_open(self, path: str) -> dict[str, Any]:
        """One tensor, by safetensors, and a part of it."""
        with safetensors.safe_open(file_of(path), framework="pt") as file:
            names = sorted(file.keys())
            assert names == sorted(self.tensors)
            name = names[len(names) // 2]
            tensor, part = file.get_tensor(name), file.get_slice(name)[1:3]
        compare({"": part}, {"": self.tensors[name][1:3]})
        return compare({name: tensor}, {name: self.tensors[name]})

    def merge(self, path: str) -> dict[str, Any]:
        """Merged, saved and loaded again, it is what comes of merging what was saved."""
        merged = self.loaded(path).merge_and_unload()
        folder = self._folder / "merged"
        merged.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype).eval()
        expected = copy.deepcopy(self.saved).merge_and_unload()
        compare(merged.state_dict(), expected.state_dict())
        told = compare(again.state_dict(), expected.state_dict())
        assert torch.equal(logits(again), logits(expected)), "other logits after the merge"
        assert not torch.equal(logits(again), self._logits_of_base), "nothing was merged"
        return told


def logits(model: Any) -> torch.Tensor:
    """Return what a forward pass gives."""
    with torch.inference_mode():
        return model(TOKENS).logits


def file_of(path: str) -> str:
    """Return the file of the tensors in a folder."""
    return f"{path}/adapter_model.safetensors"


def compare(found: Tensors, expected: Tensors) -> dict[str, Any]:
    """Compare tensors bit for bit; return how many there are."""
    assert sorted(found) == sorted(expected), sorted(found.keys() ^ expected.keys())
    assert expected
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, (name, found[name].dtype, tensor.dtype)
        assert found[name].shape == tensor.shape, (name, found[name].shape, tensor.shape)
        assert torch.equal(bits(found[name]), bits(tensor)), f"other values in {name}"
    return {"tensors": len(expected)}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a tensor: -0.0 is not 0.0 there, and a NaN equals itself."""
    return tensor.detach().contiguous().view(torch.uint8)


def main() -> None:
    """Answer until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    transformers.utils.logging.disable_progress_bar()
    versions = {m.__name__: m.__version__ for m in (torch, transformers, peft, safetensors)}
    print(json.dumps({"versions": versions, "models": list(MODELS)}), file=answers, flush=True)
    adapters: dict[str, Adapter] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name, step, path = request["model"], request["step"], request["path"]
        try:
            if step == "make":
                adapters[name] = Adapter(name, Path(path))
                answer = {"tensors": len(adapters[name].tensors)}
            else:
                answer = getattr(adapters[name], step)(path)
        except Exception as error:  # noqa: BLE001 - told, and the next is tried
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
