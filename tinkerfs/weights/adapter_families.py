"""How the adapters of each model family differ from PEFT's form, as data.

Tinker names the tensors of an adapter after its own modules. Serving engines want the names of the
Hugging Face model. The facts are those of tinker_cookbook 0.6.1 (`weights/_adapter.py` and the
modules `weights/_merge*.py`). A new family is one row of `FAMILIES`.
"""

from dataclasses import dataclass

from tinkerfs.weights.base_models import BaseModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Rules of one model family.

    Attributes:
        name: its name in messages.
        model_types: values of `model_type` in config.json that belong to it.
        architectures: parts of names in `architectures` that belong to it.
        renames: replacements in the path of a module, in order.
        experts: each expert's projections by Tinker's name.
        fused: modules that the base model fuses, with the parts that Tinker trains, in row order.
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
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    refusal: str | None = None

    def includes(self, base: BaseModel) -> bool:
        """Return whether a base model belongs to this family."""
        return base.model_type in self.model_types or any(
            part in name for part in self.architectures for name in base.architectures
        )


#: The family of every model that no other family includes.
DEFAULT = Family(name="default")

#: The families with rules of their own.
FAMILIES = (
    Family(name="gpt_oss", architectures=("GptOss",), renames=((".attn", ".self_attn"),)),
    Family(
        name="deepseek_v3",
        model_types=frozenset({"deepseek_v3"}),
        refusal="engines load no LoRA adapters of DeepSeek V3",
    ),
    Family(
        name="nemotron_h",
        model_types=frozenset({"nemotron_h"}),
        # The checkpoint's name of the layers is backbone, that of the engines is model.
        renames=(("model.lm_head", "lm_head"), ("backbone.", "model.")),
        experts=(("w1", "up_proj"), ("w2", "down_proj")),
        fused=(("in_proj", ("gate_proj", "x_proj")),),
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
    """
    prefix = "model.language_model." if base.has_prefix else "model."
    if path == "model.unembed_tokens":
        if base.has_lm_head is None:
            raise LookupError("whether its output layer is tied to the embedding")
        return "lm_head" if base.has_lm_head else f"{prefix}embed_tokens"
    if path.startswith("model.") and not path.startswith(prefix):
        path = prefix + path.removeprefix("model.")
    for old, new in family.renames:
        path = path.replace(old, new)
    return path
