"""The command `tinkerfs demo-server`: run the embedded server for any client.

Standard output gets exactly two lines, which a shell can eval. Messages go to standard error.
"""

import shlex
import signal
import sys
import time

import click

_PROFILES = ("official", "official-0.36", "skyrl", "hatchery", "twinkle", "mlx_tinker")


@click.command("demo-server")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port of the API; a free one by default.",
)
@click.option(
    "--store-port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port of the store; a free one by default.",
)
@click.option(
    "--runs",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="Number of training runs.",
)
@click.option(
    "--checkpoints",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Number of checkpoints per run.",
)
@click.option(
    "--size-mb",
    type=click.FloatRange(min=0, min_open=True),
    help="Size of every checkpoint, in MB; 0.3 to 5 by default.",
)
@click.option(
    "--profile",
    type=click.Choice(_PROFILES),
    default="official",
    show_default=True,
    help="Server implementation to emulate.",
)
@click.option("--seed", type=int, default=0, help="Seed of the sample account.")
@click.option(
    "--latency-ms",
    type=click.FloatRange(min=0),
    default=0,
    help="Delay of every response, in milliseconds.",
)
@click.option(
    "--export-s",
    type=click.FloatRange(min=0),
    default=0,
    help="Duration of each of the two steps of an export, in seconds.",
)
@click.option(
    "--require-token",
    is_flag=True,
    help="Accept the API key only in exchange for tokens that expire.",
)
@click.option(
    "--prefix", default="", help="Path of the base URL, for example /services/tinker-prod."
)
def demo_server(
    host: str,
    port: int,
    store_port: int,
    runs: int,
    checkpoints: int,
    size_mb: float | None,
    profile: str,
    seed: int,
    latency_ms: float,
    export_s: float,
    require_token: bool,
    prefix: str,
) -> None:
    """Run a Tinker API server with a sample account.

    The server runs until it is interrupted. When it is ready, it prints two lines for a shell to
    eval, which set TINKER_BASE_URL and TINKER_API_KEY. Any client then works with it, without a
    real key and without a network:

    \b
        tinkerfs demo-server > demo.env &
        sleep 1; . ./demo.env
        tinkerfs mount ~/tinker

    Exit codes: 0 after SIGINT or SIGTERM, 1 if the address is unavailable, 2 for a wrong option.
    """  # noqa: D301
    # lazy: imports the HTTP server
    from tinkerfs.demo.exports import ExportOptions
    from tinkerfs.demo.server import DemoServer

    # Block the signals before any thread starts, so that only sigwait() below receives them.
    # Ignored signals stay ignored, e.g. SIGINT in a background job of a script.
    stop_signals = {
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, stop_signals)
    server = DemoServer(
        runs=runs,
        checkpoints=checkpoints,
        size_bytes=None if size_mb is None else int(size_mb * 1e6),
        profile=profile,
        seed=seed,
        host=host,
        port=port,
        store_port=store_port,
        prefix=prefix,
        latency_s=latency_ms / 1000,
        exports=ExportOptions(load_s=export_s, save_s=export_s),
        requires_token=require_token,
        reference_time_s=time.time(),
    )
    try:
        server.start()
    except OSError as error:
        server.close()
        ports = f"{port} or {store_port}" if store_port else f"{port}"
        msg = f"cannot listen on {host} port {ports}: {error.strerror or error}"
        raise click.ClickException(msg) from error
    with server:
        for name, value in server.environment.items():
            click.echo(f"export {name}={shlex.quote(value)}")
        sys.stdout.flush()
        click.echo(
            f"serving {runs} training runs with {checkpoints} checkpoints each; Ctrl-C stops it",
            err=True,
        )
        signal.sigwait(stop_signals)
