"""Says how a run ended: the status that `kubectl describe` would show, on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from pylon_api.job import ConditionStatus, PylonJob
from pylon_api.names import USER_ERRORS, ConditionType, ExitCode
from pylon_api.run import TrainerStatus
from pylon_operator.local.drive import suspended
from pylon_operator.local.state import JobDirectory, ended, verdict
from pylon_operator.local.view import failing_saves, figures, saved_words

MARKS = {
    ConditionStatus.TRUE: "[green]True[/]",
    ConditionStatus.FALSE: "[dim]False[/]",
    ConditionStatus.UNKNOWN: "[yellow]Unknown[/]",
}


def print_summary(
    console: Console, job: PylonJob, report: TrainerStatus | None, directory: JobDirectory, again: str
) -> None:
    """Prints the end of a run; `again` is the command that resumes it."""
    console.print(_outcome(job, again), highlight=False, soft_wrap=True)
    for name, value in _facts(job, report, directory):
        console.print(Text.assemble((f"{name:<12}", "dim"), value), soft_wrap=True)
    console.print()
    console.print(_conditions(job))
    if job.status.failures:
        console.print()
        console.print(_failures(job))
    for notice in report.notices if report else []:
        console.print(Text(f"Notice: {notice}", style="yellow"))
    if report and report.sample:
        console.print(Panel(Text(report.sample), title="Sample", title_align="left"))


def exit_code(job: PylonJob) -> int:
    """0 for success, 75 for stopped, the trainer's own code for a user's mistake, 1 for any other failure."""
    if not ended(job):
        return ExitCode.STOPPED
    if verdict(job) is ConditionStatus.TRUE:
        return ExitCode.SUCCEEDED
    last = job.status.failures[-1].exit_code if job.status.failures else None
    return last if last in USER_ERRORS else 1


def _outcome(job: PylonJob, again: str) -> Text:
    name = f"{job.metadata.namespace}/{job.metadata.name}"
    condition = next((each for each in job.status.conditions if each.type == ConditionType.SUCCEEDED), None)
    if not ended(job):
        how = (
            "is suspended."
            if suspended(job)
            else "was stopped before it had saved; what was committed earlier is kept."
        )
        return Text.assemble((f"{name} {how} ", "bold yellow"), "To go on: ", (again, "bold"))
    assert condition is not None
    said = f"{condition.reason}: {condition.message}" if condition.message else condition.reason
    if condition.status is ConditionStatus.TRUE:
        return Text.assemble((f"{name} succeeded. ", "bold green"), said)
    return Text.assemble((f"{name} failed. ", "bold red"), said)


def _facts(job: PylonJob, report: TrainerStatus | None, directory: JobDirectory) -> list[tuple[str, str]]:
    status, facts = job.status, []
    if training := status.training:
        done = f"step {training.step}/{training.total_steps}"
        facts.append(("training", "  ".join([done, *figures(training)])))
    if status.checkpoint:
        facts.append(("checkpoint", f"{saved_words(status.checkpoint)}  {status.checkpoint.uri}"))
    if training and (failing := failing_saves(training)):
        facts.append(("not saved", failing))
    if report and report.export_uri:
        facts.append(("export", report.export_uri))
    facts.append(("restarts", str(status.restarts)))
    facts.append(("logs", str(directory.logs)))
    return facts


def _conditions(job: PylonJob) -> Table:
    table = Table(
        "Condition",
        "Status",
        "Reason",
        Column("Message", overflow="fold"),
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for each in job.status.conditions:
        table.add_row(each.type, MARKS[each.status], each.reason, Text(each.message))
    return table


def _failures(job: PylonJob) -> Table:
    table = Table(
        "Failed attempt",
        "Step",
        "Exit",
        "Reason",
        Column("Message", overflow="fold"),
        box=None,
        pad_edge=False,
        header_style="dim",
    )
    for each in job.status.failures:
        step = "" if each.step is None else str(each.step)
        code = "" if each.exit_code is None else str(each.exit_code)
        table.add_row(str(each.attempt), step, code, each.reason, Text(each.message))
    return table
