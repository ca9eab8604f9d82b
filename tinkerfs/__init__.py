"""Tinker training runs and checkpoints as files.

The command line (`tinkerfs --help`) is the public surface, and `tinkerfs.fsspec` for
programs that cannot mount. See `docs/architecture.md` for how the package is laid out.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
