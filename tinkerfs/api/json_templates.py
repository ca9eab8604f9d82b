"""JSON of records without what their own values say: one text for many of them (pure).

Of 100,000 checkpoints the JSON is 30 MB, and all but names, times and lengths is the same.
"""

from functools import lru_cache

#: Stand for the values, each for one: bytes that no valid JSON holds.
_MARKS = (b"\1", b"\2", b"\3", b"\4", b"\5")
_ANY_MARK = b"".join(_MARKS)


def to_template(raw: bytes, *values: str | None) -> str | bytes:
    """Return JSON in which marks stand for values of the record, wherever it holds their text.

    What is the same for many records is kept once. JSON that holds a mark itself stays as it is.

    Args:
        raw: any bytes.
        *values: up to five; one that the JSON writes in another way stays in it.
    """
    if len(raw.translate(None, _ANY_MARK)) != len(raw):
        return raw
    for mark, value in zip(_MARKS, values, strict=False):
        if value:
            raw = raw.replace(value.encode("utf-8", "surrogatepass"), mark)
    return _shared(raw.decode("latin-1"))


def fill_template(outline: str | bytes, *values: str | None) -> bytes:
    """Return the JSON that was outlined with the same values."""
    if isinstance(outline, bytes):
        return outline
    raw = outline.encode("latin-1")
    # What was put in last goes first, since it may hold the marks of those before.
    for mark, value in reversed([*zip(_MARKS, values, strict=False)]):
        if value:
            raw = raw.replace(mark, value.encode("utf-8", "surrogatepass"))
    return raw


# Not `sys.intern`: Python 3.12 never lets go of what is interned, and a server may tell something
# else each time.
@lru_cache(maxsize=4096)
def _shared(outline: str) -> str:
    return outline
