"""What of a run goes into a checkpoint, and how a run goes on from one.

What is equal on all ranks is one tree, what a rank has for itself another. A checkpoint must fit: one of another model
or tokenizer is refused by the name of the first field or tensor that differs, before anything is read into the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pylon_api.training import AdaptationBase, OptimizerName, ResonateSpec
from pylon_trainer.checkpoint.manifest import Manifest, placeholders
from pylon_trainer.checkpoint.state import separate
from pylon_trainer.consensus import divide_up
from pylon_trainer.data import merge_states
from pylon_trainer.errors import ConfigError
from pylon_trainer.run import Run
from pylon_trainer.runtime.seeds import load_rng_state, reseed, rng_state

LOCAL = "local"
"""Key of the weights and optimizer state that a rank has for itself, where ranks take local steps."""


def replicated(run: Run) -> dict[str, Any]:
    """What every rank has alike. Its tensors are the run's own but for those of the gate. Collective.

    With local steps the weights are the shared ones, and a tensor of the optimizer is that of the rank which writes it:
    a run of another size, or without local steps, goes on from them.
    """
    return {
        **_live(run),
        "gate": run.training_step.state_dict(),
        "control": run.control.state_dict() if run.control else None,
        "position": {"step": run.step, "tokens": run.tokens},
        "identity": _identity(run),
    }


def own(run: Run) -> dict[str, Any]:
    """What this rank alone has."""
    return {
        "data": run.data.state_dict(),
        "rng": rng_state(run.world.device),
        "exchange": run.exchange.state_dict(),
        "upkeep": run.upkeep.state_dict(),
        "base": run.thaw.state_dict(),
        **({LOCAL: _local(run)} if run.exchange.replicas else {}),
    }


def all_of(run: Run, manifest: Manifest, uri: str) -> dict[str, Tensor]:
    """The tensors of the run that a checkpoint is read into when the run goes on from it, by their keys.

    ConfigError naming the first field or tensor in which it is not one of this model and tokenizer.
    """
    saved, wanted = manifest.replicated["identity"], _identity(run)
    _refuse_another(saved, wanted, uri)
    if saved.get("generated") != wanted.get("generated"):
        raise ConfigError(
            f"the weights that this machine generates from model.resonate.adaptation.baseSeed are not those that {uri} "
            f"was trained with; run the image that wrote it"
        )
    had, asked = saved.get("optimizer", OptimizerName.ADAMW), wanted["optimizer"]
    if had != asked:
        raise ConfigError(f"training.optimizer.name is {asked}, but {uri} was trained with {had}")
    tensors = separate(_live(run))[1]
    live = {part: manifest.replicated[part] for part in ("model", "optimizer")}
    shapes = {place["key"]: tuple(place["shape"]) for place in placeholders(live)}
    for key in sorted(shapes.keys() | tensors.keys()):
        _refuse_shape(key, tensors, shapes, uri)
    return tensors


def is_base(run: Run, manifest: Manifest) -> bool:
    """Whether a checkpoint of another run is of a plain model whose weights this run adapts, instead of one to go on
    from."""
    adaptation = _adaptation(run.config.training.model.to_wire())
    is_adapted = _adaptation(manifest.replicated["identity"]["model"]) is not None
    return adaptation is not None and adaptation["base"] == AdaptationBase.DENSE and not is_adapted


def base_of(run: Run, manifest: Manifest, uri: str) -> dict[str, Tensor]:
    """The tensors of the run that such a checkpoint is read into: all weights of the plain model, and no state of its
    optimizer. ConfigError as all_of has it."""
    _refuse_another(_plain(manifest.replicated["identity"]), _plain(_identity(run)), uri)
    tensors = separate({"model": _live(run)["model"]})[1]
    shapes = {p["key"]: tuple(p["shape"]) for p in placeholders({"model": manifest.replicated["model"]})}
    for key in sorted(shapes):
        _refuse_shape(key, tensors, shapes, uri)
    return {key: tensors[key] for key in shapes}


def begin(run: Run) -> None:
    """Put a run into whose tensors such a checkpoint has been read at its step 0."""
    run.exchange.load_state_dict({})
    run.optimizer.begin()
    run.thaw.begin()


def _adaptation(model: Mapping[str, Any]) -> dict[str, Any] | None:
    adaptation: dict[str, Any] | None = model.get("resonate", {}).get("adaptation")
    return adaptation


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity without what adaptation adds to a model."""
    own = identity["model"].get("resonate") or ResonateSpec().to_wire()
    plain = {field: value for field, value in own.items() if field != "adaptation"}
    return {**identity, "model": {**identity["model"], "resonate": plain}}


def _refuse_another(saved: Mapping[str, Any], wanted: Mapping[str, Any], uri: str) -> None:
    for field in sorted(saved["model"].keys() | wanted["model"].keys()):
        had, asked = saved["model"].get(field), wanted["model"].get(field)
        if had != asked:
            raise ConfigError(f"training.model.{field} is {asked}, but {uri} was trained with {had}")
    if saved["tokenizer"] != wanted["tokenizer"]:
        raise ConfigError(f"training.data.tokenizer is not the one that {uri} was trained with")


def _refuse_shape(key: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], uri: str) -> None:
    kept = shapes.get(key, "absent")
    asked = tuple(tensors[key].shape) if key in tensors else "absent"
    if kept != asked:
        raise ConfigError(f"{key} is {asked} in this run, but {kept} in {uri}")


def go_on(run: Run, state: Mapping[str, Any], owns: Sequence[Mapping[str, Any]], is_same_size: bool) -> bool:
    """Put a run whose live tensors hold a checkpoint's values where the rest of it says.

    owns: what each rank of that run had for itself; with as many ranks now, the tensors of this rank's alone are looked
    at. With another number generators begin anew, alike every time, and what the exchange kept is divided up. Returns
    whether data goes on: it is another's, and read from its start, when what is read has changed.
    """
    run.step, run.tokens = state["position"]["step"], state["position"]["tokens"]
    run.training_step.load_state_dict(state["gate"])
    if run.control:
        run.control.load_state_dict(state["control"])
    kept = [{part: rank.get(part, {}) for part in ("exchange", "upkeep", "base")} for rank in owns]
    if is_same_size:
        load_rng_state(dict(owns[run.world.rank]["rng"]), run.world.device)
        mine = kept[run.world.rank]
    else:
        reseed(run.config.training.seed, run.world.rank, run.step)
        mine = divide_up(kept, run.world.size)
    run.exchange.load_state_dict(mine["exchange"])
    if is_same_size and run.exchange.replicas and LOCAL in owns[run.world.rank]:
        _write(_local(run), owns[run.world.rank][LOCAL])
    run.upkeep.load_state_dict(mine["upkeep"])
    run.thaw.load_state_dict(mine["base"])
    is_same_data = bool(state["identity"]["data"] == _identity(run)["data"])
    if is_same_data:
        run.data.load_state_dict(merge_states([dict(rank["data"]) for rank in owns]))
    return is_same_data


def _live(run: Run) -> dict[str, Any]:
    replicas = run.exchange.replicas
    model = {name: replicas.get(name, tensor) for name, tensor in _tensors(run.model).items()}
    return {"model": model, "optimizer": {**run.optimizer.state_dict(), "base": run.thaw.optimizer_state()}}


def _local(run: Run) -> dict[str, Any]:
    """Weights and optimizer state of this rank, without what ranks have alike: a base, buffers."""
    model = {name: tensor for name, tensor in _tensors(run.model).items() if name in run.parameters}
    return {"model": model, "optimizer": run.optimizer.state_dict()}


@torch.no_grad()
def _write(targets: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Values of tensors into those of the same names; what else there is stays."""
    read = separate(values)[1]
    for key, tensor in separate(targets)[1].items():
        tensor.copy_(read[key])


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, each shared tensor once (named_parameters leaves out its other names)."""
    names = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


def _identity(run: Run) -> dict[str, Any]:
    """What must agree between a checkpoint and the run that goes on from it."""
    training = run.config.training
    data = training.data.model_copy(update={"prefetch_batches": 0}).to_wire()  # reading ahead moves no position
    generated = run.model.generated
    return {
        "model": training.model.to_wire(),
        "tokenizer": run.data.tokenizer.fingerprint,
        "optimizer": training.optimizer.name.value,
        "data": {**data, "seed": training.seed, "sequences": training.batch.sequences},
        **({} if generated is None else {"generated": generated}),
    }
