"""The key that job tokens are derived from: 32 random bytes that outlive the operator, so that it need not read
tokens back.

It is kept in a Secret of the operator's own namespace, the only one that the operator may read, or in a file.
"""

from __future__ import annotations

import base64
import secrets
from pathlib import Path

from pylon_operator.api import Api
from pylon_operator.api_errors import AlreadyExists, NotFound
from pylon_operator.kinds import SECRETS
from pylon_operator.permissions import KEY_SECRET

MIN_BYTES = 16


class TokenKeyError(Exception):
    """The key cannot be used; the message is one line that names the fix."""


def read_token_key(path: Path) -> bytes:
    """The key in a file. Raises TokenKeyError."""
    try:
        key = path.read_bytes().strip()
    except OSError as error:
        raise TokenKeyError(f"--token-key-file {path}: {error.strerror or error}") from error
    return _checked(key, f"--token-key-file {path}")


async def ensure_token_key(api: Api, namespace: str) -> bytes:
    """The key in Secret `pylon-token-key` of `namespace`, made if there is none. Raises ApiError and TokenKeyError."""
    for _ in range(2):  # the second round is for another operator that made it first
        try:
            secret = await api.request("GET", SECRETS.path(namespace, KEY_SECRET))
        except NotFound:
            key = secrets.token_bytes(32)
            body = {
                "apiVersion": SECRETS.api_version,
                "kind": SECRETS.kind,
                "metadata": {"name": KEY_SECRET, "namespace": namespace},
                "type": "Opaque",
                "immutable": True,
                "data": {"key": base64.b64encode(key).decode()},
            }
            try:
                await api.request("POST", SECRETS.path(namespace), body=body)
            except AlreadyExists:
                continue
            return key
        else:
            break
    where = f"Secret {namespace}/{KEY_SECRET}"
    return _checked(base64.b64decode((secret.get("data") or {}).get("key") or ""), where)


def _checked(key: bytes, where: str) -> bytes:
    if len(key) < MIN_BYTES:
        raise TokenKeyError(
            f"{where}: the key has {len(key)} bytes, needs at least {MIN_BYTES}; delete it to get a new one"
        )
    return key
