"""A request as the apps of a demo server see it."""

from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Request:
    """One request.

    Attributes:
        origin: `api` or `store`.
        method: HTTP method, upper case.
        path: Decoded path, including the prefix of the base URL.
        query: The last value of each query parameter.
        endpoint: The matched route, such as `GET training_runs/{run}`; `?` if unknown.
        headers: Headers by lower-case name.
        api_key: Value of `X-API-Key`, or the bearer token.
        body: Body of the request.
    """

    origin: str
    method: str
    path: str
    query: dict[str, str]
    endpoint: str
    headers: dict[str, str]
    api_key: str | None = field(repr=False)
    body: bytes = b""

    @property
    def range(self) -> str | None:
        """The `Range` header, or None."""
        return self.headers.get("range")
