"""The limit on updates, and the controller as a function of what ranks tell it."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from pylon_trainer.control.controller import Controller
from pylon_trainer.control.limit import Limit


def test_a_block_goes_no_farther_than_the_limit_and_the_others_go_where_they_went() -> None:
    torch.manual_seed(0)
    names = ["embedding.weight", "blocks.0.a", "blocks.0.b", "blocks.1.a", "norm.weight"]
    parameters = {name: Parameter(torch.randn(5, 3)) for name in names}
    limit = Limit(parameters)
    before = limit.remember()
    asked = {name: torch.randn(5, 3) * (10 if name == "blocks.0.b" else 0.01) for name in names}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter += asked[name]
    went = {name: parameter.clone() for name, parameter in parameters.items()}
    moved = limit.apply(before, torch.tensor(0.25))

    assert limit.groups == 3
    assert moved.ratio_G[0] > 0.25 > max(moved.ratio_G[1:])
    for name in ("embedding.weight", "blocks.1.a", "norm.weight"):
        assert torch.equal(parameters[name], went[name])
    old = torch.cat([before[1], before[2]])
    steps = torch.cat([parameters["blocks.0.a"] - before[1], parameters["blocks.0.b"] - before[2]])
    assert torch.isclose(steps.norm(), 0.25 * old.norm(), rtol=1e-5)
    full = torch.cat([asked["blocks.0.a"], asked["blocks.0.b"]])
    assert torch.nn.functional.cosine_similarity(steps.flatten(), full.flatten(), dim=0) > 0.999
    torch.testing.assert_close(torch.cat(moved.steps[1:3]), steps, rtol=1e-4, atol=1e-6)


def test_a_codebook_that_all_blocks_share_lends_its_size_to_none() -> None:
    codebook = "blocks.0.adaptation.hyper.codebook.atoms"
    parameters = {"blocks.0.a": Parameter(torch.ones(3)), codebook: Parameter(torch.full((9, 9), 100.0))}
    limit = Limit(parameters)
    before = limit.remember()
    with torch.no_grad():
        parameters["blocks.0.a"] += 1
    moved = limit.apply(before, torch.tensor(0.1))
    torch.testing.assert_close(moved.ratio_G, torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(parameters["blocks.0.a"].detach(), torch.full((3,), 1.1))


def test_a_step_that_was_left_out_stays_left_out() -> None:
    parameters = {"blocks.0.a": Parameter(torch.ones(3)), "norm.weight": Parameter(torch.zeros(3))}
    limit = Limit(parameters)
    moved = limit.apply(limit.remember(), torch.tensor(0.1))
    assert moved.ratio_G.tolist() == [0, 0]
    assert torch.equal(parameters["blocks.0.a"], torch.ones(3))


def test_the_controller_takes_ranks_as_a_set_of_any_size() -> None:
    torch.manual_seed(0)
    controller = Controller(figures=6, advice_size=16)
    figures_KS = torch.randn(4, 6)
    said_R = controller(figures_KS)
    assert said_R.shape == (16,)
    assert said_R.abs().max() < 1
    torch.testing.assert_close(controller(figures_KS[[2, 0, 3, 1]]), said_R)
    torch.testing.assert_close(controller(figures_KS.repeat(3, 1)), said_R)
    assert not torch.allclose(controller(figures_KS[:1]), said_R)


def test_the_first_figures_are_usual_and_one_that_is_not_finite_says_nothing() -> None:
    controller = Controller(figures=3, advice_size=4)
    first_KS = torch.tensor([[1.0, -torch.inf, 5.0], [3.0, -torch.inf, 5.0]])
    assert controller.compare(first_KS).tolist() == [
        [torch.tensor(-1.0).tanh(), 0, 0],
        [torch.tensor(1.0).tanh(), 0, 0],
    ]
    later_KS = controller.compare(torch.tensor([[2.0, 7.0, torch.nan], [2.0, 7.0, 9.0]]))
    assert later_KS.isfinite().all()
    assert later_KS[:, :2].abs().max() == 0
    assert controller.usual_S.tolist() == [2.0, 7.0, 5.0]
