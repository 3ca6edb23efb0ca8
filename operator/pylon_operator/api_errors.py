"""What the API server may refuse, by name.

    ApiError
    |- Unreachable             no answer, or none in time
    |- Forbidden        403    a missing permission
    |  |- NamespaceTerminating  nothing can be created there any more
    |- NotFound         404
    |- Conflict         409    someone else wrote first
    |  |- AlreadyExists
    |- Gone             410    the version is too old to watch from
    |- Invalid     400, 422    it does not parse, or a schema or rule says no

Messages are one line and never hold what was sent: a body may be a Secret.
"""

from __future__ import annotations

from typing import Any

import orjson


class ApiError(Exception):
    """A request that failed. `status` is the HTTP code, 0 without an answer."""

    def __init__(self, verb: str, path: str, message: str, status: int = 0, reason: str = "") -> None:
        super().__init__(f"{verb} {path}: {message}")
        self.message = message
        self.status = status
        self.reason = reason


class Unreachable(ApiError):
    """No answer, or none in time."""


class Forbidden(ApiError):
    """A missing permission."""


class NamespaceTerminating(Forbidden):
    """Nothing can be created in the namespace any more."""


class NotFound(ApiError):
    """No such object or resource."""


class Conflict(ApiError):
    """Someone else wrote first, or a precondition does not hold."""


class AlreadyExists(Conflict):
    """The name is taken."""


class Gone(ApiError):
    """The resource version is too old."""


class Invalid(ApiError):
    """It does not parse, or a schema or rule says no."""


_BY_STATUS: dict[int, type[ApiError]] = {
    400: Invalid,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
}


def error_of(verb: str, path: str, status: int, content: bytes) -> ApiError:
    """The error that an answer of `status` with a metav1.Status (or anything else) as `content` stands for."""
    try:
        answer = orjson.loads(content)
    except orjson.JSONDecodeError:
        answer = {}
    return error_of_status(verb, path, status, answer if isinstance(answer, dict) else {})


def error_of_status(verb: str, path: str, status: int, answer: dict[str, Any]) -> ApiError:
    """The same from a parsed metav1.Status; watches carry one in an ERROR event."""
    reason = str(answer.get("reason") or "")
    message = " ".join(str(answer.get("message") or f"HTTP {status}").split())
    kind = _BY_STATUS.get(status, ApiError)
    if reason == "AlreadyExists":
        kind = AlreadyExists
    elif any(cause.get("reason") == "NamespaceTerminating" for cause in _causes(answer)):
        kind = NamespaceTerminating
    elif reason == "Expired":
        kind = Gone
    return kind(verb, path, message, status, reason)


def _causes(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return (answer.get("details") or {}).get("causes") or []
