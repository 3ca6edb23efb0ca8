"""What of a run goes into a checkpoint and comes back, with all ranks taking part.

Rank 0 alone speaks to the store; what it chose to restore it broadcasts, so that no two ranks can differ. What comes
back must fit: a checkpoint of another model is refused by the name of the first field or tensor that differs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from pylon_api.run import CheckpointReport, TrainerPhase
from pylon_trainer.checkpoint.checkpointer import Checkpointer, open_other
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.data import merge_states
from pylon_trainer.errors import ConfigError
from pylon_trainer.run import Run
from pylon_trainer.runtime.seeds import load_rng_state, rng_state
from pylon_trainer.status import Board

logger = logging.getLogger("pylon")


class Saver:
    """The checkpoints of one run; does nothing when the run has none."""

    def __init__(self, run: Run, board: Board) -> None:
        self._run = run
        self._board = board
        self._spec = run.config.training.checkpoint
        self._saved_step: int | None = None
        self._checkpointer: Checkpointer | None = None
        directory = run.config.checkpoint_directory
        if self._spec is not None and directory is not None and run.world.rank == 0:
            self._checkpointer = Checkpointer(Storage(directory), run.config.attempt, self._spec.keep)

    def is_due(self) -> bool:
        """Whether the interval asks for a checkpoint after this step."""
        if self._spec is None or self._spec.interval_steps == 0:
            return False
        return self._run.step % self._spec.interval_steps == 0

    def where(self) -> str:
        """For a message: where this step was saved, if it was."""
        checkpoint = self._board.status.checkpoint
        saved = checkpoint is not None and checkpoint.step == self._run.step
        return f", saved in {checkpoint.uri}" if checkpoint is not None and saved else ""

    def save(self) -> None:
        """Save this step unless it is saved already. Collective."""
        run = self._run
        if self._spec is None or self._saved_step == run.step:
            return
        phase = self._board.status.phase
        self._board.update(phase=TrainerPhase.SAVING)
        own = {"data": run.data.state_dict(), "rng": rng_state(run.world.device)}
        ranks = run.world.gather(own)
        gate = run.training_step.state_dict()
        if self._checkpointer is not None:
            report = self._checkpointer.save(run.step, _state(run, ranks, gate))
            logger.info(f"step={run.step} checkpoint={report.uri} bytes={report.size_bytes}")
        # Nobody goes on, or leaves, before the commit.
        self._board.saved(run.world.broadcast(report if run.world.rank == 0 else None))
        self._saved_step = run.step
        self._board.update(phase=phase)

    def restore(self) -> None:
        """Go on from this job's newest whole checkpoint, else from restoreFrom, else from the start. Collective."""
        run = self._run
        self._board.update(phase=TrainerPhase.RESTORING, total_steps=run.total_steps)
        if self._spec is not None:
            found = run.world.broadcast(self._find() if self._checkpointer is not None else None)
            if found is not None:
                self._apply(found["state"], found["uri"], is_own=found["is_own"])
        self._board.update(phase=TrainerPhase.TRAINING, step=run.step, tokens=run.tokens)
        self._board.begin_step(run.step)

    def _find(self) -> dict[str, Any] | None:
        assert self._checkpointer is not None
        self._checkpointer.claim()
        own = self._checkpointer.restore(self._notice)
        if own is not None:
            state, report = own
            self._board.saved(report)
            return {"state": state, "uri": report.uri, "is_own": True}
        other = self._find_other()
        return None if other is None else {"state": other[0], "uri": other[1].uri, "is_own": False}

    def _find_other(self) -> tuple[dict[str, Any], CheckpointReport] | None:
        source = self._spec.restore_from if self._spec is not None else None
        if source is None:
            return None
        checkpointer, single_step = open_other(source.uri)
        step = source.step or single_step
        found = checkpointer.restore(self._notice, step)
        if found is None:
            wanted = "" if step is None else f" of step {step}"
            raise ConfigError(f"training.checkpoint.restoreFrom: no committed checkpoint{wanted} in {source.uri}")
        return found

    def _apply(self, state: dict[str, Any], uri: str, *, is_own: bool) -> None:
        run = self._run
        _refuse_another(state["identity"], _identity(run), uri)
        _load_model(run.model, state["model"], uri)
        run.optimizer.load_state_dict(state["optimizer"])
        run.training_step.load_state_dict(state["gate"])
        if state["identity"]["data"] == _identity(run)["data"]:
            run.data.load_state_dict(state["data"])
        else:
            self._notice(f"the data differs from that of {uri}: it is read from its start")
        if len(state["rng"]) == run.world.size:
            load_rng_state(state["rng"][str(run.world.rank)], run.world.device)
        run.step, run.tokens = state["position"]["step"], state["position"]["tokens"]
        self._saved_step = run.step if is_own else None
        self._board.update(restored_from=uri)
        if run.world.rank == 0:
            logger.info(f"step={run.step} restored={uri}")

    def _notice(self, notice: str) -> None:
        self._board.add_notice(notice)
        if self._run.world.rank == 0:
            logger.warning(notice)


def _state(run: Run, ranks: list[dict[str, Any]], gate: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": _tensors(run.model),
        "optimizer": run.optimizer.state_dict(),
        "gate": gate,
        "data": merge_states([rank["data"] for rank in ranks]),
        "rng": {str(number): rank["rng"] for number, rank in enumerate(ranks)},
        "position": {"step": run.step, "tokens": run.tokens},
        "identity": _identity(run),
    }


def _identity(run: Run) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that goes on from it."""
    training = run.config.training
    data = training.data.model_copy(update={"prefetch_batches": 0}).to_wire()  # reading ahead moves no position
    return {
        "model": training.model.to_wire(),
        "tokenizer": run.data.tokenizer.fingerprint,
        "data": {**data, "seed": training.seed, "sequences": training.batch.sequences},
    }


def _refuse_another(saved: dict[str, Any], wanted: dict[str, Any], uri: str) -> None:
    for field in sorted(saved["model"].keys() | wanted["model"].keys()):
        had, asked = saved["model"].get(field), wanted["model"].get(field)
        if had != asked:
            raise ConfigError(f"training.model.{field} is {asked}, but {uri} was trained with {had}")
    if saved["tokenizer"] != wanted["tokenizer"]:
        raise ConfigError(f"training.data.tokenizer is not the one that {uri} was trained with")


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, each shared tensor once (named_parameters leaves out its other names)."""
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def _load_model(model: torch.nn.Module, saved: dict[str, Tensor], uri: str) -> None:
    tensors = _tensors(model)
    for name in sorted(saved.keys() | tensors.keys()):
        had = tuple(saved[name].shape) if name in saved else "absent"
        wanted = tuple(tensors[name].shape) if name in tensors else "absent"
        if had != wanted:
            raise ConfigError(f"{name} is {wanted} in this model, but {had} in {uri}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
