"""The API's origin: routes and handlers of every endpoint.

The routes are those of the API contract. Error messages imitate those of the real services.
"""

import base64
import json
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Literal

from tinkerfs.demo import serialization
from tinkerfs.demo.account import Account
from tinkerfs.demo.exports import ExportEndpoints, ExportOptions
from tinkerfs.demo.http import Reply, error_reply, json_reply
from tinkerfs.demo.lookup import HttpError, Lookup
from tinkerfs.demo.mutations import MutationEndpoints
from tinkerfs.demo.profiles import Profile
from tinkerfs.demo.request import Request
from tinkerfs.demo.sample_data import BASE_MODELS, Checkpoint, Run, Session
from tinkerfs.demo.store import Store

_CHECKPOINT = "training_runs/{run}/checkpoints/{ckpt}"
_ROUTES = (
    ("GET", "training_runs", "GET training_runs"),
    ("GET", "training_runs/{run}", "GET training_runs/{run}"),
    ("GET", "training_runs/{run}/checkpoints", "GET training_runs/{run}/checkpoints"),
    ("GET", f"{_CHECKPOINT}/archive", "GET archive"),
    ("GET", f"{_CHECKPOINT}/download", "GET download"),
    ("GET", "archives/{archive}/download", "GET download"),
    ("GET", f"{_CHECKPOINT}/external_weights_urls", "GET external_weights_urls"),
    ("POST", f"{_CHECKPOINT}/publish", "POST publish"),
    ("DELETE", f"{_CHECKPOINT}/publish", "DELETE publish"),
    ("PUT", f"{_CHECKPOINT}/ttl", "PUT ttl"),
    ("DELETE", _CHECKPOINT, "DELETE checkpoint"),
    ("GET", "checkpoints", "GET checkpoints"),
    ("POST", "weights_info", "POST weights_info"),
    ("GET", "sessions", "GET sessions"),
    ("POST", "sessions/search", "POST sessions/search"),
    ("GET", "sessions/{session}/trace_export", "GET trace_export"),
    ("GET", "sessions/{session}", "GET sessions/{session}"),
    ("POST", "create_session", "POST create_session"),
    ("POST", "load_weights", "POST load_weights"),
    ("POST", "get_info", "POST get_info"),
    ("POST", "save_weights_external", "POST save_weights_external"),
    ("POST", "retrieve_future", "POST retrieve_future"),
    ("POST", "session_heartbeat", "POST session_heartbeat"),
    ("POST", "sessions/{session}/finish", "POST finish"),
    ("GET", "samplers/{sampler}", "GET samplers/{sampler}"),
    ("GET", "get_server_capabilities", "GET get_server_capabilities"),
    ("GET", "healthz", "GET healthz"),
    ("POST", "client/config", "POST client/config"),
    ("POST", "client/dynamic_config", "POST client/dynamic_config"),
    ("POST", "telemetry", "POST telemetry"),
    ("GET", "auth/apikey/me", "GET auth/apikey/me"),
    ("POST", "auth/token", "POST auth/token"),
    ("GET", "billing/usage/checkpoints/current", "GET billing/usage/checkpoints/current"),
)


def _pattern(template: str) -> re.Pattern[str]:
    """Compile a route; `{ckpt}` matches slashes, other names match one segment."""
    pattern = template.replace("{ckpt}", r"(?P<ckpt>.+)")
    return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", pattern), re.DOTALL)


_PATTERNS = [(method, _pattern(template), endpoint) for method, template, endpoint in _ROUTES]
_OPEN = frozenset({"GET healthz", "GET download"})
"""Endpoints that require no API key."""
_STORAGE_RATE = 0.2
"""Price of a stored gigabyte, USD per month."""
_EXCHANGE = frozenset({"POST client/config", "POST auth/token"})
"""Endpoints that accept an API key although the server requires tokens."""


@dataclass(slots=True)
class Behaviour:
    """Options of an API besides its profile, which may be changed while it runs.

    Attributes:
        api_keys: The valid API keys.
        accepts_jwt: Whether any unexpired JWT is valid too.
        archive_response: Whether an archive's URL is sent as a redirect or as JSON.
        sends_expiry: Whether that redirect has an `Expires` header.
        building_status: Status while an archive is being built: 503 or 425.
        retry_after: `Retry-After` header of that response, and of that for a pending trace; None
            to omit it.
        requires_token: Whether API keys are accepted only in exchange for tokens.
        token_lifetime_s: Lifetime of those tokens.
        exports: Delays and failures of exports.
    """

    api_keys: set[str]
    accepts_jwt: bool = True
    archive_response: Literal["redirect", "json"] = "redirect"
    sends_expiry: bool = True
    building_status: int = 503
    retry_after: str | None = "1"
    requires_token: bool = False
    token_lifetime_s: float = 3600.0
    exports: ExportOptions = field(default_factory=ExportOptions)


class Api:
    """Application of the API. Thread-safe.

    Args:
        account: The records.
        profile: The known server to behave as.
        behaviour: Further options.
        store: Signs URLs of archives and files.
        prefix: Path before `/api/v1`, either empty or with a leading slash.
        clock: Returns Unix time.
    """

    name = "api"

    def __init__(
        self,
        account: Account,
        profile: Profile,
        behaviour: Behaviour,
        store: Store,
        prefix: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.base_url = ""
        self._account, self._profile, self._behaviour = account, profile, behaviour
        self._store, self._clock = store, clock
        self._root = f"{prefix}/api/v1/"
        self._lookup = Lookup(account, profile)
        mutations = MutationEndpoints(account, profile, self._lookup, clock)
        self.exports = ExportEndpoints(account, self._lookup, store, behaviour.exports, clock)
        self._handlers: dict[str, Callable[[Request, dict[str, str]], Reply]] = {
            "GET training_runs": self._list_runs,
            "GET training_runs/{run}": self._get_run,
            "GET training_runs/{run}/checkpoints": self._list_run_checkpoints,
            "GET archive": self._archive,
            "GET download": self._download,
            "GET external_weights_urls": self._external_urls,
            "POST publish": mutations.publish,
            "DELETE publish": mutations.unpublish,
            "PUT ttl": mutations.set_ttl,
            "DELETE checkpoint": mutations.delete,
            "GET checkpoints": self._list_checkpoints,
            "POST weights_info": self._weights_info,
            "GET sessions": self._list_sessions,
            "POST sessions/search": self._search_sessions,
            "GET trace_export": self._trace,
            "GET sessions/{session}": self._get_session,
            "POST create_session": self.exports.create_session,
            "POST load_weights": self.exports.load_weights,
            "POST get_info": self.exports.get_info,
            "POST save_weights_external": self.exports.save_weights_external,
            "POST retrieve_future": self.exports.retrieve_future,
            "POST session_heartbeat": self.exports.session_heartbeat,
            "POST finish": self.exports.finish_session,
            "GET samplers/{sampler}": self._get_sampler,
            "GET get_server_capabilities": self._capabilities,
            "GET healthz": lambda _request, _args: json_reply({"status": "ok"}),
            "POST client/config": self._config,
            "POST client/dynamic_config": lambda _request, _args: json_reply({}),
            "POST telemetry": lambda _request, _args: json_reply({"status": "accepted"}),
            "GET auth/apikey/me": self._key,
            "POST auth/token": self._token,
            "GET billing/usage/checkpoints/current": self._storage,
        }

    def endpoint(self, method: str, path: str) -> str:
        """Return the endpoint of a request, `?` if the path is unknown."""
        return self._route(method, path)[0]

    def respond(self, request: Request) -> Reply:
        """Return the response to a request."""
        if self._profile.requires_key and request.endpoint not in _OPEN:
            if request.api_key is None:
                return error_reply(401, "Missing API key")
            if not self._is_valid(request.api_key, request.endpoint):
                return error_reply(401, "Invalid API key")
        endpoint, args = self._route(request.method, request.path)
        if endpoint == "?":
            others = ("GET", "POST", "PUT", "DELETE")
            is_path = any(self._route(method, request.path)[0] != "?" for method in others)
            return error_reply(405 if is_path else 404)
        if endpoint in self._profile.missing:
            return self._missing(endpoint, args)
        try:
            with self._account.lock:
                self.exports.advance()
                self._account.delete_expired()
                return self._handlers[endpoint](request, args)
        except HttpError as error:
            return error_reply(error.status, error.detail, error.headers)

    def _missing(self, endpoint: str, args: dict[str, str]) -> Reply:
        """Return the error of this server's framework for an unknown route."""
        if "ckpt" not in args or not self._profile.has_open_delete_route:
            return error_reply(404)
        if endpoint == "DELETE publish":  # matches the route that deletes a checkpoint
            return error_reply(422, "Invalid checkpoint_id")
        return error_reply(405)

    def _route(self, method: str, path: str) -> tuple[str, dict[str, str]]:
        if path.startswith(self._root):
            rest = path[len(self._root) :]
            for known_method, pattern, endpoint in _PATTERNS:
                if known_method == method and (match := pattern.fullmatch(rest)):
                    return endpoint, match.groupdict()
        return "?", {}

    def _is_valid(self, key: str, endpoint: str) -> bool:
        if key in self._behaviour.api_keys:
            return not self._behaviour.requires_token or endpoint in _EXCHANGE
        if not self._behaviour.accepts_jwt or not key.startswith("eyJ"):
            return False
        try:
            payload = key.split(".")[1]
            claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
            return bool(claims["exp"] > self._clock())
        except (IndexError, KeyError, TypeError, ValueError):
            return False

    # Listings

    def _list_runs(self, request: Request, _args: dict[str, str]) -> Reply:
        offset, limit = self._page(request, 20, self._profile.page_max)
        is_accessible = (
            self._profile.lists_accessible and request.query.get("access_scope") == "accessible"
        )
        foreign = self._account.foreign_run_ids if is_accessible else []
        page = self._account.runs(offset, limit)
        others = foreign[max(offset - self._account.run_count, 0) :][: limit - len(page)]
        page += [self._lookup.run(run_id) for run_id in others]
        runs = [serialization.run_json(run, self._profile) for run in page]
        total_count = self._account.run_count + len(foreign)
        cursor = serialization.cursor_json(offset, limit, total_count, self._profile)
        return json_reply({"training_runs": runs, "cursor": cursor})

    def _list_run_checkpoints(self, _request: Request, args: dict[str, str]) -> Reply:
        run = self._lookup.run(args["run"])
        found = [c for c in run.checkpoints if self._lookup.may_list(run, c)]
        records = [serialization.checkpoint_json(run.id, c, self._profile) for c in found]
        cursor = serialization.cursor_json(0, len(records), len(records), self._profile)
        return json_reply({"checkpoints": records, "cursor": cursor})

    def _list_checkpoints(self, request: Request, _args: dict[str, str]) -> Reply:
        offset, limit = self._page(request, 100, self._profile.account_page_max)
        page = self._account.checkpoints(offset, limit)
        records = [serialization.checkpoint_json(run.id, c, self._profile) for run, c in page]
        total_count = self._account.checkpoint_count
        cursor = serialization.cursor_json(offset, limit, total_count, self._profile)
        return json_reply({"checkpoints": records, "cursor": cursor})

    def _list_sessions(self, request: Request, _args: dict[str, str]) -> Reply:
        offset, limit = self._page(request, 20, self._profile.page_max)
        return json_reply({"sessions": self._account.session_ids(offset, limit)})

    def _search_sessions(self, request: Request, _args: dict[str, str]) -> Reply:
        query = self._lookup.body(request)
        limit = query.get("limit", 50)
        if not isinstance(limit, int) or not 1 <= limit <= 200:
            raise HttpError(422, [{"loc": ["body", "limit"], "msg": "must be from 1 to 200"}])
        terms = str(query.get("display_name") or "").lower().split()
        after = (query.get("cursor") or {}).get("last_session_id")
        ids = self._account.session_ids()
        if after in ids:
            ids = ids[ids.index(after) + 1 :]
        found: list[dict[str, Any]] = []
        for session_id in ids:
            session = self._account.session(session_id)
            name = "" if session is None else (session.display_name or "").lower()
            if session is None or not all(term in name for term in terms):
                continue
            runs = [run for run in map(self._account.run, session.run_ids) if run is not None]
            found.append(serialization.session_summary_json(session, runs, self._profile))
            if len(found) > limit:
                break
        page = found[:limit]
        cursor = None
        if len(found) > limit:
            last = page[-1]
            cursor = {
                "last_created_at": last["created_at"],
                "last_session_id": last["session_id"],
            }
        return json_reply({"sessions": page, "next_cursor": cursor})

    def _page(self, request: Request, default_limit: int, page_max: int | None) -> tuple[int, int]:
        offset = self._lookup.number(request, "offset", 0)
        limit = self._lookup.number(request, "limit", default_limit)
        return offset, limit if page_max is None else min(limit, page_max)

    # Single records

    def _get_run(self, _request: Request, args: dict[str, str]) -> Reply:
        return json_reply(serialization.run_json(self._lookup.run(args["run"]), self._profile))

    def _weights_info(self, request: Request, _args: dict[str, str]) -> Reply:
        run, _checkpoint = self._lookup.by_tinker_path(
            self._lookup.body(request).get("tinker_path")
        )
        return json_reply(serialization.weights_info_json(run))

    def _get_session(self, _request: Request, args: dict[str, str]) -> Reply:
        return json_reply(serialization.session_json(self._session(args)))

    def _session(self, args: dict[str, str]) -> Session:
        session = self._account.session(args["session"])
        if session is None:
            raise HttpError(404, f"Session {args['session']} not found")
        return session

    def _trace(self, _request: Request, args: dict[str, str]) -> Reply:
        session = self._session(args)
        if session.trace_polls != 0:
            if session.trace_polls is not None:
                session.trace_polls -= 1
            headers = self._retry_after()
            return json_reply({"status": "pending", "url": None, "error": None}, headers=headers)
        if session.trace_error is not None:
            return json_reply({"status": "failed", "url": None, "error": session.trace_error})
        return json_reply(
            {"status": "ready", "url": self._store.sign_trace(session), "error": None}
        )

    def _get_sampler(self, _request: Request, args: dict[str, str]) -> Reply:
        sampler_id = args["sampler"]
        sampler = self._account.sampler(sampler_id)
        if sampler is None:
            raise HttpError(404, f"Sampler {sampler_id} not found")
        base_model, path = sampler
        record = {"sampler_id": sampler_id, "base_model": base_model, "model_path": path}
        return json_reply(record)

    def _capabilities(self, _request: Request, _args: dict[str, str]) -> Reply:
        models = [
            {"model_name": name, "max_context_length": 32768, "trainable": True, "sampleable": True}
            for name in BASE_MODELS
        ]
        return json_reply({"supported_models": models})

    def _key(self, _request: Request, _args: dict[str, str]) -> Reply:
        organisation = {"id": "demo-org", "name": "Demo"}
        user = {"id": "demo-user", "name": "Demo user", "email": "demo@example.com"}
        details = {"org_details": organisation, "user_details": user}
        return json_reply({"key_id": 1, "name": "demo", "note": "", "details": details})

    def _config(self, _request: Request, _args: dict[str, str]) -> Reply:
        return json_reply({"pjwt_auth_enabled": self._behaviour.requires_token})

    def _token(self, _request: Request, _args: dict[str, str]) -> Reply:
        claims = {"exp": self._clock() + self._behaviour.token_lifetime_s, "jti": uuid.uuid4().hex}
        parts = (json.dumps(part).encode() for part in ({"alg": "none"}, claims))
        encoded = (base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)
        return json_reply({"jwt": ".".join((*encoded, "demo"))})

    def _storage(self, _request: Request, _args: dict[str, str]) -> Reply:
        stored = [checkpoint.size_bytes or 0 for _run, checkpoint in self._account.checkpoints()]
        gigabytes = sum(stored) / 1e9
        usage = {
            "project_id": "demo-project",
            "user_email": "demo@example.com",
            "checkpoint_count": len(stored),
            "size_bytes": sum(stored),
            "size_gigabytes": gigabytes,
            "estimated_monthly_cost_usd": gigabytes * _STORAGE_RATE,
        }
        body = {"effective_rate_usd_per_gigabyte_month": _STORAGE_RATE, "data": [usage]}
        return json_reply(body)

    # Files

    def _archive(self, _request: Request, args: dict[str, str]) -> Reply:
        run, checkpoint = self._ready(args)
        if self._profile.serves_archives_itself:
            if self._profile.has_archive_ids:
                archive_id = base64.urlsafe_b64encode(f"{run.id}\n{checkpoint.id}".encode())
                place = f"archives/{archive_id.decode()}"
            else:
                place = f"training_runs/{run.id}/checkpoints/{checkpoint.name}"
            url, expires_s = f"{self.base_url}/api/v1/{place}/download", self._clock() + 7200
        else:
            url, expires_s = self._store.sign_archive(run, checkpoint)
        if self._behaviour.archive_response == "json":
            return json_reply(
                {"url": url, "expires": serialization.time_json(expires_s, self._profile)}
            )
        headers = {"Location": url}
        if self._behaviour.sends_expiry:
            headers["Expires"] = formatdate(expires_s, usegmt=True)
        return Reply(HTTPStatus.FOUND, headers)

    def _download(self, _request: Request, args: dict[str, str]) -> Reply:
        if "archive" in args:
            try:
                text = base64.urlsafe_b64decode(args["archive"]).decode()
            except ValueError:
                raise HttpError(404) from None
            run_id, _, checkpoint_id = text.partition("\n")
            args = {"run": run_id, "ckpt": checkpoint_id}
        run, checkpoint = self._ready(args)
        content = self._store.archive(run, checkpoint)
        name = f"{run.id}_{checkpoint.name}.tar.gz"
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Disposition": f'attachment; filename="{name}"',
        }
        return Reply(HTTPStatus.OK, headers, content)

    def _external_urls(self, _request: Request, args: dict[str, str]) -> Reply:
        run, checkpoint = self._lookup.checkpoint(
            args["run"], args["ckpt"], "kind/name", self._profile.kinds
        )
        if checkpoint.kind != "external_weights":
            raise HttpError(400, f"{checkpoint.id} is not an external weights checkpoint")
        urls, expires_s = self._store.sign_files(run, checkpoint)
        return json_reply(
            {"urls": urls, "expires": serialization.time_json(expires_s, self._profile)}
        )

    def _ready(self, args: dict[str, str]) -> tuple[Run, Checkpoint]:
        """Return a checkpoint if its archive is ready; otherwise fail as the server does."""
        profile = self._profile
        run, checkpoint = self._lookup.checkpoint(
            args["run"], args["ckpt"], profile.archive_ids, profile.archive_kinds
        )
        if checkpoint.is_pending:
            raise HttpError(425, "Checkpoint is still being created")
        if checkpoint.building_polls != 0:
            if checkpoint.building_polls is not None:
                checkpoint.building_polls -= 1
            status = self._behaviour.building_status
            raise HttpError(status, "Archive is being created", self._retry_after())
        return run, checkpoint

    def _retry_after(self) -> dict[str, str]:
        retry_after = self._behaviour.retry_after
        return {} if retry_after is None else {"Retry-After": retry_after}
