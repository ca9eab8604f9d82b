"""The configuration of nginx as a caching proxy for `--blob-proxy` (pure).

Signed URLs are secrets, and nginx adds the request line to every message about a connection. So the
error log of connections is discarded, and the access log has neither the path nor the query.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tinkerfs.cache.data_layout import BLOCK_BYTES
from tinkerfs.proxies import is_loopback

_TEMPLATE = r"""# Caching proxy for tinkerfs mount --blob-proxy. Written by `tinkerfs proxy-config`.
worker_processes auto;
worker_rlimit_nofile 65536;

events {
    worker_connections 16384;
}

http {
    # Messages about connections quote the request line, and signed URLs in it are secrets.
    error_log /dev/null emerg;
    log_format tinkerfs '$time_iso8601 $remote_addr $store_origin $status $upstream_cache_status '
                        '$bytes_sent $request_time';
    access_log "@LOG@" tinkerfs;

    proxy_cache_path "@CACHE_DIR@" levels=1:2 keys_zone=tinkerfs:64m max_size=@CACHE_SIZE@
                     inactive=30d use_temp_path=off;
@RESOLVER@
    # A request is /SCHEME/HOST/PATH?QUERY, as the client sent it.
    map $request_uri $store_origin {
        "~^/(?<from_scheme>https?)/(?<from_host>[A-Za-z0-9.-]+(?::[0-9]+)?)/"
            "$from_scheme://$from_host";
        default "";
    }
    map $request_uri $store_target {
        "~^/https?/[^/?]+(?<target_part>/.*)$" "$target_part";
        default "/";
    }
    map $request_uri $store_path {
        "~^/https?/[^/?]+(?<path_part>/[^?]*)" "$path_part";
        default "/";
    }
    map $store_origin $is_allowed {
        default 0;
@ALLOWED@
    }
    # A store that ignores If-Range must not fill the cache of one version with another.
    map "$upstream_http_etag $http_tinkerfs_version" $is_other_version {
        volatile;
        default 1;
        "~^(?<etag_part>.+) \k<etag_part>$" 0;
    }

    # `Cache-Status` (RFC 9211); mounts request one slice at a time, and count hits by it.
    map $upstream_cache_status $cache_outcome {
        default fwd=miss;
        HIT hit;
    }

    server {
        listen @LISTEN@;
@TLS@        server_tokens off;
        large_client_header_buffers 4 32k;
        keepalive_requests 100000;

        if ($request_method != GET) {
            return 405;
        }
        if ($is_allowed = 0) {
            return 421;
        }
        if ($http_tinkerfs_version !~ '^"[^"]+"$') {
            return 400;
        }

        location / {
            slice @SLICE@;
            proxy_pass $store_origin$store_target;
            proxy_http_version 1.1;
            proxy_redirect off;
            proxy_next_upstream off;
            proxy_connect_timeout 5s;
            proxy_read_timeout 30s;
            proxy_buffer_size 16k;
            proxy_buffers 16 64k;
            proxy_busy_buffers_size 128k;
            proxy_max_temp_file_size 0;

            proxy_pass_request_headers off;
            proxy_pass_request_body off;
            proxy_set_header Host $proxy_host;
            proxy_set_header Connection "";
            proxy_set_header Accept-Encoding identity;
            proxy_set_header Range $slice_range;
            proxy_set_header If-Range $http_tinkerfs_version;

            # The key has no signature. A version has a key of its own, and the store checks it.
            proxy_cache tinkerfs;
            proxy_cache_key "$store_origin$store_path $http_tinkerfs_version $slice_range";
            proxy_cache_valid 206 365d;
            proxy_no_cache $is_other_version;
            proxy_cache_lock on;
            proxy_cache_lock_age 60s;
            proxy_cache_lock_timeout 60s;
            proxy_ignore_headers Cache-Control Expires Set-Cookie Vary X-Accel-Redirect
                                 X-Accel-Expires X-Accel-Limit-Rate X-Accel-Buffering
                                 X-Accel-Charset;
            proxy_hide_header Set-Cookie;
            # Or nginx would cut each range out of a whole file, from a store that ignores ranges.
            proxy_hide_header Accept-Ranges;
            proxy_hide_header Cache-Status;
            add_header Cache-Status "tinkerfs; $cache_outcome";

            proxy_ssl_server_name on;
            proxy_ssl_verify on;
            proxy_ssl_verify_depth 5;
            proxy_ssl_protocols TLSv1.2 TLSv1.3;
            proxy_ssl_trusted_certificate "@CA_FILE@";
        }
    }
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class NginxConfig:
    """What the configuration depends on.

    Attributes:
        listen: host and port.
        certificate: files with the certificate and the key for TLS; None for plain HTTP.
        cache_size_bytes: maximum size of the cache.
        allowed_hosts: stores that are served: HOST, *.DOMAIN, either with :PORT.
        resolvers: addresses of DNS servers.
        ca_file: certificates that the stores' certificates are verified with.
        log: access log.
    """

    listen: tuple[str, int]
    certificate: tuple[str, str] | None
    cache_dir: str
    cache_size_bytes: int
    allowed_hosts: tuple[str, ...]
    resolvers: tuple[str, ...]
    ca_file: str
    log: str

    def render(self) -> str:
        """Return the complete nginx.conf."""
        host, port = self.listen
        address = f"[{host}]" if ":" in host else host
        tls = ""
        if self.certificate is not None:
            tls = (
                f'        ssl_certificate "{_path(self.certificate[0])}";\n'
                f'        ssl_certificate_key "{_path(self.certificate[1])}";\n'
                "        ssl_protocols TLSv1.2 TLSv1.3;\n"
            )
        resolver = " ".join(f"[{each}]" if ":" in each else each for each in self.resolvers)
        values = {
            "LOG": _path(self.log),
            "CACHE_DIR": _path(self.cache_dir),
            "CACHE_SIZE": f"{max(self.cache_size_bytes >> 20, 1)}m",
            "RESOLVER": f"    resolver {resolver};\n" if resolver else "",
            "ALLOWED": "\n".join(_allowed_lines(self.allowed_hosts)),
            "LISTEN": f"{address}:{port}{' ssl' if tls else ''}",
            "TLS": tls,
            # A mount requests a part of one block at a time.
            "SLICE": f"{BLOCK_BYTES >> 20}m",
            "CA_FILE": _path(self.ca_file),
        }
        return re.sub("@([A-Z_]+)@", lambda found: values[found[1]], _TEMPLATE)


def parse_host_pattern(text: str) -> str:
    """Return a pattern of allowed hosts: HOST or *.DOMAIN, either with :PORT.

    Raises:
        ValueError: the text has another form.
    """
    pattern = text.strip().lower()
    if not re.fullmatch(r"(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*(:[0-9]{1,5})?", pattern):
        raise ValueError(f"not a host: {text!r} (hint: store.example.com or *.example.com)")
    return pattern


def _allowed_lines(patterns: Iterable[str]) -> Iterable[str]:
    """Yield a line of the map of allowed stores for each pattern."""
    for pattern in patterns:
        name = pattern.removeprefix("*.")
        scheme = "https?" if is_loopback(name.partition(":")[0]) else "https"
        prefix = "([a-z0-9-]+[.])+" if name != pattern else ""
        yield f'        "~*^{scheme}://{prefix}{re.escape(name)}$" 1;'


def _path(text: str) -> str:
    """Return a path as it is written between quotes.

    Raises:
        ValueError: nginx cannot have such a path.
    """
    if re.search(r'["$\\\x00-\x1f\x7f]', text):
        raise ValueError(f"not a path for nginx: {text!r}")
    return text
