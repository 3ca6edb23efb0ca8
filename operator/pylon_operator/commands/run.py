"""`pylon run`: a job on this machine, with the operator's own plan and the pods that the operator would build."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import click
from rich.console import Console

from pylon_api.job import PylonJob
from pylon_api.manifest import ManifestError, load_manifest
from pylon_api.names import ExitCode
from pylon_operator.local.cluster import LocalCluster
from pylon_operator.local.devices import find_gpus, threads_per_process
from pylon_operator.local.drive import drive
from pylon_operator.local.pods import PodRunner
from pylon_operator.local.state import JobDirectory, StateError, admit, ended, job_directory
from pylon_operator.local.summary import exit_code, print_summary
from pylon_operator.local.view import JsonView, LiveView, PlainView, View

LOG_COLUMNS = 160
"""Width of what is printed where there is no terminal."""


class UserError(click.ClickException):
    """Something that only the user can mend; the exit code says so, as the trainer's does."""

    exit_code = int(ExitCode.BAD_CONFIG)


class StorageFailure(click.ClickException):
    """The job's own directory cannot be read or written."""

    exit_code = int(ExitCode.STORAGE)


@click.command("run")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--fresh", is_flag=True, help="Forget the earlier run of this job. Its checkpoints stay on disk.")
@click.option(
    "--output",
    type=click.Choice(["auto", "live", "plain", "json"]),
    default="auto",
    show_default=True,
    help="auto: live on a terminal, else plain.",
)
@click.pass_context
def command(ctx: click.Context, file: Path, fresh: bool, output: str) -> None:
    """Run a job on this machine, or resume it.

    Ctrl-C saves a checkpoint and stops; a second one stops at once. Paths in the manifest are relative to the working
    directory, which also keeps the job's state, in .pylon. Exit codes: 0 succeeded, 75 stopped, 65 and 78 a mistake in
    the data or the manifest, 74 a full or unwritable disk, 1 any other failure.
    """
    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
    try:
        manifest = load_manifest(file)
        directory = job_directory(manifest, Path.cwd())
        gpus = find_gpus(manifest.spec)
        if find_spec("torch") is None:
            raise UserError(
                "training needs torch, which is not installed: pip install 'pylon-training[operator,trainer]'"
            )
        with directory.locked():
            if fresh:
                directory.clear()
            job = admit(manifest, directory.load())
            ctx.exit(_run(job, directory, gpus, console, output, file))
    except ManifestError as error:
        raise UserError("\n".join(error.problems)) from error
    except StateError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise StorageFailure(f"{error.filename or directory.path}: {error.strerror}") from error


def _run(
    job: PylonJob, directory: JobDirectory, gpus: tuple[str, ...], console: Console, output: str, file: Path
) -> int:
    again, report = f"pylon run {file}", None
    if ended(job):
        click.echo(f"This job has ended before; `{again} --fresh` starts it anew.", err=True)
    else:
        threads = threads_per_process(job.spec.world_size)
        runner = PodRunner(
            directory.logs,
            environment={} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)},
            gpus=gpus,
            gpu_resource_name=job.spec.gpu_resource_name,
        )
        with _view(output, console) as view:
            cluster = asyncio.run(_drive(job, directory, runner, view))
        job, report = cluster.job, cluster.report
    if output == "json":
        click.echo(json.dumps(job.to_wire()))
    else:
        print_summary(console, job, report, directory, again)
    return exit_code(job)


async def _drive(job: PylonJob, directory: JobDirectory, runner: PodRunner, view: View) -> LocalCluster:
    """Runs the job; the first interrupt suspends it, the second ends this process's part in it at once."""
    async with LocalCluster(job, directory, runner, on_event=view.event) as cluster:
        driving = asyncio.ensure_future(
            drive(cluster, lambda: view.update(cluster.job, cluster.report), directory.last_saved)
        )

        def interrupt() -> None:
            if cluster.job.spec.suspend:
                driving.cancel()
            else:
                cluster.set_suspend(True)
                view.update(cluster.job, cluster.report)

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, interrupt)
        await asyncio.wait([driving])
        if not driving.cancelled():
            driving.result()
        return cluster


def _view(output: str, console: Console) -> View:
    if output == "json":
        return JsonView(console)
    if output == "live" or (output == "auto" and console.is_terminal):
        return LiveView(console)
    return PlainView(console)
