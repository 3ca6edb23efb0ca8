"""Patch: puts a gated forward in the place of a model's own, and takes it out again.

The patch is two attributes of the model instance. It adds no module and no parameter, so checkpoints keep their keys.
A copy of a gated model, by `copy.deepcopy` or pickle, is gated as well and counts its own steps.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import TrainerCallback

from pylon_api.manifest import describe
from pylon_api.training import GatingEngine, GatingGranularity, GatingSpec, GatingStrategy
from pylon_trainer.errors import ConfigError
from pylon_trainer.huggingface.gated import GatedModel

_PLACE = "_pylon"
"""Attribute of a model under which its patch is found."""


def enable(model_or_trainer: Any, *, seed: int = 0, **options: Any) -> GatedModel:
    """Gate the training steps of a model, or of a trainer's model. Returns the gate; its `report()` tells what it does.

    options: fields of `spec.training.gating` in snake_case (docs/api.md), such as target_mass=0.9 or
    ratio_control="Fixed", token_ratio=0.25. Unless said otherwise the strategy is GradientNorm and the engine
    SinglePass. seed: of the draws.

    Give a TRL trainer itself, not its model: it puts a forward of its own in place of the model's.

    Raises ConfigError, which names the field, the value and the fix, before anything is changed.
    """
    trainer = model_or_trainer if hasattr(model_or_trainer, "add_callback") else None
    model = _inner(model_or_trainer)
    if hasattr(model, _PLACE):
        raise ConfigError(f"{type(model).__name__}: gating is enabled already; call disable() first")
    if trainer is not None:
        _check_trainer(trainer)
    previous = vars(model).get("forward")
    # TRL's trainers replace the forward when they are built, and read its output as GatedOutput has it.
    if previous is not None and not any(home.startswith("trl.") for home in _homes(previous)):
        raise ConfigError(
            f"{type(model).__name__}.forward: something has replaced it on this model, and the gate would leave that "
            "out; call enable() before accelerate prepares the model, or take the other patch out"
        )
    gated = GatedModel(model, _spec(options), seed)
    model.forward = _GatedForward(gated, model.forward, previous)
    setattr(model, _PLACE, model.forward)
    _count_steps()
    if trainer is not None:
        # First, so that those who report what is logged see its figures.
        trainer.callback_handler.callbacks.insert(0, _Follow(gated))
    return gated


def disable(model_or_trainer: Any) -> None:
    """Put the model's own forward back. Does nothing where gating is not enabled."""
    model = _inner(model_or_trainer)
    if not hasattr(model, _PLACE):
        return
    patch: _GatedForward = getattr(model, _PLACE)
    patch.gated.is_enabled = False  # for whoever has wrapped the forward since
    delattr(model, _PLACE)
    if vars(model).get("forward") is patch:
        del model.forward
        if patch.previous is not None:
            model.forward = patch.previous
    if hasattr(model_or_trainer, "add_callback"):
        model_or_trainer.remove_callback(_Follow)


class _GatedForward:
    """The forward on a model instance. A class, so that a copy of the model takes a gate of its own along, and not a
    function that still runs the original."""

    def __init__(self, gated: GatedModel, usual: Callable[..., Any], previous: Callable[..., Any] | None) -> None:
        """previous: what was on the instance before, if anything."""
        functools.update_wrapper(self, usual)  # trainers read the signature
        self.gated, self.previous = gated, previous
        _PATCHES.add(self)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self.gated.forward(*positional, **named)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _PATCHES.add(self)


_PATCHES: weakref.WeakSet[_GatedForward] = weakref.WeakSet()
"""Whose steps are counted, for as long as their models live."""


@functools.cache
def _count_steps() -> None:
    """From now on; once in a process."""
    register_optimizer_step_post_hook(_count)


class _Follow(TrainerCallback):
    """Tells the gate which step a resumed run is at, and adds the gate's figures to what the trainer logs."""

    def __init__(self, gated: GatedModel) -> None:
        self._gated = gated

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._gated.step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:  # noqa: ARG002
        if logs is not None and "loss" in logs:
            logs |= self._gated.figures()
            state.log_history[-1] |= self._gated.figures()


def _inner(model_or_trainer: Any) -> Any:
    """The causal language model inside a trainer and inside PEFT's adapters."""
    model: Any = model_or_trainer.model if hasattr(model_or_trainer, "add_callback") else model_or_trainer
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def _spec(options: Mapping[str, Any]) -> GatingSpec:
    defaults = {"strategy": GatingStrategy.GRADIENT_NORM, "engine": GatingEngine.SINGLE_PASS}
    try:
        spec = GatingSpec.model_validate({**defaults, **options})
    except ValidationError as error:
        raise ConfigError("; ".join(describe(error))) from error
    if spec.strategy is GatingStrategy.OFF:
        raise ConfigError("strategy: Disabled gates nothing; call disable() instead")
    if spec.granularity is GatingGranularity.SEQUENCE:
        raise ConfigError("granularity: Sequence is what pylon_trainer.cggr.CGGRModel does; use Token here")
    return spec


def _homes(function: object) -> tuple[str, str]:
    """Modules that it says it is from, which may be that of what it wraps, and that its code is from."""
    plain = getattr(function, "__func__", function)
    return str(getattr(plain, "__module__", "")), str(getattr(plain, "__globals__", {}).get("__name__", ""))


def _check_trainer(trainer: Any) -> None:
    for wrapper in ("fsdp", "deepspeed"):
        if getattr(trainer, f"is_{wrapper}_enabled", False):
            raise ConfigError(f"{wrapper}: sharded parameters cannot be walked block by block; use DDP")
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        raise ConfigError(
            "compute_loss_func, label_smoothing_factor: a loss outside the model needs all logits; leave both out"
        )
    if getattr(trainer.args, "neftune_noise_alpha", None) is not None:
        raise ConfigError(
            f"neftune_noise_alpha: {trainer.args.neftune_noise_alpha} cannot be repeated on chosen rows; leave it out"
        )
    if trainer.args.n_gpu > 1:
        raise ConfigError(
            f"n_gpu: {trainer.args.n_gpu} in one process run under DataParallel, whose copies have no gate; start one "
            "process per GPU with torchrun, or make one visible by CUDA_VISIBLE_DEVICES"
        )
    liger = trainer.args.liger_kernel_config or {}
    if trainer.args.use_liger_kernel and liger.get("fused_linear_cross_entropy", True):
        raise ConfigError(
            "liger_kernel_config: fused_linear_cross_entropy replaces the forward that the gate stands in; "
            'set {"fused_linear_cross_entropy": False}, and the other kernels stay'
        )


def _count(optimizer: Optimizer, *_: Any) -> None:
    """After an optimizer's step: one step more for the gates of its models."""
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for patch in _PATCHES:
        if patch.gated.is_trained_by(stepped):
            patch.gated.count()
