"""The command `tinkerfs serve`."""

import os
import signal
from typing import TYPE_CHECKING, Any

import click

from tinkerfs.cli import logs
from tinkerfs.cli.key_check import verify_credentials
from tinkerfs.cli.options import settings_options
from tinkerfs.config import Settings
from tinkerfs.errors import StartupError

if TYPE_CHECKING:
    from tinkerfs.webdav.server import Certificate

#: The settings that have a flag: all but those of a mount in the kernel.
_FLAGS = (
    "base_url",
    "api_key_file",
    "read_only",
    "ttl_s",
    "stale_if_error_s",
    "cache_dir",
    "cache_size_bytes",
    "blob_proxy",
    "shared_cache",
    "concurrency",
    "timeout_s",
    "archive_timeout_s",
    "archive_build_limit",
    "trash_s",
    "base_models",
    "moe_layout",
    "metrics",
    "audit",
    "log_file",
    "log_format",
    "log_level",
    "config",
)


@click.command(short_help="Serve the account over WebDAV and to a browser; needs no FUSE.")
@click.option(
    "--listen",
    metavar="ADDRESS:PORT",
    default="127.0.0.1:8080",
    show_default=True,
    help="Where to listen; port 0 is a free one. Other hosts need --auth-file.",
)
@click.option(
    "--auth-file",
    metavar="FILE",
    help="Passwords: a line with user:password or with a token for each account; mode 0600.",
)
@click.option("--cert", metavar="FILE", help="Certificate for TLS, in PEM.")
@click.option("--key", metavar="FILE", help="Its private key, if --cert has no key.")
@settings_options(*_FLAGS)
def serve(
    listen: str, auth_file: str | None, cert: str | None, key: str | None, **settings: Any
) -> None:
    """Serve the files of a mount over HTTP, to WebDAV clients and to a browser.

    Runs until SIGINT or SIGTERM. GNOME Files, macOS, Windows, davfs2 and rclone mount the URL that
    it prints; a browser shows it. Links are shown as what they lead to.

    Exit codes: 0 after a signal, 1 if it cannot start, 2 for a wrong option.
    """
    if key is not None and cert is None:
        raise click.UsageError("--key needs --cert")
    try:  # lazy: imports the HTTP server
        from tinkerfs.webdav.authentication import Accounts
        from tinkerfs.webdav.server import Address, serving
    except ImportError as error:
        raise StartupError(
            f"{error.name or 'a package'} is not installed (hint: pip install 'tinkerfs[serve]')"
        ) from None
    from tinkerfs.app import open_app  # lazy: imports HTTP and SQLite
    from tinkerfs.prometheus import serve_metrics

    try:
        address = Address.parse(listen)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--listen") from None
    # Before any thread starts, so that only sigwait() receives the signals. Ignored ones stay so.
    stop_signals = {
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    values = Settings(**settings)
    logs.set_up(values.log_level, values.log_file, to_stderr=True, log_format=values.log_format)
    accounts = Accounts.from_file(os.path.expanduser(auth_file)) if auth_file else None
    with open_app(values) as app, serve_metrics(values.metrics, app.telemetry):
        verify_credentials(app.client, lambda: bool(signal.sigpending() & stop_signals))
        with serving(
            app.filesystem,
            address,
            accounts=accounts,
            certificate=_certificate(cert, key),
            timeout_s=values.timeout_s,
            is_read_only=values.read_only,
        ) as server:
            click.echo(f"serving {server.url} (Ctrl-C stops it)")
            if accounts is not None and cert is None and not server.is_loopback:
                click.echo(
                    "warning: passwords and files are sent unencrypted (hint: --cert FILE)",
                    err=True,
                )
            signal.sigwait(stop_signals)


def _certificate(cert: str | None, key: str | None) -> "Certificate | None":
    from tinkerfs.webdav.server import Certificate

    if cert is None:
        return None
    return Certificate(os.path.expanduser(cert), os.path.expanduser(key or cert))
