"""Where a run goes on: from this job's newest whole checkpoint, else from restoreFrom, else from the start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from pylon_api.training import RestoreSpec
from pylon_trainer.checkpoint import contents
from pylon_trainer.checkpoint.archive import Place, open_other
from pylon_trainer.checkpoint.manifest import Manifest
from pylon_trainer.checkpoint.restore import Restored, restore
from pylon_trainer.checkpoint.shelf import Shelf
from pylon_trainer.errors import ConfigError
from pylon_trainer.run import Run

logger = logging.getLogger("pylon")


def resume(run: Run, shelves: Sequence[Shelf], notice: Callable[[str], None]) -> tuple[Restored, bool] | None:
    """Read the checkpoint that this run goes on from, and go on there; whether it is this job's own. Collective.

    shelves: of this job, the nearest first. ConfigError when restoreFrom names none, or one that does not fit.
    """
    spec = run.config.training.checkpoint
    restored, is_own = _read(run, shelves, notice, partial(contents.all_of, run)), True
    if restored is None and spec is not None and spec.restore_from is not None:
        restored, is_own = _read_other(run, spec.restore_from, notice), False
    if restored is None:
        return None
    if not is_own and contents.is_base(run, restored.manifest):
        contents.begin(run)
        notice(f"begins at step 0 with the weights of {restored.report.uri} as its base")
        return restored, is_own
    is_same_size = restored.manifest.ranks == run.world.size
    if not contents.go_on(run, restored.replicated, restored.own, is_same_size):
        notice(f"the data differs from that of {restored.report.uri}: it is read from its start")
    if not is_same_size:
        ranks = restored.manifest.ranks
        logger.info(f"{restored.report.uri} is of {ranks} ranks, this run of {run.world.size}: generators begin anew")
    return restored, is_own


def _read(
    run: Run,
    shelves: Sequence[Shelf],
    notice: Callable[[str], None],
    targets: Callable[[Manifest, str], Mapping[str, Tensor]],
    wanted: Callable[[Place], bool] = lambda _: True,
) -> Restored | None:
    return restore(
        run.world,
        shelves,
        run.config.processes_per_node,
        targets=targets,
        passed_over=notice,
        wanted=wanted,
    )


def _read_other(run: Run, source: RestoreSpec, notice: Callable[[str], None]) -> Restored:
    archive, name = open_other(source.uri)
    shelf = Shelf(archive, is_shared=True, lists=run.world.rank == 0, is_own=False)

    def wanted(place: Place) -> bool:
        return source.step in (None, place.step) and name in (None, place.name)

    def targets(manifest: Manifest, uri: str) -> Mapping[str, Tensor]:
        fits = contents.base_of if contents.is_base(run, manifest) else contents.all_of
        return fits(run, manifest, uri)

    found = _read(run, [shelf], notice, targets, wanted)
    if found is None:
        which = "" if source.step is None else f" of step {source.step}"
        raise ConfigError(f"training.checkpoint.restoreFrom: no committed checkpoint{which} in {source.uri}")
    return found
