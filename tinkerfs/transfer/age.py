"""Decrypt age files, by the optional package pyrage (https://age-encryption.org/v1)."""

import os
from types import ModuleType

from tinkerfs.errors import StartupError
from tinkerfs.safe_open import open_regular, read_regular

#: Suffix of encrypted files.
SUFFIX = ".age"
#: Maximum size of a file of identities.
_MAX_IDENTITIES_BYTES = 1 << 20


class Identities:
    """Private keys for which files are encrypted.

    Args:
        path: a file of age identities, or an SSH private key without a passphrase.

    Raises:
        StartupError: pyrage is not installed, or the file cannot be read or has no identity.
    """

    def __init__(self, path: str) -> None:
        self._pyrage = _load_pyrage()
        try:
            data = read_regular(path, _MAX_IDENTITIES_BYTES, follow_symlinks=True)
        except OSError as error:
            raise StartupError(f"--age-identity {path}: {error.strerror}") from None
        try:
            lines = [line.strip() for line in data.decode("ascii").splitlines()]
            if any(line.startswith("-----BEGIN") for line in lines):
                self._identities = [self._pyrage.ssh.Identity.from_buffer(data)]
            else:
                keys = [line for line in lines if line and not line.startswith("#")]
                parse = self._pyrage.x25519.Identity.from_str
                self._identities = [parse(key) for key in keys]
        except (UnicodeDecodeError, self._pyrage.IdentityError):
            # The message of the library may contain the key.
            raise StartupError(f"--age-identity {path}: not a file of age identities") from None
        if not self._identities:
            raise StartupError(f"--age-identity {path}: has no identity")

    def decrypt(self, path: str, mode: int) -> str:
        """Replace an encrypted file by the decrypted one, without the suffix; return its path.

        Args:
            mode: permission bits of the new file.

        Raises:
            OSError: the file cannot be read or written.
            StartupError: the file is not encrypted for any of the identities, or is damaged.
        """
        target = path.removesuffix(SUFFIX)
        partial = f"{target}.decrypting"
        os.close(open_regular(partial, os.O_WRONLY | os.O_CREAT, 0o600))
        try:
            self._pyrage.decrypt_file(path, partial, self._identities)
            os.chmod(partial, mode)
            os.replace(partial, target)
        except self._pyrage.DecryptError as error:
            os.unlink(partial)
            raise StartupError(f"{path} cannot be decrypted: {error}") from None
        except BaseException:
            os.unlink(partial)
            raise
        os.unlink(path)
        return target


def _load_pyrage() -> ModuleType:
    try:
        import pyrage
    except ImportError:
        raise StartupError(
            "age needs the package pyrage (hint: pip install 'tinkerfs[age]')"
        ) from None
    module: ModuleType = pyrage
    return module
