"""JSON templates: the JSON of a record with placeholders for its values. Pure.

Many records share one template: the JSON of 100,000 checkpoints needs 30 MB, but it differs only in
names, times and sizes.
"""

from functools import lru_cache

#: One placeholder per value: bytes that never occur in valid JSON.
_PLACEHOLDERS = (b"\1", b"\2", b"\3", b"\4", b"\5")
_ALL_PLACEHOLDERS = b"".join(_PLACEHOLDERS)


def to_template(raw: bytes, *values: str | None) -> str | bytes:
    """Replace values in JSON by placeholders and return the shared template.

    JSON that already contains a placeholder byte is returned unchanged.

    Args:
        raw: any bytes.
        *values: up to five values. A value that is formatted differently in the JSON is not
            replaced.
    """
    if len(raw.translate(None, _ALL_PLACEHOLDERS)) != len(raw):
        return raw
    for placeholder, value in zip(_PLACEHOLDERS, values, strict=False):
        if value:
            raw = raw.replace(value.encode("utf-8", "surrogatepass"), placeholder)
    return _shared(raw.decode("latin-1"))


def fill_template(template: str | bytes, *values: str | None) -> bytes:
    """Return the JSON that `to_template` converted with the same values."""
    if isinstance(template, bytes):
        return template
    raw = template.encode("latin-1")
    # In reverse order, because a later value may have contained earlier placeholders.
    for placeholder, value in reversed([*zip(_PLACEHOLDERS, values, strict=False)]):
        if value:
            raw = raw.replace(placeholder, value.encode("utf-8", "surrogatepass"))
    return raw


# Not `sys.intern`: Python 3.12 never frees interned strings, and a server may send different JSON
# each time.
@lru_cache(maxsize=4096)
def _shared(template: str) -> str:
    return template
