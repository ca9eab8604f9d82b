"""Which version of a file of an object store bytes are of (pure)."""

import msgspec

#: The length of a file whose store states none, until all of it has been received.
UNKNOWN_BYTES = -1


class Version(msgspec.Struct, frozen=True):
    """What tells one content of a file from another: its length, and the store's validators.

    Attributes:
        size_bytes: of the file; `UNKNOWN_BYTES` for now.
        etag: as it was received; empty if absent.
        last_modified: as it was received; empty if absent.
        has_length: whether the store states the length of the file.
    """

    size_bytes: int
    etag: str = ""
    last_modified: str = ""
    has_length: bool = True

    @property
    def validator(self) -> str:
        """What `If-Range` takes (RFC 9110, 13.1.5): a strong ETag, else a date; empty for none."""
        return self.etag if self.is_exact else self.last_modified

    @property
    def is_exact(self) -> bool:
        """Whether any two versions differ in it: a strong ETag does, a date has whole seconds."""
        return bool(self.etag) and not self.etag.startswith("W/")
