"""One run from start to end, as every rank lives it: build, restore, train, then evaluate, save, sample and export.

What each part does is theirs to say; this is the order of things.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing

import torch

from pylon_api.run import RunConfig, TrainerPhase
from pylon_api.training import ExportFormat
from pylon_trainer.checkpoint.saver import Saver
from pylon_trainer.data import open_data
from pylon_trainer.errors import NonFiniteLoss, Stopped
from pylon_trainer.export import export_hugging_face
from pylon_trainer.meter import Meter
from pylon_trainer.run import Run, build
from pylon_trainer.runtime.distributed import World
from pylon_trainer.runtime.signals import StopFlag
from pylon_trainer.sampling import generate
from pylon_trainer.status import Board
from pylon_trainer.step import IGNORED, Batch

MAX_SKIPPED_STEPS = 10
"""Steps in a row without finite gradients after which training has failed."""

SKIP_CHECK_STEPS = 10
"""Steps between looks at the count of skipped ones: a look waits for the device."""

logger = logging.getLogger("pylon")


def train(config: RunConfig, world: World, board: Board, stop: StopFlag, grace_seconds: float) -> None:
    """Train to the end. Stopped, after a save at an agreed step, when any rank was asked to stop before. Collective.

    grace_seconds: between such a request and the end of the process.
    """
    training = config.training
    with ExitStack() as opened:
        data = opened.enter_context(
            closing(
                open_data(
                    training.data,
                    seed=training.seed,
                    rank=world.rank,
                    world_size=world.size,
                    global_sequences=training.batch.sequences,
                )
            )
        )
        run = build(config, world, data)
        saver = opened.enter_context(closing(Saver(run, board, stop, grace_seconds)))
        saver.restore()
        stop.defer()
        meter = Meter(world)
        held_out = data.held_out(training.evaluation.sequences)
        while run.step < run.total_steps:
            batch = data.next_batch()
            is_asked = board.begin_step(run.step + 1)
            tokens, stops, *votes = world.agree(_labelled_tokens(batch), stop.is_set(), *saver.votes(is_asked))
            if stops:
                stop.begin_grace()
            saver.heed(votes, is_last=stops > 0 or run.step + 1 == run.total_steps)
            meter.add(run.advance(batch, tokens, saver.release))
            saver.end_step(meter.training_seconds)
            board.update(step=run.step, tokens=run.tokens)
            if run.step % SKIP_CHECK_STEPS == 0 or run.step == run.total_steps:
                _refuse_to_stay_infinite(run)
            if run.step % training.log_interval_steps == 0 or run.step == run.total_steps:
                _log(run, meter, board)
            if _is_due(run, training.consensus.hash_check_steps):
                _compare_replicas(run, board)
            if _is_due(run, training.evaluation.interval_steps):
                with meter.paused():
                    _evaluate(run, held_out, board)
            if stops and run.step < run.total_steps:  # a stop in the last step finds the run done
                saver.finish()
                raise Stopped(f"asked to stop: left at step {run.step}{saver.where()}")
        _evaluate(run, held_out, board)
        saver.finish()
        if world.rank == 0:
            _leave_results(run, board)
    board.update(phase=TrainerPhase.FINISHED)


def _is_due(run: Run, interval_steps: int) -> bool:
    """Whether this step ends an interval; the last step is taken care of after the loop."""
    return interval_steps > 0 and run.step % interval_steps == 0 and run.step < run.total_steps


def _labelled_tokens(batch: Batch) -> int:
    return int((batch.labels_BT != IGNORED).sum())


def _refuse_to_stay_infinite(run: Run) -> None:
    skipped = int(run.optimizer.skipped_in_row)
    if skipped >= MAX_SKIPPED_STEPS:
        raise NonFiniteLoss(
            f"gradients were not finite in {skipped} steps in a row up to step {run.step}; "
            f"lower training.optimizer.learningRate or look at the data"
        )


def _compare_replicas(run: Run, board: Board) -> None:
    healed = run.agreement.check()
    if healed is not None:
        notice = f"after step {run.step} {healed}"
        board.add_notice(notice)
        board.update(healed_replicas=board.status.healed_replicas + 1)
        if run.world.rank == 0:
            logger.warning(notice)


def _log(run: Run, meter: Meter, board: Board) -> None:
    reading = meter.read()
    gate = run.training_step.report()
    skipped = int(run.optimizer.skipped)
    if skipped and not board.status.skipped_steps:
        what = f"logits of {reading.nonfinite_tokens} token(s)" if reading.nonfinite_tokens else "gradients"
        board.add_notice(
            f"by step {run.step} an update was left out because {what} were not finite; skippedSteps counts on"
        )
    board.update(
        loss=reading.loss,
        tokens_per_second=reading.tokens_per_second,
        gate=gate,
        control=run.control.report() if run.control else None,
        difficulty=reading.difficulty,
        bytes_per_step=reading.bytes_per_step,
        bytes_per_step_peak=reading.bytes_per_step_peak,
        step_seconds=reading.step_seconds,
        skipped_steps=skipped,
    )
    if run.world.rank == 0:
        loss = "nan" if reading.loss is None else f"{reading.loss:.6f}"
        logger.info(
            f"step={run.step} loss={loss} tokens_per_second={reading.tokens_per_second:.0f} "
            f"learning_rate={reading.learning_rate:.3e} gradient_norm={reading.gradient_norm:.4f}"
            + (f" gate={gate.decision} token_ratio={gate.ratio:.3f}" if gate else "")
            + (f" skipped={skipped}" if skipped else "")
        )


def _evaluate(run: Run, held_out: list[Batch], board: Board) -> None:
    """Mean loss over the held-out sequences of all ranks. Collective."""
    sums = torch.zeros(2, dtype=torch.float64, device=run.world.device)
    for batch in held_out:
        for part in run.micro_batches(batch):
            result = run.training_step.evaluate(part)
            sums += torch.stack([result.loss_sum.double(), result.tokens.double()])
    loss_sum, tokens = run.world.sum(sums).tolist()
    if tokens:
        board.update(held_out_loss=loss_sum / tokens)
        if run.world.rank == 0:
            logger.info(f"step={run.step} held_out_loss={loss_sum / tokens:.6f}")


def _leave_results(run: Run, board: Board) -> None:
    """The sample and the export. Rank 0 only."""
    training, tokenizer = run.config.training, run.data.tokenizer
    board.update(phase=TrainerPhase.EXPORTING)
    evaluation = training.evaluation
    if evaluation.sample_prompt:
        sample = generate(
            run.model,
            tokenizer,
            evaluation.sample_prompt,
            evaluation.sample_tokens,
            training.seed,
            sequence_length=training.data.sequence_length,
        )
        board.update(sample=sample)
        logger.info(f"sample: {sample}")
    if training.export.format is ExportFormat.HUGGING_FACE:
        uri = training.export.uri or f"{run.config.checkpoint_directory}/export"
        export_hugging_face(run.model, tokenizer, uri, sequence_length=training.data.sequence_length)
        board.update(export_uri=uri)
        logger.info(f"exported to {uri}")
