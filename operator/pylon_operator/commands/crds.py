"""`pylon crds`: writes what is generated from the models, or says what is out of date."""

from __future__ import annotations

from pathlib import Path

import click

from pylon_api.generated import find_stale, write_files


@click.command("crds")
@click.option("--check", is_flag=True, help="Write nothing; fail when a file is out of date.")
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    show_default="the current directory",
    help="Root of a checkout of Pylon.",
)
def command(check: bool, root: Path) -> None:
    """Write the CRD (crds/ and the chart) and the API reference from the models."""
    if not (root / "crds" / "pylon_api").is_dir():
        raise click.UsageError(f"{root.resolve()} is no checkout of Pylon: run this at its root, or pass --root")
    if not check:
        for path in write_files(root):
            click.echo(f"wrote {path}")
        return
    stale = find_stale(root)
    if stale:
        raise click.ClickException(f"out of date: {', '.join(stale)}; run `pylon crds`")
