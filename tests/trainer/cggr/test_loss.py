"""CGGRLoss has the published one's arguments, and not its defects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pylon_trainer.cggr import CGGRLoss

SEQUENCES, LENGTH, VOCABULARY, WIDTH = 3, 16, 29, 8
FIXED: dict[str, Any] = {"warmup_steps": 0, "dynamic_threshold": False}


def logits_of(scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (scale * torch.randn(SEQUENCES, LENGTH, VOCABULARY, generator=generator)).requires_grad_()


def targets_of(ignored: int = 0) -> Tensor:
    targets_BT = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(1))
    targets_BT[:, :ignored] = -100
    return targets_BT


def carrying(logits: Tensor) -> Tensor:
    """bool B x T: rows that received gradient."""
    assert logits.grad is not None
    return logits.grad.abs().sum(-1) > 0


@pytest.mark.parametrize("selection", ["topk", "fixed_quota", "stratified", "sequence_aware", "sampled"])
@pytest.mark.parametrize("scoring", ["entropy", "margin", "loss", "combined", "difficulty", "gradient_norm", "random"])
def test_a_share_of_the_labelled_tokens_carries_loss(scoring: str, selection: str) -> None:
    criterion = CGGRLoss(scoring, selection, min_tokens_ratio=0.25, **FIXED)
    logits, targets = logits_of(), targets_of(ignored=2)
    criterion(logits, targets).backward()
    assert carrying(logits).sum() == 12
    assert not carrying(logits)[targets == -100].any()
    assert criterion.get_metrics()["tokens_selected"] == 12


@pytest.mark.parametrize(("field", "value"), [("scoring", "entropie"), ("selection", "top")])
def test_unknown_names_list_the_choices(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: '{value}' is unknown; choose one of .*(entropy|topk)"):
        CGGRLoss(**{field: value})


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"min_tokens_ratio": 0.0}, "min_tokens_ratio: 0.0"),
        ({"min_tokens_ratio": 1.5}, "min_tokens_ratio: 1.5"),
        ({"threshold_sensitivity": 1.0}, "threshold_sensitivity"),
        ({"num_strata": 0}, "num_strata: 0"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"min_tokens_per_sequence": -1}, "min_tokens_per_sequence"),
    ],
)
def test_numbers_that_cannot_be_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CGGRLoss(**options)


def test_one_stratum_draws_all_tokens_alike() -> None:
    logits, targets = logits_of(), targets_of()
    CGGRLoss("loss", "stratified", num_strata=1, min_tokens_ratio=0.25, **FIXED)(logits, targets).backward()
    assert carrying(logits).sum() == 12
    losses_N = F.cross_entropy(logits.detach().flatten(0, 1), targets.flatten(), reduction="none")
    weight_N = logits.grad.flatten(0, 1).norm(dim=-1) / (losses_N.neg().exp() - 1).abs()  # type: ignore[union-attr]
    assert weight_N.amax() < 2 * weight_N[weight_N > 0].amin()


def test_a_base_loss_of_one_number_and_an_empty_batch_are_told() -> None:
    with pytest.raises(ValueError, match=r"base_loss: gives shape .* use reduction='none'"):
        CGGRLoss(base_loss=torch.nn.CrossEntropyLoss(), **FIXED)(logits_of(), targets_of())
    with pytest.raises(ValueError, match=r"logits: shape \(0, 16, 29\) holds nothing"):
        CGGRLoss(**FIXED)(logits_of()[:0], targets_of()[:0])


def test_the_hardest_by_loss_are_the_hardest_by_loss() -> None:
    # The published one hands no targets to its scores, so that `loss` is entropy there.
    criterion = CGGRLoss("loss", "topk", min_tokens_ratio=0.25, **FIXED)
    logits, targets = logits_of(), targets_of()
    criterion(logits, targets).backward()
    losses_N = F.cross_entropy(logits.detach().flatten(0, 1), targets.flatten(), reduction="none")
    assert set(losses_N.topk(12).indices.tolist()) == set(carrying(logits).flatten().nonzero().flatten().tolist())


def test_scorings_differ() -> None:
    # The published fallback scores all alike.
    chosen = set()
    for scoring in ("entropy", "margin", "loss", "gradient_norm"):
        logits = logits_of()
        CGGRLoss(scoring, "topk", min_tokens_ratio=0.25, **FIXED)(logits, targets_of()).backward()
        chosen.add(tuple(carrying(logits).flatten().tolist()))
    assert len(chosen) == 4


@pytest.mark.parametrize("selection", ["topk", "stratified", "sequence_aware", "sampled"])
@pytest.mark.parametrize("is_fused", [False, True])
def test_at_ratio_one_it_is_the_mean_of_all(selection: str, is_fused: bool) -> None:
    criterion = CGGRLoss(selection=selection, min_tokens_ratio=1.0, **FIXED)
    targets = targets_of(ignored=3)
    hidden, weight = torch.randn(SEQUENCES, LENGTH, WIDTH), torch.randn(VOCABULARY, WIDTH)
    logits = hidden @ weight.T
    loss = criterion(hidden, targets, weight) if is_fused else criterion(logits, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    assert criterion.metrics["tokens_selected"] == (targets != -100).sum()


@pytest.mark.parametrize("is_fused", [False, True])
def test_without_any_label_loss_and_gradient_are_zero(is_fused: bool) -> None:
    criterion = CGGRLoss(**FIXED)
    x = torch.randn(SEQUENCES, LENGTH, WIDTH if is_fused else VOCABULARY, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True) if is_fused else None
    loss = criterion(x, torch.full((SEQUENCES, LENGTH), -100), weight)
    loss.backward()
    assert loss == 0
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("selection", ["topk", "sampled"])
def test_the_fused_loss_is_that_of_the_logits(selection: str) -> None:
    hidden, weight = torch.randn(SEQUENCES, LENGTH, WIDTH), torch.randn(VOCABULARY, WIDTH)
    results = []
    for is_fused in (False, True):
        criterion = CGGRLoss(selection=selection, min_tokens_ratio=0.3, **FIXED)
        leaf, leaf_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        x = (leaf, targets_of(2), leaf_weight) if is_fused else (leaf @ leaf_weight.T, targets_of(2))
        loss = criterion(*x)
        loss.backward()
        results.append((loss.detach(), leaf.grad, leaf_weight.grad))
    for of_logits, of_hidden in zip(*results, strict=True):
        torch.testing.assert_close(of_hidden, of_logits, rtol=1e-4, atol=1e-5)


def test_every_sequence_keeps_its_minimum() -> None:
    logits = logits_of()
    with torch.no_grad():
        logits[0] *= 20  # by far the least uncertain, so that topk would drop it
    criterion = CGGRLoss("entropy", "sequence_aware", min_tokens_ratio=0.25, min_tokens_per_sequence=3, **FIXED)
    criterion(logits, targets_of()).backward()
    assert carrying(logits).sum() == 12
    assert (carrying(logits).sum(1) >= 3).all()


def test_a_batch_of_one_is_thinned() -> None:
    logits = logits_of()[:1].detach().requires_grad_()
    CGGRLoss(min_tokens_ratio=0.25, **FIXED)(logits, targets_of()[:1]).backward()
    assert carrying(logits).sum() == 4


@pytest.mark.parametrize("is_confident", [True, False])
def test_the_ratio_moves_to_both_sides_of_its_base(is_confident: bool) -> None:
    criterion = CGGRLoss(scoring="gradient_norm", min_tokens_ratio=0.4, warmup_steps=0, threshold_sensitivity=0.6)
    targets = targets_of()
    logits = 12.0 * F.one_hot(targets, VOCABULARY)
    if is_confident:
        logits[0, :3] = 0  # three tokens hold the gradient
    else:
        logits = logits_of().detach()
    for _ in range(60):
        criterion(logits, targets)
        criterion.step()
    ratio = criterion.get_metrics()["token_ratio"]
    assert ratio < 0.4 if is_confident else ratio > 0.4


def test_warm_up_starts_with_all_tokens_and_the_count_is_kept() -> None:
    criterion = CGGRLoss(warmup_steps=4, dynamic_threshold=False)
    ratios = []
    for _ in range(6):
        criterion(logits_of(), targets_of())
        ratios.append(criterion.get_metrics()["token_ratio"])
        criterion.step()
    assert ratios[0] == 1
    assert ratios[-1] == 0.25
    assert ratios == sorted(ratios, reverse=True)

    assert list(criterion.state_dict()) == ["step_count"]
    resumed = CGGRLoss(warmup_steps=4, dynamic_threshold=False)
    resumed.load_state_dict(criterion.state_dict())
    resumed(logits_of(), targets_of())
    assert resumed.get_metrics()["token_ratio"] == 0.25


class _NoWaiting(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        assert name not in {"item", "tolist", "__bool__", "__int__", "__float__", "nonzero"}, name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_step_reads_nothing_back(is_fused: bool) -> None:
    criterion = CGGRLoss(selection="sampled", min_tokens_ratio=0.25, warmup_steps=0)
    x = torch.randn(SEQUENCES, LENGTH, WIDTH if is_fused else VOCABULARY, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, requires_grad=True) if is_fused else None
    criterion(x, targets_of(), weight)  # the first call sets up
    criterion.step()
    with _NoWaiting():
        criterion(x, targets_of(), weight).backward()
        criterion.step()


def test_a_base_loss_of_ones_own_is_used() -> None:
    base = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    logits, targets = logits_of(), targets_of()
    loss = CGGRLoss(min_tokens_ratio=1.0, base_loss=base, **FIXED)(logits, targets)
    torch.testing.assert_close(loss, base(logits.flatten(0, 1), targets.flatten()).mean())
    with pytest.raises(ValueError, match="head_weight"):
        CGGRLoss(base_loss=base)(torch.randn(2, WIDTH), torch.zeros(2, dtype=torch.long), torch.randn(5, WIDTH))


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="targets"):
        CGGRLoss()(logits_of(), targets_of()[:, 1:])


def test_flat_logits_are_taken_too() -> None:
    logits, targets = logits_of(), targets_of()
    expected = CGGRLoss(**FIXED)(logits, targets)
    torch.testing.assert_close(CGGRLoss(**FIXED)(logits.flatten(0, 1), targets.flatten()), expected)


def test_outside_training_all_count() -> None:
    logits, targets = logits_of(), targets_of(2)
    loss = CGGRLoss(**FIXED).eval()(logits, targets)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
