"""Who may write what: advice reaches the ports alone, the controller nothing of the model's, a step nothing of its."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from advice import open_ports
from engines import ADAPTED, RESONATE, batch_of, model_of
from flops import flops
from ranks import run_ranks
from torch import Tensor

from pylon_api.run import RunConfig
from pylon_api.training import TrainingSpec
from pylon_trainer.control.decisions import HELD_TURNS
from pylon_trainer.data import open_data
from pylon_trainer.gating import build_step
from pylon_trainer.models.ports import Port, PortKind
from pylon_trainer.run import Run, build
from pylon_trainer.runtime.distributed import World
from pylon_trainer.step import TrainingStep

MakeConfig = Callable[..., dict[str, Any]]
STEP = 3e-4
"""Of a finite difference: so small that nobody chooses other atoms of the codebook."""


def step_of(model: Any) -> TrainingStep:
    recipe = {"data": {"train": ["unused"]}, "schedule": {"steps": 1}, "precision": "Float32"}
    return build_step(model, TrainingSpec.model_validate(recipe), torch.device("cpu"))


def tensors_of(run: Run) -> dict[str, Tensor]:
    """Copies of all that an optimizer step writes."""
    gradients = {f"gradient of {name}": p.grad for name, p in run.parameters.items() if p.grad is not None}
    return {name: x.detach().clone() for name, x in (run.parameters | run.optimizer.tensors | gradients).items()}


def differing(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, x in before.items() if not torch.equal(bits(x), bits(after[name]))}


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.int32)  # in which NaN equals itself


def test_a_model_with_fresh_ports_is_the_one_without_whatever_it_is_advised() -> None:
    without = {**RESONATE, "resonate": {**RESONATE["resonate"], "control": None}}
    plain, advised = model_of(**without), model_of(**RESONATE)
    for port in (module for module in advised.modules() if isinstance(module, Port)):
        torch.nn.init.zeros_(port.write)
    batch = batch_of()
    assert torch.equal(plain(batch.tokens_BT), advised(batch.tokens_BT))
    same = [name for name, _ in plain.named_parameters()]
    assert [name for name, _ in advised.named_parameters() if ".port_" not in name] == same


def test_every_kind_of_port_answers_to_its_row_of_the_advice_alone() -> None:
    model, batch = model_of(**ADAPTED), batch_of()
    advice_PR = model.get_buffer("advice_PR")
    for kind in PortKind:
        before = model(batch.tokens_BT)
        advice_PR[kind] += 0.1
        assert not torch.equal(model(batch.tokens_BT), before), kind
        for port in (module for module in model.modules() if isinstance(module, Port) and module.kind == kind):
            torch.nn.init.zeros_(port.write)
        closed = model(batch.tokens_BT)
        advice_PR[kind] -= 0.2
        assert torch.equal(model(batch.tokens_BT), closed), kind


@pytest.mark.parametrize("recomputes_blocks", [False, True])
def test_what_is_sensed_is_the_gradient_of_the_loss_at_the_advice(recomputes_blocks: bool) -> None:
    model, batch = model_of(**ADAPTED), batch_of(isolated=True)
    model.recomputes_blocks = recomputes_blocks
    step, advice_PR = step_of(model), model.get_buffer("advice_PR")
    loss, gradient_PR = step.sense(batch, advice_PR)
    result = step.evaluate(batch)
    torch.testing.assert_close(loss, result.loss_sum / result.tokens)
    for kind in PortKind:
        direction_R = gradient_PR[kind] / gradient_PR[kind].norm()
        losses = []
        for sign in (1, -1):
            advice_PR[kind] += sign * STEP * direction_R
            losses.append(step.evaluate(batch).loss_sum / result.tokens)
            advice_PR[kind] -= sign * STEP * direction_R
        assert ((losses[0] - losses[1]) / (2 * STEP)).item() == pytest.approx(gradient_PR[kind].norm().item(), rel=0.05)


def test_no_graph_leads_from_the_loss_to_the_advice_but_through_ports() -> None:
    model, batch = model_of(**ADAPTED), batch_of()
    advice_PR = model.get_buffer("advice_PR").requires_grad_()

    def advice_gradient() -> Tensor | None:
        loss = model(batch.tokens_BT).square().sum()
        (gradient,) = torch.autograd.grad(loss, [advice_PR], allow_unused=True)
        return gradient

    assert all(row.norm() > 0 for row in advice_gradient())
    for port in (module for module in model.modules() if isinstance(module, Port)):
        port.register_forward_hook(lambda *arguments: arguments[-1].detach())
    cut = advice_gradient()
    assert cut is None or not cut.any()


def test_sensing_leaves_gradients_and_what_needs_them_alone() -> None:
    model, batch = model_of(**ADAPTED), batch_of()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    needs = {name: p.requires_grad for name, p in model.named_parameters()}
    step, advice_PR = step_of(model), model.get_buffer("advice_PR")
    step.sense(batch, advice_PR)
    assert all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == needs
    assert not advice_PR.requires_grad
    assert not differing(buffers, dict(model.named_buffers()))


def test_a_turn_costs_as_much_as_a_step_of_one_micro_batch_and_a_tenth() -> None:
    model, batch = model_of(**RESONATE), batch_of()
    step = step_of(model)
    whole = flops(lambda: step.forward_backward(batch, global_tokens=39, step=0))
    turn = flops(lambda: (step.sense(batch, model.get_buffer("advice_PR")), step.evaluate(batch)))
    check = flops(lambda: step.evaluate(batch))
    assert (turn + check / 4) / whole < 1.1


def test_neither_learner_writes_to_what_is_the_others(tmp_path: Path, make_config: MakeConfig) -> None:
    own = {"headWidth": 8, "stateSize": 8, "attentionEvery": 0, "control": {"outerEverySteps": 8, "vectorSize": 16}}
    config = RunConfig.model_validate(make_config(model={"architecture": "Resonate", "resonate": own}))

    def take_part(world: World) -> None:
        spec = config.training
        data = open_data(spec.data, seed=0, rank=world.rank, world_size=2, global_sequences=spec.batch.sequences)
        run = build(config, world, data)
        control = run.control
        assert control is not None
        open_ports(run.model)
        batch = data.next_batch()
        tokens = batch.labels_BT.numel() * world.size

        # A turn in which no optimizer runs: the controller learns and speaks, and the model is what it was.
        results = [run.training_step.forward_backward(batch, global_tokens=tokens, step=0)]
        before, controls = tensors_of(run), {name: x.clone() for name, x in control.tensors.items()}
        sent_bytes = world.traffic.bytes
        with control.around_update(8, batch, results, learning_rate=0.1):
            pass
        figures = control.tensors["controller's usual_S"].numel()
        assert world.traffic.bytes - sent_bytes == control.turn_bytes == 4 * (5 + 16 + figures)  # between two ranks
        assert not differing(before, tensors_of(run))
        assert differing(controls, control.tensors) >= {"advice", "controller's say.weight", "controller's usual_S"}

        # A step between turns: the model learns, and the controller is what it was.
        controls = {name: x.clone() for name, x in control.tensors.items()}
        run.step = 9
        run.advance(batch, tokens)
        assert not differing(controls, control.tensors)
        assert set(run.parameters) <= differing(before, before | run.parameters)

        # Held, it neither learns nor speaks.
        control.hold(run.step)
        run.step = 16
        run.advance(batch, tokens)
        assert not differing(controls, control.tensors)
        run.step = 8 * (2 + HELD_TURNS)
        run.advance(batch, tokens)
        assert "advice" in differing(controls, control.tensors)

        # Gradients that are not finite teach it nothing.
        run.step += 7
        with torch.no_grad():
            run.model.norm.weight[0] = torch.nan
        run.advance(batch, tokens)
        assert all(x.isfinite().all() for name, x in control.tensors.items() if "usual" not in name)
        data.close()

    run_ranks(take_part, tmp_path, 2)
