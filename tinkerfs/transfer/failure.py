"""Failures of a command that continues with its other paths."""

from dataclasses import dataclass

from tinkerfs import errors


@dataclass(frozen=True, slots=True)
class Failure:
    """Failure to transfer one file or path.

    Attributes:
        name: file or path to display.
        hint: how to continue; may be empty.
    """

    name: str
    error: Exception
    hint: str = ""

    @property
    def message(self) -> str:
        """The error message, on one line and without secrets.

        Raises:
            Exception: the error itself, if it is a bug and not a TinkerfsError or OSError.
        """
        if isinstance(self.error, OSError):
            message = self.error.strerror or str(self.error)
        elif isinstance(self.error, errors.TinkerfsError):
            message = str(self.error)
        else:
            raise self.error
        return errors.redact(message) + (f" (hint: {self.hint})" if self.hint else "")
