"""The expiry of a JSON Web Token (RFC 7519). Pure."""

import base64
import binascii
import json


def expiry_of(token: str) -> float | None:
    """Return the `exp` of a JWT, seconds since 1970; None for a text without one."""
    parts = token.split(".")
    if len(parts) != 3 or not token.startswith("eyJ"):
        return None
    try:
        payload = base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4))
        claims = json.loads(payload)
    except (ValueError, binascii.Error, RecursionError):
        return None
    expiry = claims.get("exp") if isinstance(claims, dict) else None
    if isinstance(expiry, bool) or not isinstance(expiry, int | float):
        return None
    return float(expiry) if abs(expiry) < 1e15 else None
