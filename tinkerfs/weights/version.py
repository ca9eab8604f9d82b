"""The version of a remote file: its length and validators (pure)."""

import msgspec

#: The length of a file until the download is complete, if the store does not state it.
UNKNOWN_BYTES = -1


class Version(msgspec.Struct, frozen=True):
    """Distinguishes contents of a file by its length and the store's validators.

    Attributes:
        size_bytes: length of the file; `UNKNOWN_BYTES` if not known yet.
        etag: as received; empty if absent.
        last_modified: as received; empty if absent.
        has_length: whether the store states the length of the file.
    """

    size_bytes: int
    etag: str = ""
    last_modified: str = ""
    has_length: bool = True

    @property
    def validator(self) -> str:
        """The value of `If-Range` (RFC 9110, 13.1.5): strong ETag, date or empty."""
        return self.etag if self.is_exact else self.last_modified

    @property
    def is_exact(self) -> bool:
        """Whether the version has a strong ETag; dates have a resolution of one second."""
        return bool(self.etag) and not self.etag.startswith("W/")
