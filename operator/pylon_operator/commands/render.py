"""`pylon render`: shows the Kubernetes objects that the operator would create for an attempt, and creates none."""

from __future__ import annotations

from pathlib import Path

import click
import yaml

from pylon_api.manifest import ManifestError, load_manifest
from pylon_operator.errors import Refused
from pylon_operator.local_checkpoints import refuse_lost_copies
from pylon_operator.resources import build_attempt

UNKNOWN_UID = "00000000-0000-0000-0000-000000000000"
"""Stands where the API server's would; the token, which derives from it and the operator's key, is none either."""


@click.command("render")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--attempt", default=1, show_default=True, type=click.IntRange(min=1), help="Number of the attempt.")
@click.option("--image", default="pylon-trainer", show_default=True, help="Image where the manifest names none.")
def command(file: Path, attempt: int, image: str) -> None:
    """Print the Service, ConfigMap, Secret and Job of an attempt as YAML."""
    try:
        job = load_manifest(file)
        job = job.model_copy(update={"metadata": job.metadata.model_copy(update={"uid": UNKNOWN_UID})})
        objects = build_attempt(job, attempt, default_image=image, token="placeholder")  # noqa: S106
        refuse_lost_copies(job.spec, objects[-1])
    except ManifestError as error:
        raise click.ClickException("\n".join(error.problems)) from error
    except Refused as error:
        raise click.ClickException(f"{file}: {error.message}") from error
    click.echo(yaml.safe_dump_all(objects, sort_keys=False), nl=False)
