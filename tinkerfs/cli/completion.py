"""The command `tinkerfs completion`."""

import click
from click.shell_completion import get_completion_class


@click.command(short_help="Print a shell completion script.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for SHELL, for commands and options.

    \b
        bash    eval "$(tinkerfs completion bash)"                       in ~/.bashrc
        zsh     eval "$(tinkerfs completion zsh)"                        in ~/.zshrc
        fish    tinkerfs completion fish > ~/.config/fish/completions/tinkerfs.fish
    """  # noqa: D301
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "tinkerfs", "_TINKERFS_COMPLETE").source())
