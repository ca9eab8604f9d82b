"""The value type TinkerPath: `tinker://<run_id>/<kind>/<name>` (pure)."""

from dataclasses import dataclass
from typing import Self

_SCHEME = "tinker://"

#: The kinds of checkpoint that a tinker path can name (Tinker SDK, types/checkpoint.py).
KINDS = ("weights", "sampler_weights", "external_weights")

#: Which kind a checkpoint's `checkpoint_type` is stored under.
KIND_OF_TYPE = {
    "training": "weights",
    "sampler": "sampler_weights",
    "external": "external_weights",
}


@dataclass(frozen=True, slots=True)
class TinkerPath:
    """A checkpoint's address.

    Attributes:
        run_id: the training run.
        kind: the second part, e.g. "weights"; empty in the two-part paths of older data.
        name: the rest.
    """

    run_id: str
    kind: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a tinker path.

        Raises:
            ValueError: it does not start with `tinker://`, or a part is empty.
        """
        if not text.startswith(_SCHEME):
            raise ValueError(f"a tinker path starts with {_SCHEME}: {text!r}")
        run_id, _, rest = text[len(_SCHEME) :].partition("/")
        first, slash, second = rest.partition("/")
        kind, name = (first, second) if slash else ("", first)
        if not run_id or not name or (slash and not kind):
            raise ValueError(f"a tinker path is {_SCHEME}<run>/<kind>/<name>: {text!r}")
        return cls(run_id, kind, name)

    def __str__(self) -> str:
        """Return the tinker path as the API writes it."""
        return f"{_SCHEME}{self.run_id}/" + (f"{self.kind}/" if self.kind else "") + self.name
