"""One training process: `python -m pylon_trainer.worker`, started by the launcher with torchrun's variables.

Sets the scene for train.train and sees to it that however the process ends, its launcher can say why in one line.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from typing import NoReturn

import torch

from pylon_api.names import ExitCode
from pylon_api.run import RunConfig, TrainerStatus
from pylon_trainer import report
from pylon_trainer.configuration import read_config
from pylon_trainer.errors import NonFiniteLoss, SharedConfigError, Stopped, TrainerError
from pylon_trainer.runtime.distributed import join_world, leave_world
from pylon_trainer.runtime.environment import Environment
from pylon_trainer.runtime.peers import Peers
from pylon_trainer.runtime.signals import StopFlag, die_with_parent
from pylon_trainer.status import Board, serve
from pylon_trainer.train import train


class Ending:
    """Ends the process once, with a report, whichever thread comes first."""

    def __init__(self, environment: Environment, rank: int, board: Board) -> None:
        self._path = environment.worker_report(rank)
        self._rank = rank
        self._board = board
        self._first = threading.Lock()

    def leave(self, exit_code: int, message: str = "") -> NoReturn:
        """Write the report and exit at once, without waiting for threads or connections that may never end."""
        self._first.acquire()
        end = report.describe(exit_code, message, rank=self._rank)
        if self._rank == 0:
            end = end.model_copy(update={"final": self._board.status})
        try:
            report.write(end, self._path)
        except OSError as error:  # a full disk, say; the exit code must get through all the same
            print(f"cannot write {self._path}: {error.strerror}; {end.reason}: {end.message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


def main() -> NoReturn:
    """Train, and leave with the exit code that says how it went."""
    die_with_parent()
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
    environment = Environment.read()
    config = read_config(environment.config_path)
    rank = int(os.environ["RANK"])
    board = Board(TrainerStatus(uid=config.uid, attempt=config.attempt))
    ending = Ending(environment, rank, board)
    stop = StopFlag(at_once=lambda why: ending.leave(ExitCode.STOPPED, why))
    try:
        _run(config, environment, rank, board, stop, ending)
    except TrainerError as error:
        ending.leave(error.exit_code, str(error))
    except (torch.OutOfMemoryError, MemoryError) as error:
        advice = "lower training.batch.microSequences or training.data.sequenceLength"
        ending.leave(ExitCode.OUT_OF_MEMORY, f"out of memory: {advice} ({error})")
    except Exception as error:
        traceback.print_exc()
        ending.leave(ExitCode.INTERNAL, f"{type(error).__name__}: {error}")
    ending.leave(ExitCode.SUCCEEDED)


def _run(config: RunConfig, environment: Environment, rank: int, board: Board, stop: StopFlag, ending: Ending) -> None:
    if rank == 0:
        serve(
            board,
            environment.status_host,
            environment.status_port,
            token_file=environment.token_file,
            saves_checkpoints=config.training.checkpoint is not None,
        )
    world = join_world(config.gpus_per_node, environment.collective_timeout_seconds)
    peers = Peers(world, lost=lambda message: ending.leave(ExitCode.PEER_LOST, message))
    try:
        train(config, world, board, stop, environment.grace_seconds)
    except (Stopped, NonFiniteLoss, SharedConfigError):  # all ranks leave together
        peers.say_farewell()
        raise
    peers.say_farewell()
    leave_world()


if __name__ == "__main__":
    main()
