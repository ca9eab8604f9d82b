"""The object store: the second origin, which serves files by signed URL.

It responds like S3: 206 with Content-Range, ETag, If-Range, and 403 for expired URLs. It ignores
API keys; the request log shows whether a client sent one.
"""

import hashlib
from collections import OrderedDict
from email.utils import formatdate
from http import HTTPStatus
from xml.sax.saxutils import escape

from tinkerfs.demo.account import Account
from tinkerfs.demo.archive import MIN_SIZE_BYTES, Adapter, adapter_files, gzipped, tar_of
from tinkerfs.demo.content import Content, Data
from tinkerfs.demo.http import Reply
from tinkerfs.demo.profiles import Profile
from tinkerfs.demo.ranges import UnsatisfiableRange, parse_range
from tinkerfs.demo.request import Request
from tinkerfs.demo.sample_data import Checkpoint, Run, Session
from tinkerfs.demo.signing import Signer
from tinkerfs.demo.trace import trace_of

_MAX_CACHED_ARCHIVES = 32


class Store:
    """Application of the object store. Thread-safe."""

    name = "store"

    def __init__(self, account: Account, profile: Profile, signer: Signer) -> None:
        self.base_url = ""
        self._account, self._profile, self._signer = account, profile, signer
        # Cached because a gzip archive computes its checksum once; guarded by the account's lock.
        self._archives: OrderedDict[tuple[str, str, int, int | None], Content] = OrderedDict()

    def sign_archive(self, run: Run, checkpoint: Checkpoint) -> tuple[str, float]:
        """Return a signed URL of a checkpoint's archive, and its expiry (Unix time)."""
        path = f"/archives/{run.id}/{checkpoint.id}/archive.tar"
        return self._signer.sign(self.base_url, path)

    def sign_files(self, run: Run, checkpoint: Checkpoint) -> tuple[dict[str, str], float]:
        """Return a signed URL of each file of a checkpoint, and the earliest expiry."""
        signed = {
            name: self._signer.sign(self.base_url, f"/files/{run.id}/{checkpoint.id}/{name}")
            for name in self.files(run, checkpoint)
        }
        urls = {name: url for name, (url, _) in signed.items()}
        return urls, min((expires_s for _, expires_s in signed.values()), default=0.0)

    def sign_trace(self, session: Session) -> str:
        """Return a signed URL of a session's trace."""
        return self._signer.sign(self.base_url, f"/traces/{session.id}")[0]

    def trace(self, session: Session) -> Content:
        """Return the trace of a session."""
        if session.trace is not None:
            return session.trace
        runs = [run for run in map(self._account.run, session.run_ids) if run is not None]
        return Data(trace_of(session, runs))

    def files(self, run: Run, checkpoint: Checkpoint) -> dict[str, Content]:
        """Return the files of a checkpoint by name."""
        if checkpoint.files is not None:
            return checkpoint.files
        identity = f"{run.id}/{checkpoint.id}/{checkpoint.time_s}/{checkpoint.generation}"
        size_bytes = checkpoint.size_bytes or 16 * MIN_SIZE_BYTES
        files = adapter_files(Adapter(run.base_model, run.lora_rank, size_bytes, identity))
        names = self._profile.member_names
        return {names.get(name, name): content for name, content in files.items()}

    def archive(self, run: Run, checkpoint: Checkpoint) -> Content:
        """Return the archive of a checkpoint."""
        if checkpoint.archive is not None:
            return checkpoint.archive
        with self._account.lock:
            key = (run.id, checkpoint.id, checkpoint.generation, checkpoint.size_bytes)
            content = self._archives.pop(key, None)
            if content is None:
                content = tar_of(self.files(run, checkpoint), int(checkpoint.time_s or 0))
                if self._profile.archive_form == "gzip":
                    content = gzipped(content)
            self._archives[key] = content
            if len(self._archives) > _MAX_CACHED_ARCHIVES:
                self._archives.popitem(last=False)
            return content

    def endpoint(self, method: str, path: str) -> str:
        """Return the endpoint, such as `GET store/archive`; `?` if the path is unknown."""
        kind = {"archives": "archive", "files": "file", "traces": "trace"}.get(path.split("/")[1])
        return f"{method} store/{kind}" if kind and method in ("GET", "HEAD") else "?"

    def respond(self, request: Request) -> Reply:
        """Return the response to a request for a file."""
        if request.endpoint == "?":
            return _error(405 if request.method != "GET" else 404, "MethodNotAllowed")
        error = self._signer.rejection_reason(request.path, request.query)
        if error is not None:
            return _error(403, error)
        with self._account.lock:
            found = self._find(request.path)
        if found is None:
            return _error(404, "NoSuchKey")
        return _serve(request, *found)

    def _find(self, path: str) -> tuple[Content, str, float] | None:
        """Return the content, ETag and modification time of an object."""
        if path.startswith("/traces/"):
            session = self._account.session(path.removeprefix("/traces/"))
            if session is None:
                return None
            content = self.trace(session)
            etag = _etag(f"{path}\n{session.trace_generation}\n{content.size_bytes}")
            return content, etag, session.created_at_s + session.trace_generation
        _, what, run_id, kind, bare, *rest = path.split("/")
        run = self._account.run(run_id)
        checkpoint = self._account.checkpoint(run_id, f"{kind}/{bare}")
        if run is None or checkpoint is None:
            return None
        if what == "archives":
            found: Content | None = self.archive(run, checkpoint)
        else:
            found = self.files(run, checkpoint).get("/".join(rest))
        if found is None:
            return None
        identity = f"{path}\n{checkpoint.time_s}\n{checkpoint.generation}\n{found.size_bytes}"
        return found, _etag(identity), checkpoint.time_s or 0.0


def _etag(identity: str) -> str:
    """Return the ETag of a version of an object."""
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogateescape"), digest_size=16)
    return f'"{digest.hexdigest()}"'


def _serve(request: Request, content: Content, etag: str, time_s: float) -> Reply:
    """Return the response to a conditional or range request (RFC 9110, 13 and 14)."""
    modified = formatdate(time_s, usegmt=True)
    size_bytes = content.size_bytes
    headers = {
        "Content-Type": "application/octet-stream",
        "Accept-Ranges": "bytes",
        "ETag": etag,
        "Last-Modified": modified,
    }
    if "if-match" in request.headers and request.headers["if-match"] not in ("*", etag):
        return _error(412, "PreconditionFailed")
    if request.headers.get("if-none-match") == etag:
        return Reply(HTTPStatus.NOT_MODIFIED, headers)
    reply = Reply(HTTPStatus.OK, headers, content)
    is_unchanged = request.headers.get("if-range", etag) in (etag, modified)
    if request.range is None or request.method != "GET" or not is_unchanged:
        return reply
    try:
        byte_range = parse_range(request.range, size_bytes)
    except UnsatisfiableRange:
        unsatisfiable = _error(416, "InvalidRange")
        unsatisfiable.headers["Content-Range"] = f"bytes */{size_bytes}"
        return unsatisfiable
    if byte_range is not None:
        reply.status, (reply.start, reply.stop) = HTTPStatus.PARTIAL_CONTENT, byte_range
        headers["Content-Range"] = f"bytes {byte_range[0]}-{byte_range[1] - 1}/{size_bytes}"
    return reply


def _error(status: int, code: str) -> Reply:
    body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{escape(code)}</Code></Error>'
    return Reply(status, {"Content-Type": "application/xml"}, Data(body.encode()))
