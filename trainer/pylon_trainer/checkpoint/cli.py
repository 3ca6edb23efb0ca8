"""`pylon checkpoints`: list, check, describe and remove checkpoints, wherever they lie."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from typing import Any

import click

from pylon_trainer.checkpoint.archive import Archive, Listed, is_job, open_other
from pylon_trainer.checkpoint.audit import audit
from pylon_trainer.checkpoint.description import entry, facts, job, lines, table
from pylon_trainer.checkpoint.manifest import DamagedCheckpoint
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.command_line import errors_for_people

uri_argument = click.argument("uri")
output_option = click.option(
    "--output", type=click.Choice(["text", "json"]), default="text", show_default=True, help="json is for programs."
)


@click.group()
def checkpoints() -> None:
    """List, check, describe and remove checkpoints.

    URI is a directory of any store: a job's, with its checkpoints, or a single checkpoint's.
    """


@checkpoints.command()
@uri_argument
@click.option("--verify", is_flag=True, help="Read every byte, so that damage to the files shows too.")
@output_option
def ls(uri: str, verify: bool, output: str) -> None:
    """List a job's checkpoints, newest first, or the jobs below URI."""
    with errors_for_people():
        archive, name = open_other(uri)
        jobs = [""] if name else _jobs(archive.storage)
        if jobs == [""]:
            listed = [one for one in archive.checkpoints() if name in (None, one.name)]
            _print([_entry(archive, one, verify) for one in listed], output)
        else:
            _refuse_empty(uri, jobs)
            _print([_job(archive.storage, path) for path in jobs], output)


@checkpoints.command()
@uri_argument
def verify(uri: str) -> None:
    """Read every byte of a job's committed checkpoints, or of a single one.

    Names each damaged file and part; exit code 1 if there is any.
    """
    is_whole = True
    with errors_for_people():
        archive, name = _open(uri)
        for listed in _committed(archive, name):
            damages = _damages(archive, listed.name)
            is_whole = is_whole and not damages
            for line in damages or ["whole"]:
                click.echo(f"{listed.name}: {line}")
    if not is_whole:
        sys.exit(1)


@checkpoints.command()
@uri_argument
@output_option
def show(uri: str, output: str) -> None:
    """Describe a checkpoint: a job's newest, or a single one."""
    with errors_for_people():
        archive, name = _open(uri)
        listed = _committed(archive, name)[0]
        try:
            described = facts(archive.load(listed.name))
        except DamagedCheckpoint as damage:
            raise click.ClickException(f"{archive.storage.uri}/{listed.name}: {damage}") from damage
    if output == "json":
        click.echo(json.dumps(described, indent=2))
    else:
        click.echo("\n".join(lines(described)))


@checkpoints.command()
@uri_argument
@click.option("--keep", type=click.IntRange(min=1), required=True, help="How many of the newest to keep.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def prune(uri: str, keep: int, yes: bool) -> None:
    """Remove all but a job's newest checkpoints, and what saves that were given up have left.

    Removes neither the newest committed one nor anything newer than that, so a job may run meanwhile.
    """
    with errors_for_people():
        archive, name = _open(uri)
        if name:
            raise click.ClickException(f"{uri} is a single checkpoint; give its job's directory")
        newest_attempt = max((listed.place.attempt for listed in archive.checkpoints()), default=0)
        archive = Archive(archive.storage, newest_attempt, keep)
        superfluous = archive.superfluous()
        if not superfluous:
            click.echo("nothing to remove")
            return
        for listed in superfluous:
            click.echo(f"{listed.name}: {'committed' if listed.is_committed else 'unfinished'}")
        if not yes:
            click.confirm(f"Remove {'this' if len(superfluous) == 1 else f'these {len(superfluous)}'}?", abort=True)
        for listed in superfluous:
            archive.remove(listed.name)


def _open(uri: str) -> tuple[Archive, str | None]:
    archive, name = open_other(uri)
    if not name and (jobs := _jobs(archive.storage)) != [""]:
        _refuse_empty(uri, jobs)
        raise click.ClickException(f"{uri} holds several jobs; give one of them: {', '.join(jobs)}")
    return archive, name


def _committed(archive: Archive, name: str | None) -> list[Listed]:
    """At least one, newest first."""
    found = [listed for listed in archive.checkpoints() if listed.is_committed and name in (None, listed.name)]
    if not found:
        where = f"{archive.storage.uri}/{name} is" if name else f"{archive.storage.uri} has"
        raise click.ClickException(f"{where} no committed checkpoint")
    return found


def _refuse_empty(uri: str, jobs: list[str]) -> None:
    if not jobs:
        raise click.ClickException(f"{uri} holds no checkpoints, nor do the directories of jobs below it")


def _jobs(storage: Storage, below: str = "", depth: int = 2) -> list[str]:
    """Paths of jobs' directories, which are <namespace>/<job> below the root that the manifests name."""
    names = storage.names(below)
    if is_job(names):
        return [below]
    if depth == 0 or names == [below.rpartition("/")[2]]:  # a listing of a file is that file
        return []
    return [job for name in names for job in _jobs(storage, f"{below}/{name}".lstrip("/"), depth - 1)]


def _entry(archive: Archive, listed: Listed, verify: bool = False) -> dict[str, Any]:
    if not listed.is_committed:
        return entry(listed, None, is_damaged=False)
    try:
        found = archive.load(listed.name)
    except DamagedCheckpoint:
        return entry(listed, None, is_damaged=True)
    is_damaged = archive.damage_of(listed.name) is not None or (verify and bool(_damages(archive, listed.name)))
    return entry(listed, found, is_damaged)


def _job(root: Storage, path: str) -> dict[str, Any]:
    archive = Archive(Storage(f"{root.uri}/{path}"), attempt=0, keep=1)
    return job(path, [_entry(archive, listed) for listed in archive.checkpoints()])


def _damages(archive: Archive, name: str) -> list[str]:
    """One line for each damage, after reading everything; a bar on a terminal's standard error meanwhile."""
    try:
        found = archive.load(name)
    except DamagedCheckpoint as damage:
        return [str(damage)]
    with click.progressbar(length=found.manifest.size_bytes, label=f"reading {name}", file=sys.stderr) as bar:
        return list(audit(archive.storage, found, bar.update))


def _print(rows: list[dict[str, Any]], output: str) -> None:
    if output == "json":
        click.echo(json.dumps(rows, indent=2))
    for line in table(rows, datetime.now(UTC)) if output == "text" else ():
        click.echo(line)
