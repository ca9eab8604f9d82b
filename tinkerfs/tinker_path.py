"""Parse and format tinker paths: `tinker://<run_id>/<kind>/<name>` (pure)."""

from dataclasses import dataclass
from typing import Self

_SCHEME = "tinker://"

#: Kinds of checkpoint in a tinker path (Tinker SDK, types/checkpoint.py).
KINDS = ("weights", "sampler_weights", "external_weights")

#: Kind in the tinker path for each `checkpoint_type`.
KIND_OF_TYPE = {
    "training": "weights",
    "sampler": "sampler_weights",
    "external": "external_weights",
}


@dataclass(frozen=True, slots=True)
class TinkerPath:
    """The path of a checkpoint.

    Attributes:
        run_id: the training run.
        kind: the second component, e.g. "weights"; empty in two-part paths of older data.
        name: the remaining components.
    """

    run_id: str
    kind: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a tinker path.

        Raises:
            ValueError: the text does not start with `tinker://`, or a component is empty.
        """
        if not text.startswith(_SCHEME):
            raise ValueError(f"a tinker path must start with {_SCHEME}: {text!r}")
        run_id, _, rest = text[len(_SCHEME) :].partition("/")
        first, slash, second = rest.partition("/")
        kind, name = (first, second) if slash else ("", first)
        if not run_id or not name or (slash and not kind):
            raise ValueError(f"a tinker path must be {_SCHEME}<run>/<kind>/<name>: {text!r}")
        return cls(run_id, kind, name)

    def __str__(self) -> str:
        """Return the tinker path as the API writes it."""
        return f"{_SCHEME}{self.run_id}/" + (f"{self.kind}/" if self.kind else "") + self.name
