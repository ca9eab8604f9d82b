"""Adopt a changed configuration in a running mount."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from tinkerfs.cli import logs
from tinkerfs.config import Settings
from tinkerfs.errors import StartupError
from tinkerfs.operation_log import log_operation

if TYPE_CHECKING:
    from tinkerfs.app import App

log = logging.getLogger(__name__)

#: `options.reload_settings` for one command line.
Reload = Callable[[Settings], tuple[Settings, list[str]]]


class SettingsReloader:
    """The settings of a running mount, which `reload` changes. Not thread-safe.

    Args:
        reread: reads the configuration files; None if there are none for this mount.
    """

    def __init__(self, app: "App", settings: Settings, reread: Reload | None) -> None:
        self._app = app
        self._settings = settings
        self._reread = reread
        self._log_level = settings.log_level
        self._stop_logging_operations: Callable[[], None] = lambda: None
        self._adopt_log_level()

    def reload(self) -> None:
        """Adopt changed options, open the log again, and let the key be read again.

        An invalid configuration file changes no option.
        """
        ignored, failures = list[str](), list[str]()
        if self._reread is not None:
            try:
                self._settings, ignored = self._reread(self._settings)
            except StartupError as error:
                failures.append(f"no option was reloaded: {error}")
        try:
            logs.reload(self._settings.log_level, self._settings.log_file)
        except StartupError as error:
            failures.append(str(error))
        for message in failures:
            log.warning("%s", message)
        for option in ignored:
            log.warning("the changed option %s takes effect with the next mount", option)
        self._log_level = self._settings.log_level
        self._adopt_log_level()
        self._app.reload(self._settings)
        log.info("reloaded")

    def toggle_debug(self) -> None:
        """Log at level debug, or end that: at the configured level, or at info if that is debug."""
        if self._log_level != "debug":
            self._log_level = "debug"
        elif self._settings.log_level != "debug":
            self._log_level = self._settings.log_level
        else:
            self._log_level = "info"
        logs.set_level(self._log_level)
        self._adopt_log_level()
        log.warning("the log level is %s", self._log_level)

    def _adopt_log_level(self) -> None:
        self._stop_logging_operations()
        if self._log_level == "debug":
            operations = self._app.telemetry.operations
            self._stop_logging_operations = operations.subscribe(log_operation)
