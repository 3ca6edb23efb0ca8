"""Errors that a person should see on the PylonJob, each with the reason that its condition carries.

Only refusals are here: what a retry can mend (timeouts, conflicts, throttling) is raised and retried by whoever does
the I/O.
"""

from __future__ import annotations

from pylon_api.names import Reason


class Refused(Exception):
    """The API server, or a builder before it, will not have the objects of an attempt.

    `reason` InvalidSpec ends the job, because only another spec could help; Forbidden (permissions, quota, admission)
    is shown and tried again. `message` is one line: the field, the value, the fix.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class TemplateError(Refused):
    """spec.template cannot be merged."""

    def __init__(self, message: str) -> None:
        super().__init__(Reason.INVALID_SPEC, message)
