"""Training data: batches of this rank, held-out batches, and the position that a checkpoint keeps.

Reading happens ahead, in one background thread; what a checkpoint sees is the position of the batches that were handed
out, never of those prepared ahead.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch

from pylon_api.training import DataSpec, Packing
from pylon_trainer.data.documents import cut
from pylon_trainer.data.lanes import GOLDEN, Corpus, Lane, NoText, Position, Sample, hold_out
from pylon_trainer.data.sources import list_files
from pylon_trainer.data.tokenizer import Tokenizer, load_tokenizer
from pylon_trainer.errors import ConfigError, DataError
from pylon_trainer.step import Batch

HELD_OUT_SEED = 0
"""Order of held-out documents: mixed, and the same whatever the seed of training."""

logger = logging.getLogger("pylon")


def open_data(spec: DataSpec, *, seed: int, rank: int, world_size: int, global_sequences: int) -> TrainingData:
    """The data of one rank. Lists files and reads the tokenizer, but no text yet.

    global_sequences: sequences of a step over all ranks, divisible by world_size (configuration.py sees to that).
    Raises ConfigError or DataError.
    """
    tokenizer = load_tokenizer(spec.tokenizer)
    pieces = cut(list_files(spec.train, "training.data.train"), spec.format)
    held = hold_out(pieces, 0 if spec.held_out else spec.held_out_fraction)
    train = Corpus(pieces, spec.text_field, lambda place: not held(place), seed if spec.shuffle else None)
    if not len(train):
        raise DataError(
            f"training.data.heldOutFraction: {spec.held_out_fraction} of {len(pieces)} pieces of files "
            "leaves nothing to train on"
        )
    if spec.held_out:
        others = cut(list_files(spec.held_out, "training.data.heldOut"), spec.format)
        held_out = Corpus(others, spec.text_field, lambda _: True, HELD_OUT_SEED)
    else:
        held_out = Corpus(pieces if spec.held_out_fraction else [], spec.text_field, held, HELD_OUT_SEED)
    share = global_sequences // world_size
    lanes = range(rank * share, (rank + 1) * share)
    return TrainingData(spec, tokenizer, train, held_out, lanes, global_sequences)


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The state_dict of every rank as one, which any number of ranks can load."""
    lanes = {number: position for state in states for number, position in state["lanes"].items()}
    return {"sequences": states[0]["sequences"], "lanes": lanes}


class TrainingData:
    """One rank's view of the data."""

    def __init__(
        self,
        spec: DataSpec,
        tokenizer: Tokenizer,
        train: Corpus,
        held_out: Corpus,
        lanes: range,
        global_sequences: int,
    ) -> None:
        self.tokenizer = tokenizer
        self._spec = spec
        self._train = train
        self._held_out = held_out
        self._numbers = lanes
        self._global_sequences = global_sequences
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data")
        self._ahead: deque[Future[tuple[Batch, list[Position]]]] = deque()
        self._begin([Position(number, 0, -1) for number in lanes])

    @property
    def vocab_size(self) -> int:
        """Ids of tokens are below this."""
        return self.tokenizer.vocab_size

    def next_batch(self) -> Batch:
        """This rank's share of the next step, on the CPU. Raises what reading raised."""
        while len(self._ahead) <= self._spec.prefetch_batches:
            self._ahead.append(self._reader.submit(self._read))
        batch, self._positions = self._ahead.popleft().result()
        return batch

    def held_out(self, sequences: int) -> list[Batch]:
        """This rank's share of the fixed set of held-out sequences, in batches no larger than those of training.

        Empty where nothing is held out; a fraction that comes to no document of a small corpus is said to. The same for
        any number of ranks, taken together.
        """
        if not len(self._held_out):
            return []
        everyone = self._global_sequences // len(self._numbers)
        rank = self._numbers.start // len(self._numbers)
        mine = range(rank * sequences // everyone, (rank + 1) * sequences // everyone)
        try:
            samples = [self._held_out_sample(sequences, number) for number in mine]
        except NoText:
            if self._spec.held_out:
                raise
            if rank == 0:
                fraction = self._spec.held_out_fraction
                logger.warning(f"training.data.heldOutFraction {fraction} comes to no document: no held-out loss")
            return []
        size = len(self._numbers)
        return [self._batch(samples[start : start + size]) for start in range(0, len(samples), size)]

    def _held_out_sample(self, sequences: int, number: int) -> Sample:
        lane = Lane(self._held_out, self.tokenizer, sequences, number, begin=number * GOLDEN % 1)
        return lane.next_sample(self._spec.sequence_length)

    def state_dict(self) -> dict[str, Any]:
        """Where this rank's lanes are, counting only batches that were handed out. Plain JSON."""
        places = zip(self._numbers, self._positions, strict=True)
        return {
            "sequences": self._global_sequences,
            "lanes": {str(number): list(position) for number, position in places},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state (merged, or this rank's own) was taken. Raises ConfigError when the batch has changed."""
        missing = [number for number in self._numbers if str(number) not in state["lanes"]]
        if state["sequences"] != self._global_sequences or missing:
            raise ConfigError(
                f"training.batch.sequences: {self._global_sequences}, but the checkpoint's data position is for "
                f"{state['sequences']} sequences a step; keep the batch, or start from the weights alone"
            )
        self._forget()
        self._begin([Position(*state["lanes"][str(number)]) for number in self._numbers])

    def close(self) -> None:
        """Stop reading ahead. Waits for the read in progress."""
        self._forget()
        self._reader.shutdown(cancel_futures=True)

    def _begin(self, positions: list[Position]) -> None:
        self._positions = positions
        self._lanes = [
            Lane(self._train, self.tokenizer, self._global_sequences, number, position)
            for number, position in zip(self._numbers, positions, strict=True)
        ]

    def _forget(self) -> None:
        """Drop what was read ahead, so that nothing reads any more when this returns."""
        for future in self._ahead:
            future.cancel()
        wait(self._ahead)
        self._ahead.clear()

    def _read(self) -> tuple[Batch, list[Position]]:
        samples = [lane.next_sample(self._spec.sequence_length) for lane in self._lanes]
        return self._batch(samples), [lane.position for lane in self._lanes]

    def _batch(self, samples: list[Sample]) -> Batch:
        tokens_BT, labels_BT, documents_BT = (torch.from_numpy(np.stack(parts)) for parts in zip(*samples, strict=True))
        isolated = self._spec.packing is Packing.ISOLATED
        return Batch(tokens_BT, labels_BT, documents_BT if isolated else None)
