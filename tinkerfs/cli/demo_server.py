"""`tinkerfs demo-server`: the embedded server alone, for any client of the API.

Standard output carries two lines that a shell can eval, and nothing else; what people may want to
know goes to standard error.
"""

import click

_PROFILES = ("official", "official-0.36", "skyrl", "hatchery")


@click.command("demo-server")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port of the API; any free one by default.",
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
    help="Number of checkpoints of each run.",
)
@click.option(
    "--profile",
    type=click.Choice(_PROFILES),
    default="official",
    show_default=True,
    help="Which known server to behave as.",
)
@click.option("--seed", type=int, default=0, help="Another number gives another account.")
@click.option(
    "--latency-ms",
    type=click.FloatRange(min=0),
    default=0,
    help="Delay of every answer, in milliseconds.",
)
@click.option("--prefix", default="", help="Path of the base URL, such as /services/tinker-prod.")
def demo_server(
    host: str,
    port: int,
    runs: int,
    checkpoints: int,
    profile: str,
    seed: int,
    latency_ms: float,
    prefix: str,
) -> None:
    """Serve a sample account as the Tinker API does, until interrupted.

    Once it answers, it prints two lines for a shell to eval, TINKER_BASE_URL and TINKER_API_KEY.
    Any client can then be tried on it, without a key of one's own and without a network:

    \b
        tinkerfs demo-server > demo.env &
        sleep 1; . ./demo.env
        tinkerfs mount ~/tinker

    Exit codes: 0 after SIGINT or SIGTERM, 1 if the address cannot be had, 2 for a wrong option.
    """  # noqa: D301
    import shlex
    import signal
    import sys
    import time

    from tinkerfs.demo.server import DemoServer

    # Blocked before any thread starts, so that sigwait() below is the only one to get them.
    # One that was ignored at the start stays so (SIGINT of a script's background job).
    ends = {
        number
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    server = DemoServer(
        runs=runs,
        checkpoints=checkpoints,
        profile=profile,
        seed=seed,
        host=host,
        port=port,
        prefix=prefix,
        latency_s=latency_ms / 1000,
        reference_time_s=time.time(),
    )
    try:
        server.start()
    except OSError as error:
        server.close()
        msg = f"cannot listen on {host} port {port}: {error.strerror or error}"
        raise click.ClickException(msg) from error
    with server:
        for name, value in server.environment.items():
            click.echo(f"export {name}={shlex.quote(value)}")
        sys.stdout.flush()
        click.echo(
            f"serving {runs} training runs of {checkpoints} checkpoints; Ctrl-C ends it", err=True
        )
        signal.sigwait(ends)
