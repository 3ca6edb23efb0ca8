"""Reads manifests for people: YAML in, a validated PylonJob or one line for each mistake out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pylon_api import names
from pylon_api.job import PylonJob
from pylon_api.training import HIDDEN_INPUT


class ManifestError(ValueError):
    """A manifest cannot be used. `problems` holds one line for each mistake: the field, the value, the fix."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def load_manifest(path: Path) -> PylonJob:
    """The one PylonJob in a YAML file.

    Raises ManifestError when the file cannot be read, is not YAML, or does not hold exactly one valid PylonJob.
    """
    try:
        documents = [document for document in yaml.safe_load_all(path.read_text()) if document is not None]
    except OSError as error:
        raise ManifestError([f"{path}: {error.strerror or error}"]) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ManifestError([f"{path}: not YAML: {' '.join(str(error).split())}"]) from error
    jobs = [d for d in documents if isinstance(d, dict) and d.get("kind") == names.KIND]
    if len(jobs) != 1:
        raise ManifestError([f"{path}: holds {len(jobs)} documents of kind {names.KIND}, needs exactly 1"])
    try:
        return parse_job(jobs[0])
    except ManifestError as error:
        raise ManifestError([f"{path}: {problem}" for problem in error.problems]) from error


def parse_job(manifest: dict[str, Any]) -> PylonJob:
    """A PylonJob from its JSON form. Raises ManifestError with one line for each mistake."""
    if manifest.get("apiVersion") != names.API_VERSION:
        raise ManifestError([f"apiVersion: {manifest.get('apiVersion')!r}, should be {names.API_VERSION}"])
    try:
        text = json.dumps(manifest, default=str)
    except (TypeError, ValueError) as error:
        raise ManifestError([f"manifest: has no JSON form: {error}"]) from error
    try:
        job = PylonJob.model_validate_json(text, strict=True)  # strict: the API server takes no "2" for 2 either
    except ValidationError as error:
        raise ManifestError(describe(error)) from error
    if len(job.metadata.name) > names.MAX_JOB_NAME_LENGTH:
        raise ManifestError(
            [
                f"metadata.name: {job.metadata.name!r} has {len(job.metadata.name)} characters, "
                f"at most {names.MAX_JOB_NAME_LENGTH} fit (pod host names are made from it)"
            ]
        )
    if not re.fullmatch(names.JOB_NAME_PATTERN, job.metadata.name):
        raise ManifestError(
            [
                f"metadata.name: {job.metadata.name!r} must be lower-case letters, digits and '-', starting with a "
                "letter (a Service is named after it)"
            ]
        )
    return job


def describe(error: ValidationError) -> list[str]:
    """pydantic's errors as one line each: `spec.training.batch.sequences: Input should be ... (got 0)`."""
    lines = []
    for problem in error.errors(include_url=False):
        field = field_path(problem["loc"]) or "manifest"
        if problem["type"] == "extra_forbidden":
            lines.append(f"{field}: unknown field")
        elif problem["type"] == "missing":
            lines.append(f"{field}: required, but not set")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            value = problem["input"]
            showable = isinstance(value, (str, int, float, bool)) and problem["type"] != HIDDEN_INPUT
            shown = f" (got {value!r})" if showable else ""
            lines.append(f"{field}: {message}{shown}")
    return lines


def field_path(location: tuple[int | str, ...]) -> str:
    """A field as Kubernetes writes it: `spec.failurePolicy.rules[0].exitCodes`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
