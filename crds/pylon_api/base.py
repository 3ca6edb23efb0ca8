"""The one configuration that every model of the contract shares.

camelCase on the wire because that is what Kubernetes users write; snake_case and frozen in Python because a spec
that nobody can change in passing is one less thing to reason about.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Spec(BaseModel):
    """What a person writes: unknown fields are errors, so that a typo never passes silently."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,  # JSON, and so the API server, has neither
        use_attribute_docstrings=True,
    )

    def to_wire(self) -> dict[str, Any]:
        """The JSON object as it stands in a manifest, without fields that are not set."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Report(Spec):
    """What a program writes: unknown fields are ignored, so that a newer writer can talk to an older reader."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=True)


def rule(expression: str, message: str, **more: str) -> dict[str, str]:
    """One CEL validation rule of a structural schema.

    `message` is what kubectl prints: it names the field and the fix.
    """
    return {"rule": expression, "message": message, **more}


def rules(*validations: dict[str, str]) -> dict[str, Any]:
    """`json_schema_extra` for a model or field that carries CEL rules."""
    return {"x-kubernetes-validations": list(validations)}
