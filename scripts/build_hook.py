"""Build hook of hatchling: adds manual pages, shell completions and units to the wheel.

pip installs them below the prefix: `share/man`, the directories of bash, zsh and fish, and
`lib/systemd`. With the prefix /usr/local, man, the shells and systemd find them there.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PackageFilesHook(BuildHookInterface[Any]):  # type: ignore[misc]
    """Generates the files with the command line of the source tree."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Return the requirements of importing the command line: those of the project."""
        return list(self.metadata.core.dependencies)

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Generate the files before the build; an editable installation has none."""
        if version == "editable":
            return
        self._directory = tempfile.TemporaryDirectory()
        generated = Path(self._directory.name)
        sys.path.insert(0, self.root)
        try:
            from scripts.manual_pages import write  # the command line of the source tree
        finally:
            sys.path.remove(self.root)
        shared = build_data["shared_data"]
        for path in write(generated):
            shared[str(generated / path)] = path
        units = Path(self.root, "tinkerfs/data/systemd")
        for manager in ("system", "user"):
            for unit in sorted((units / manager).glob("tinkerfs@.service")):
                shared[str(unit)] = f"lib/systemd/{manager}/{unit.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the generated files."""
        del build_data, artifact_path
        if version != "editable":
            self._directory.cleanup()
