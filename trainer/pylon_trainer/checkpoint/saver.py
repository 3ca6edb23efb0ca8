"""Saves and restores a run, with all ranks taking part, while training goes on.

Every step all ranks add up a few integers (`votes`), which they do anyway to agree on stopping: what rank 0 finds due,
whether memory is free everywhere, how far the saves under way are. So all know alike what begins at the end of the step
and what is committed (`heed`), and nobody waits for anybody. A save that fails is given up by all and training goes on;
only the last one must not fail. When to save is pace.py's to say, what goes in contents.py's.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections.abc import Sequence

from torch import Tensor

from pylon_api.run import CheckpointReport, SaveReport, TrainerPhase
from pylon_api.training import CheckpointSpec
from pylon_trainer.checkpoint import contents
from pylon_trainer.checkpoint.archive import Archive, Place, open_other
from pylon_trainer.checkpoint.destination import Destination, Outcome, Save
from pylon_trainer.checkpoint.layout import Layout, assign, tensor_bytes
from pylon_trainer.checkpoint.manifest import PART_BYTES, placeholders
from pylon_trainer.checkpoint.pace import Pace
from pylon_trainer.checkpoint.policy import Reach, next_move
from pylon_trainer.checkpoint.restore import Restored, Shelf, restore
from pylon_trainer.checkpoint.slab import Slabs, default_budget_bytes
from pylon_trainer.checkpoint.staging import Staging
from pylon_trainer.checkpoint.state import describe, place, separate
from pylon_trainer.checkpoint.storage import Storage
from pylon_trainer.checkpoint.writer_process import WriterHandle, start_writer
from pylon_trainer.errors import ConfigError, PeerLost, Stopped, StorageError
from pylon_trainer.run import Run
from pylon_trainer.runtime.signals import StopFlag
from pylon_trainer.status import Board

EXIT_MARGIN_SECONDS = 8
"""What is kept of the pod's grace to leave once the last checkpoint is committed, or given up."""

MAX_UNDER_WAY = 2
"""Saves on their way to one place: a third waits, memory or not."""

POLL_SECONDS = 0.02

logger = logging.getLogger("pylon")
