"""Asking a store again: how often, how long, and which refusals are final.

Every store's client brings exceptions of its own; here they become one line that a person can act on. A line about
refused credentials holds the store's code for the refusal and nothing of what was sent.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from pylon_trainer.errors import ConfigError, StorageError, TrainerError

RETRY_DELAYS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Longest waits between tries: a store that is busy or a connection that broke is usually back within seconds."""

RETRY_TOTAL_SECONDS = 120.0
"""One undertaking, be it a single call or a file of many parts, begins no new try this long after its first refusal."""

_SLOW_DOWN = frozenset({"SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"})
_SLOW_DOWN_FACTOR = 2.0
"""A store that asks for fewer requests gets longer waits than one that merely failed."""

_REFUSED = frozenset({"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied"})
_MENDS_ITSELF = frozenset({400, 408, 409, 425, 429})
"""Of the answers below 500, those that another try may change; S3 says 400 when a body did not arrive whole."""

_FINAL = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOENT}
)
"""Errors of a disk that no retry mends."""

T = TypeVar("T")


class Patience:
    """The tries of one undertaking, about one file. Threads may share it: each call is tried again by itself, the time
    is common."""

    def __init__(self, uri: str, sleep: Callable[[float], None], clock: Callable[[], float] = time.monotonic) -> None:
        """sleep: waits that many seconds; what it raises ends the tries."""
        self._uri = uri
        self._sleep = sleep
        self._clock = clock
        self._deadline: float | None = None

    def ask(self, verb: str, operation: Callable[[], T], answers: tuple[type[Exception], ...] = ()) -> T:
        """What the operation returns, after as many tries as it takes and are allowed.

        answers: exceptions that are no failures; they are raised as they are, at once.
        StorageError when the store refuses, ConfigError when it refuses the credentials.
        """
        for delay in (*RETRY_DELAYS_SECONDS, None):
            try:
                return operation()
            except answers:
                raise
            except Exception as error:  # every store brings exceptions of its own; each is translated, none swallowed
                if delay is None or _is_final(error) or self._is_late():
                    raise translated(error, verb, self._uri) from error
                wait = delay * _SLOW_DOWN_FACTOR if _code(error) in _SLOW_DOWN or status_of(error) == 503 else delay
                # Half of it by chance, so that ranks that failed together do not come back together.
                self._sleep(random.uniform(wait / 2, wait))  # noqa: S311
        raise AssertionError("the last try returns or raises")

    def _is_late(self) -> bool:
        now = self._clock()
        if self._deadline is None:
            self._deadline = now + RETRY_TOTAL_SECONDS
        return now >= self._deadline


def lacks_credentials(error: Exception) -> bool:
    """Whether a store's client found no credentials or had them refused."""
    return "Credential" in type(error).__name__ or _code(error) in _REFUSED or status_of(error) in (401, 403)


@contextmanager
def explained(verb: str, uri: str) -> Iterator[None]:
    """Translate the errors of what is not worth a second try."""
    try:
        yield
    except Exception as error:
        raise translated(error, verb, uri) from error


def translated(error: Exception, verb: str, uri: str) -> TrainerError:
    """The error in one line: ConfigError for credentials, StorageError for all else."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if lacks_credentials(error):
        return ConfigError(
            f"cannot {verb} {uri}: credentials missing or refused ({_code(error) or line}); "
            f"give them to the pods from a Secret"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"cannot {verb} {uri}: no space left there; free some or lower checkpoint.keep")
    return StorageError(f"cannot {verb} {uri}: {line}")


def _is_final(error: Exception) -> bool:
    status = status_of(error)
    if lacks_credentials(error):
        return True
    if status is not None:
        return 400 <= status < 500 and status not in _MENDS_ITSELF
    return isinstance(error, OSError) and error.errno in _FINAL


def status_of(error: Exception) -> int | None:
    """The HTTP status of a store's answer. Google's, Azure's and HTTP's clients carry it in the error; Amazon's in a
    dictionary, which s3fs hides behind an OSError."""
    for field in ("code", "status_code", "status"):
        if isinstance(status := getattr(error, field, None), int):
            return status
    status = _amazon(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return status if isinstance(status, int) else None


def _code(error: Exception) -> str:
    return str(_amazon(error).get("Error", {}).get("Code", ""))


def _amazon(error: Exception) -> dict[str, dict[str, object]]:
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return response if isinstance(response, dict) else {}
