"""Shows a running job on the terminal: live, as plain lines, or as JSON for programs. It only reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pylon_api.job import PylonJob, TrainingProgress
from pylon_api.run import CheckpointReport, GateReport, TrainerPhase, TrainerStatus
from pylon_operator.observation import EmitEvent

SPARKS = "▁▂▃▄▅▆▇█"
SPARKLINE_WIDTH = 32
REFRESHES_PER_SECOND = 4
PANEL_COLUMNS = 100


class View(Protocol):
    """Where a run is shown; a context, so that the terminal is given back."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def update(self, job: PylonJob, report: TrainerStatus | None) -> None:
        """The job was reconciled; `report` is what rank 0 last said."""
        ...

    def event(self, event: EmitEvent) -> None:
        """Something happened that Kubernetes would show as an Event."""
        ...


class _Lines:
    """A view that prints as it goes and has nothing to give back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class PlainView(_Lines):
    """One line for each event, and for each step that is reported."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown: list[str] = []

    def update(self, job: PylonJob, report: TrainerStatus | None) -> None:  # noqa: ARG002  as every view
        """A line when something new was measured."""
        training = job.status.training
        news = measurements(training) if training else []
        if training and news and news != self._shown:
            self._shown = news
            self._print(f"step {training.step}/{training.total_steps}  {'  '.join(figures(training))}")

    def event(self, event: EmitEvent) -> None:
        """A line."""
        self._print(f"{event.reason}: {event.message}")

    def _print(self, line: str) -> None:
        self._console.print(f"{datetime.now():%H:%M:%S} {line}", markup=False, highlight=False, soft_wrap=True)


class JsonView(_Lines):
    """One JSON object a line: `{"event": ...}` or `{"status": ...}`, as the resource has it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = ""

    def update(self, job: PylonJob, report: TrainerStatus | None) -> None:  # noqa: ARG002  as every view
        """The status, when it differs from the last one."""
        self._print("status", job.status.to_wire())

    def event(self, event: EmitEvent) -> None:
        """The event."""
        self._print("event", {"type": event.type, "reason": event.reason, "message": event.message})

    def _print(self, kind: str, content: object) -> None:
        line = json.dumps({kind: content})
        if line != self._shown:
            self._shown = line
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class LiveView:
    """A panel that is drawn again in place."""

    def __init__(self, console: Console) -> None:
        self._job: PylonJob | None = None
        self._report: TrainerStatus | None = None
        self._losses: list[tuple[int, float]] = []
        self._event: EmitEvent | None = None
        self._live = Live(
            console=console, refresh_per_second=REFRESHES_PER_SECOND, transient=True, get_renderable=self._draw
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def update(self, job: PylonJob, report: TrainerStatus | None) -> None:
        """Takes the news; the next refresh shows it."""
        self._job, self._report = job, report
        training = job.status.training
        if training and training.loss is not None:
            # A restart begins at an earlier step: what was shown of the steps after it no longer holds.
            self._losses = [point for point in self._losses if point[0] < training.step]
            if not self._losses or self._losses[-1][1] != training.loss:
                self._losses.append((training.step, training.loss))

    def event(self, event: EmitEvent) -> None:
        """Takes the news; the next refresh shows it."""
        self._event = event

    def _draw(self) -> Panel | Text:
        job = self._job
        if job is None:
            return Text("starting ...", style="dim")
        training = job.status.training or TrainingProgress()
        lines: list[RenderableType] = [progress_line(training, self._report, job)]
        if known := figures(training):
            lines.append(Text("   ".join(known)))
        if training.gate:
            lines.append(Text(gate_words(training.gate), style="dim"))
        if len(self._losses) > 1:
            first, last = self._losses[0][1], self._losses[-1][1]
            drawn = sparkline([loss for _, loss in self._losses], SPARKLINE_WIDTH)
            lines.append(Text.assemble(("loss ", "dim"), (f"{first:.3f} ", ""), (drawn, "cyan"), f" {last:.3f}"))
        lines.append(Text(standing(job), style="dim"))
        if failing := failing_saves(training):
            lines.append(Text(failing, style="yellow"))
        if self._event:
            style = "yellow" if self._event.type == "Warning" else "dim"
            lines.append(
                Text(f"{self._event.reason}: {self._event.message}", style=style, no_wrap=True, overflow="ellipsis")
            )
        lines += [Text(f"! {notice}", style="yellow") for notice in (self._report.notices[-2:] if self._report else [])]
        hint = "Ctrl-C again stops at once" if job.spec.suspend else "Ctrl-C saves a checkpoint and stops"
        title = f"[bold]{escape(job.metadata.namespace)}/{escape(job.metadata.name)}[/]  {phase(job, self._report)}"
        return Panel(
            Group(*lines),
            title=title,
            title_align="left",
            subtitle=f"[dim]{hint}[/]",
            subtitle_align="left",
            width=min(self._live.console.width - 4, PANEL_COLUMNS),  # the terminal's own ^C must not break the line
        )


def progress_line(training: TrainingProgress, report: TrainerStatus | None, job: PylonJob) -> Table:
    """The bar with steps, share and time left."""
    grid = Table.grid(padding=(0, 1))
    share = training.step / training.total_steps if training.total_steps else 0.0
    left = remaining(training, report)
    bar = ProgressBar(total=1.0, completed=share, width=40, pulse=not training.total_steps)
    steps = f"{training.step}/{training.total_steps} steps" if training.total_steps else "no step yet"
    grid.add_row(bar, steps, f"{share:.0%}", f"ETA {left}" if left and not job.spec.suspend else "")
    return grid


def remaining(training: TrainingProgress, report: TrainerStatus | None) -> timedelta | None:
    """Time left at the pace of the last log interval, or None where that is not known."""
    if report is None or not report.step_seconds or report.phase is not TrainerPhase.TRAINING:
        return None
    return timedelta(seconds=round((training.total_steps - training.step) * report.step_seconds))


def figures(training: TrainingProgress) -> list[str]:
    """Loss, speed and tokens, as far as they are known."""
    return measurements(training) + ([f"{count(training.tokens)} tokens"] if training.tokens else [])


def measurements(training: TrainingProgress) -> list[str]:
    """What the trainer measures once in an interval."""
    values = [
        ("loss {:.3f}", training.loss),
        ("held-out {:.3f}", training.held_out_loss),
        ("{} tokens/s", None if training.tokens_per_second is None else count(training.tokens_per_second)),
        ("gate {}", training.gate.summary if training.gate else None),
    ]
    return [form.format(value) for form, value in values if value is not None]


def gate_words(gate: GateReport) -> str:
    """What the gate does, what it spares and why."""
    spares = f", spares {gate.saved_flops_ratio:.0%} of a step's FLOPs" if gate.saved_flops_ratio > 0 else ""
    return f"{gate.decision.lower()}{spares}" + (f": {gate.reason}" if gate.reason else "")


def standing(job: PylonJob) -> str:
    """Attempt, restarts, ready pods and checkpoint."""
    status = job.status
    saved = f"checkpoint at {saved_words(status.checkpoint)}" if status.checkpoint else "no checkpoint yet"
    restarts = "1 restart" if status.restarts == 1 else f"{status.restarts} restarts"
    return f"{saved} · attempt {status.attempt} · {restarts} · {status.pods_ready}/{job.spec.nodes} pods"


def saved_words(checkpoint: CheckpointReport) -> str:
    """Step, size and age of a checkpoint, as far as they are known."""
    size = f", {decimal(checkpoint.size_bytes)}" if checkpoint.size_bytes is not None else ""
    return f"step {checkpoint.step}{size}{_age(checkpoint.committed_time)}"


def failing_saves(training: TrainingProgress) -> str:
    """How many checkpoints in a row were given up, and why the last; empty while saving goes well."""
    saves = training.saves
    if saves is None or not saves.failed_in_row:
        return ""
    which = "the last save" if saves.failed_in_row == 1 else f"the last {saves.failed_in_row} saves"
    return f"{which} failed: {saves.failure}"


def phase(job: PylonJob, report: TrainerStatus | None) -> str:
    """What is going on, in a word or two."""
    speaks = report and report.attempt == job.status.attempt and job.status.phase == "Running"
    return f"{job.status.phase}: {report.phase.lower()}" if report and speaks else job.status.phase


def count(number: float) -> str:
    """1234567 as 1.2M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{number:.0f}"


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as a row of at most `width` bars, each the mean of its share of them."""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


def _age(time: datetime | None) -> str:
    if time is None:
        return ""
    seconds = round((datetime.now(UTC) - time).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f" ({seconds // size} {unit} ago)"
    return f" ({max(seconds, 0)} s ago)"
