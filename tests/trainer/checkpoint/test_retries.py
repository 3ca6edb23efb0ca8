"""How long a store is asked again, and what its refusals become."""

from __future__ import annotations

import errno

import pytest

from pylon_trainer.checkpoint.retries import RETRY_DELAYS_SECONDS, RETRY_TOTAL_SECONDS, Patience, translated
from pylon_trainer.errors import ConfigError, StorageError


class Clock:
    """Time that passes only while somebody sleeps, and with every failure."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def __call__(self) -> float:
        return self.seconds


class AnswerError(Exception):
    """As botocore's ClientError."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"An error occurred ({code})")
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


def hidden(error: Exception) -> OSError:
    """As s3fs raises it."""
    hiding = OSError(errno.EIO, "input/output error")
    hiding.__cause__ = error
    return hiding


class StatusError(Exception):
    """As the clients of Google and Azure have it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"{code}")
        self.code = code


@pytest.mark.parametrize(
    ("error", "tries", "becomes"),
    [
        (AnswerError(500, "InternalError"), 6, StorageError),
        (hidden(AnswerError(503, "SlowDown")), 6, StorageError),
        (AnswerError(400, "RequestTimeout"), 6, StorageError),
        (AnswerError(409, "ConditionalRequestConflict"), 6, StorageError),
        (AnswerError(404, "NoSuchBucket"), 1, StorageError),
        (AnswerError(403, "AccessDenied"), 1, ConfigError),
        (hidden(AnswerError(403, "403")), 1, ConfigError),
        (AnswerError(400, "ExpiredToken"), 1, ConfigError),
        (StatusError(503), 6, StorageError),
        (StatusError(401), 1, ConfigError),
        (TimeoutError("timed out"), 6, StorageError),
        (OSError(errno.ENOSPC, "full"), 1, StorageError),
        (PermissionError(errno.EACCES, "denied"), 1, StorageError),
    ],
    ids=lambda value: f"{value!r}" if isinstance(value, Exception) else None,
)
def test_what_another_try_may_mend_is_tried_again(error: Exception, tries: int, becomes: type[Exception]) -> None:
    clock, asked = Clock(), []

    def refuse() -> None:
        asked.append(clock.seconds)
        raise error

    with pytest.raises(becomes, match=r"^cannot write s3://bucket/x: "):
        Patience("s3://bucket/x", clock.sleep, clock).ask("write", refuse)
    assert len(asked) == tries <= len(RETRY_DELAYS_SECONDS) + 1


def test_an_undertaking_ends_in_time_however_many_calls_it_has() -> None:
    clock = Clock()
    patience = Patience("s3://bucket/x", clock.sleep, clock)
    outcomes: list[bool] = []

    def fail_every_other_time() -> None:
        outcomes.append(len(outcomes) % 2 == 1)
        if not outcomes[-1]:
            raise TimeoutError("timed out")

    def call_often() -> None:
        for _ in range(100_000):
            patience.ask("write", fail_every_other_time)

    with pytest.raises(StorageError):
        call_often()
    assert RETRY_TOTAL_SECONDS <= clock.seconds < RETRY_TOTAL_SECONDS + max(RETRY_DELAYS_SECONDS)
    assert sum(outcomes) > 100


def test_what_is_an_answer_is_no_failure() -> None:
    clock = Clock()

    def refuse() -> None:
        raise FileNotFoundError("none")

    with pytest.raises(FileNotFoundError):
        Patience("s3://bucket/x", clock.sleep, clock).ask("read", refuse, answers=(FileNotFoundError,))
    assert clock.seconds == 0


def test_a_refusal_tells_the_stores_code_and_nothing_that_was_sent() -> None:
    error = AnswerError(403, "SignatureDoesNotMatch")
    error.args = ("the secret hunter2 is wrong",)
    assert str(translated(error, "write", "s3://bucket/x")) == (
        "cannot write s3://bucket/x: credentials missing or refused (SignatureDoesNotMatch); "
        "give them to the pods from a Secret"
    )
