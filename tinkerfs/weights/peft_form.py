"""Recognize adapters that are in PEFT's form already (pure)."""

import re
from collections.abc import Iterable, Mapping, Set
from typing import Any, Final

from tinkerfs.weights.adapter_families import Family
from tinkerfs.weights.safetensors_header import Tensor

#: The name of a factor of a linear module.
LORA_NAME: Final = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

#: Tinker's path of a projection of all experts. PEFT's has the number of an expert in it.
EXPERTS: Final = re.compile(r"(?P<before>.+\.experts)\.(?P<leaf>[A-Za-z]\w*)")

#: Other tensors that PEFT saves: factors of embeddings, and magnitudes of DoRA (PEFT 0.21,
#: tuners/lora/layer.py, `adapter_layer_names`).
_OTHER_NAME: Final = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(embedding_[AB]|magnitude_vector(\.weight)?)"
)

#: Modules that the cookbook gives factors of these names. PEFT has other ones for an embedding.
_NOT_LINEAR: Final = ("unembed_tokens", "embed_tokens")


def is_peft_form(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], family: Family | None
) -> bool:
    """Return whether an adapter has PEFT's names, shapes and configuration.

    The names of many dense adapters are the same in both forms. Only PEFT's configuration lists
    the modules by name.

    Args:
        tensors: the tensors by name.
        config: its `adapter_config.json`.
        family: the family of its base model, None if it is unknown.
    """
    modules = set()
    for name, tensor in tensors.items():
        factor = LORA_NAME.fullmatch(name)
        match = factor or _OTHER_NAME.fullmatch(name)
        if match is None or (factor and len(tensor.shape) != 2):
            return False
        if factor and factor["module"].rpartition(".")[2] in _NOT_LINEAR:
            return False
        modules.add(match["module"])
    if not modules or any(map(EXPERTS.fullmatch, modules)) or not is_complete(config, modules):
        return False
    parts: set[str] = set()
    renamed: tuple[str, ...] = ()
    if family is not None:
        parts.update(part for fused in family.fused for part in fused.parts)
        renamed = tuple(old for old, _new in family.renames)
    return not any(
        module.rpartition(".")[2] in parts or any(old in f"{module}." for old in renamed)
        for module in modules
    )


def is_complete(config: Mapping[str, Any], paths: Iterable[str]) -> bool:
    """Return whether a configuration is PEFT's and names the modules that the adapter has."""
    listed, name = config.get("target_modules"), config.get("base_model_name_or_path")
    if config.get("peft_type") != "LORA" or not isinstance(name, str) or not name:
        return False
    targets = {each for each in listed if isinstance(each, str)} if type(listed) is list else set()
    return all(_is_target(path, targets) for path in paths)


def _is_target(path: str, targets: Set[str]) -> bool:
    """Return whether a module is named: by its path, or by the end of it."""
    parts = path.split(".")
    return any(".".join(parts[index:]) in targets for index in range(len(parts)))
