"""Tinker training runs and checkpoints as files.

The public interfaces are the command line (`tinkerfs --help`) and, for programs that cannot mount,
`tinkerfs.fsspec`. `docs/development/architecture.md` describes the packages.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
