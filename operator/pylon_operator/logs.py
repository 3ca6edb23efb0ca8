"""Structured logs: one line for each thing that happened, as key=value text or JSON, naming the job and attempt.

Callers pass what a line is about as `extra`; nothing that could be a secret is ever passed.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

LogFormat = Literal["json", "text"]

# What every LogRecord has; anything beyond came from `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class StructuredFormatter(logging.Formatter):
    """Time (UTC), level, logger, message, then the extra fields."""

    def __init__(self, form: LogFormat) -> None:
        super().__init__()
        self._form = form

    def format(self, record: logging.LogRecord) -> str:
        """One line; a traceback, where there is one, is a field of it."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields |= {k: v for k, v in vars(record).items() if k not in _STANDARD}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        if self._form == "json":
            return orjson.dumps(fields, default=str).decode()
        return " ".join(f"{key}={_quoted(str(value))}" for key, value in fields.items())


def configure_logs(form: LogFormat, level: int = logging.INFO) -> None:
    """Send Pylon's lines, and others' warnings, to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(StructuredFormatter(form))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("pylon_operator").setLevel(level)
    logging.getLogger("kopf").setLevel(logging.ERROR)  # it warns that it does not get the signals, which is meant


def _quoted(text: str) -> str:
    return orjson.dumps(text).decode() if not text or any(c in text for c in ' "=\n\t') else text
