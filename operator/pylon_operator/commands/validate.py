"""`pylon validate`: says what is wrong with manifests, without a cluster and without the trainer."""

from __future__ import annotations

from pathlib import Path

import click

from pylon_api.manifest import ManifestError, load_manifest


@click.command("validate")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.pass_context
def command(ctx: click.Context, files: tuple[Path, ...]) -> None:
    """Check manifests: one line `file: field: problem` for each mistake, and exit code 1 if there is any.

    What depends on data, devices or a store is the trainer's to check when it starts.
    """
    failed = False
    for file in files:
        try:
            load_manifest(file)
            click.echo(f"{file}: valid")
        except ManifestError as error:
            failed = True
            for problem in error.problems:
                click.echo(problem, err=True)
    ctx.exit(1 if failed else 0)
