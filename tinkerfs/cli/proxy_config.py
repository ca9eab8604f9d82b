"""`tinkerfs proxy-config`: write the configuration of a caching proxy for weights."""

import os
import re
from collections.abc import Callable
from ipaddress import ip_address

import click

from tinkerfs.cli.nginx_config import NginxConfig, parse_host_pattern
from tinkerfs.cli.options import ADDRESS, PATH, SIZE, Parsed
from tinkerfs.config import parse_address
from tinkerfs.errors import StartupError
from tinkerfs.safe_open import open_regular

_RESOLV_CONF = "/etc/resolv.conf"


@click.group("proxy-config", short_help="Write the configuration of a caching proxy for weights.")
def proxy_config() -> None:
    """Write the configuration of a caching proxy for weights.

    Mounts on many hosts use the proxy with --blob-proxy, so that the site downloads each checkpoint
    once.
    """


def _path_option(flag: str, default: str | None, help: str) -> Callable[..., Callable[..., None]]:
    return click.option(flag, type=PATH, default=default, show_default=True, help=help)


@proxy_config.command()
@click.option(
    "--allow-host",
    "allowed_hosts",
    type=Parsed("host", parse_host_pattern),
    metavar="PATTERN",
    multiple=True,
    required=True,
    help="Store that the proxy serves: HOST or *.DOMAIN, either with :PORT; may be repeated. The"
    " URL in a checkpoint's file archive_url has the host.",
)
@click.option(
    "--listen",
    type=ADDRESS,
    default="127.0.0.1:8080",
    show_default=True,
    metavar="ADDRESS:PORT",
    help="Address to serve; other than this machine's needs a certificate.",
)
@_path_option("--certificate", None, "Certificate for TLS, PEM.")
@_path_option("--certificate-key", None, "Key of the certificate, PEM.")
@_path_option("--cache-dir", "/var/cache/tinkerfs-proxy", "Directory of the cache.")
@click.option(
    "--cache-size", type=SIZE, default="100G", show_default=True, help="Maximum size of the cache."
)
@click.option(
    "--resolver",
    "resolvers",
    metavar="ADDRESS",
    multiple=True,
    help=f"Address of a DNS server; may be repeated.  [default: those of {_RESOLV_CONF}]",
)
@_path_option(
    "--ca-file",
    "/etc/ssl/certs/ca-certificates.crt",
    "Certificates that verify the stores.",
)
@_path_option("--log", "/var/log/nginx/tinkerfs.log", "Access log, without paths and queries.")
def nginx(
    allowed_hosts: tuple[str, ...],
    listen: str,
    certificate: str | None,
    certificate_key: str | None,
    cache_dir: str,
    cache_size: int,
    resolvers: tuple[str, ...],
    ca_file: str,
    log: str,
) -> None:
    """Write a complete nginx.conf to standard output.

    The proxy caches by file and version, fetches each slice once, and logs no signed URL.
    """
    if (certificate is None) != (certificate_key is None):
        raise click.UsageError("--certificate and --certificate-key belong together")
    address = parse_address(listen)
    if certificate is None and not _is_this_machine(address[0]):
        raise click.UsageError(
            "signed URLs are secrets: another address than this machine's needs --certificate"
        )
    if not cache_size:
        raise click.UsageError("--cache-size 0 caches nothing")
    config = NginxConfig(
        listen=address,
        certificate=None if certificate is None else (certificate, str(certificate_key)),
        cache_dir=cache_dir,
        cache_size_bytes=cache_size,
        allowed_hosts=allowed_hosts,
        resolvers=tuple(_valid_resolver(each) for each in resolvers) or _system_resolvers(),
        ca_file=ca_file,
        log=log,
    )
    try:
        click.echo(config.render(), nl=False)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _is_this_machine(host: str) -> bool:
    """Return whether only this machine reaches an address; 0.0.0.0 is every address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _valid_resolver(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError:
        raise click.UsageError(f"--resolver: not an address: {text!r}") from None


def _system_resolvers() -> tuple[str, ...]:
    """Return the DNS servers of this machine, which nginx does not find out itself."""
    try:
        with open(open_regular(_RESOLV_CONF, os.O_RDONLY, follow_symlinks=True), "rb") as file:
            text = file.read().decode(errors="replace")
        found = re.findall(r"^nameserver\s+([0-9A-Fa-f.:]+)\s*$", text, re.MULTILINE)
    except OSError:
        found = []
    if not found:
        raise StartupError(f"no DNS server in {_RESOLV_CONF} (hint: name one with --resolver)")
    return tuple(found)
