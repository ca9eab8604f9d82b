"""How the adapters of each model family differ from PEFT's form, as data.

Tinker names the tensors of an adapter after its own modules. Serving engines want the names of the
Hugging Face model. The facts are those of tinker_cookbook 0.6.1 (`weights/_adapter.py` and the
modules `weights/_merge*.py`), except where its result is not what engines load. A new family is one
row of `FAMILIES`.
"""

from dataclasses import dataclass

from tinkerfs.weights.base_models import BaseModel


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedModule:
    """A module of the base model that Tinker trains in parts.

    Attributes:
        name: last name of the module.
        parts: last names of its parts, in row order.
        is_whole: whether the parts are all rows of the module.
    """

    name: str
    parts: tuple[str, ...]
    is_whole: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Rules of one model family.

    Attributes:
        name: its name in messages.
        model_types: values of `model_type` in config.json that belong to it.
        architectures: parts of names in `architectures` that belong to it.
        renames: replacements in the path of a module, in order.
        experts: each expert's projections by Tinker's name.
        fused: modules that the base model fuses.
        refusal: why its adapters cannot be served, None if they can.
    """

    name: str
    model_types: frozenset[str] = frozenset()
    architectures: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    experts: tuple[tuple[str, str], ...] = (
        ("w1", "gate_proj"),
        ("w3", "up_proj"),
        ("w2", "down_proj"),
    )
    fused: tuple[FusedModule, ...] = ()
    refusal: str | None = None

    def includes(self, base: BaseModel) -> bool:
        """Return whether a base model belongs to this family."""
        return base.model_type in self.model_types or any(
            part in name for part in self.architectures for name in base.architectures
        )


_TIED = (
    "no engine loads the factors of an output layer that the base model ties to its embedding;"
    " train it with train_unembed=False"
)

#: The family of every model that no other family includes.
DEFAULT = Family(name="default")

#: The families with rules of their own.
FAMILIES = (
    Family(name="gpt_oss", architectures=("GptOss",), renames=((".attn", ".self_attn"),)),
    Family(
        name="qwen3_5",
        model_types=frozenset({"qwen3_5", "qwen3_5_moe"}),
        # The cookbook leaves the parts as they are. In vLLM 0.33 (model_executor/models/qwen3_5.py,
        # `packed_modules_mapping`) and transformers 5.23, the module is in_proj_qkv. The first
        # refuses the parts, and PEFT ignores them without an error.
        fused=(
            FusedModule(
                name="in_proj_qkv",
                parts=("in_proj_q", "in_proj_k", "in_proj_v"),
                is_whole=True,
            ),
        ),
    ),
    Family(
        name="deepseek_v3",
        model_types=frozenset({"deepseek_v3"}),
        refusal="tinker_cookbook converts no adapters of DeepSeek V3",
    ),
    Family(
        name="nemotron_h",
        model_types=frozenset({"nemotron_h"}),
        # The checkpoint's name of the layers is backbone, that of the engines is model.
        renames=(("model.lm_head", "lm_head"), ("backbone.", "model.")),
        experts=(("w1", "up_proj"), ("w2", "down_proj")),
        fused=(FusedModule(name="in_proj", parts=("gate_proj", "x_proj"), is_whole=False),),
    ),
    Family(
        name="nemotron_h with other parts",
        architectures=("NemotronH",),
        refusal="no rule names the modules of Nemotron models with vision or sound",
    ),
)


def family_of(base: BaseModel) -> Family:
    """Return the family of a base model."""
    return next((family for family in FAMILIES if family.includes(base)), DEFAULT)


def peft_module(path: str, base: BaseModel, family: Family) -> str:
    """Return the base model's path of a module that Tinker names `path`.

    A path that is the base model's already is returned as it is.

    Raises:
        LookupError: too little is known of the base model.
        ValueError: no engine loads the module as it was trained.
    """
    prefix = "model.language_model." if base.has_prefix else "model."
    if path.rpartition(".")[2] == "embed_tokens":
        raise ValueError(_TIED)
    if path == "model.unembed_tokens":
        if base.has_lm_head is None:
            raise LookupError("whether its output layer is tied to the embedding")
        if not base.has_lm_head:
            # The cookbook names it embed_tokens. For an embedding, PEFT 0.21 has factors of other
            # names and shapes, and ignores these with a warning. In vLLM 0.33 and SGLang 0.5.23,
            # the copy into buffers of the transposed shapes fails.
            raise ValueError(_TIED)
        return "lm_head"
    if path.startswith("model.") and not path.startswith(prefix):
        path = prefix + path.removeprefix("model.")
    for old, new in family.renames:
        path = path.replace(old, new)
    return path
