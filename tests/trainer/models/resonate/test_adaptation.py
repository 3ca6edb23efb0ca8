"""Adapted layers: what they compute, that growth and generated weights change nothing, what the codebook finds."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compilers import without_code
from engines import awaken
from ranks import run_ranks
from torch import Tensor

from pylon_api.training import AdaptationSpec, CodebookSpec, ModelSpec
from pylon_trainer.consensus.agreement import fingerprints
from pylon_trainer.consensus.groups import Kind, group_by_kind
from pylon_trainer.models import Resonate, build_model
from pylon_trainer.models.resonate.cache import Cache
from pylon_trainer.models.resonate.codebook import Codebook
from pylon_trainer.models.resonate.dlra import AdaptedLinear, generate
from pylon_trainer.models.resonate.upkeep import Upkeep
from pylon_trainer.runtime.distributed import World
from pylon_trainer.runtime.seeds import make_deterministic

VOCABULARY = 97
CODEBOOK = {"subKeys": 8, "width": 8, "topK": 3}
KINDS: dict[str, dict[str, Any]] = {
    "zero": {"base": "Zero"},
    "seed": {"base": "Seed"},
    "dense": {"base": "Dense"},
    "codebook": {"base": "Seed", "codebook": CODEBOOK},
}
every_kind = pytest.mark.parametrize("adaptation", KINDS.values(), ids=KINDS.keys())
RANKS = {"rank": 2, "maximumRank": 8, "growEverySteps": 10}


def model_of(adaptation: dict[str, Any] | None, seed: int = 0) -> Resonate:
    """A tiny model with every kind of block."""
    torch.manual_seed(seed)
    own = {"stateSize": 8, "headWidth": 16, "chunkTokens": 4, "longConvolutionEvery": 4, "attentionEvery": 4}
    if adaptation is not None:
        own |= {"adaptation": RANKS | adaptation}
    spec = {"architecture": "Resonate", "layers": 4, "hiddenSize": 48, "heads": 4, "initializerStd": 0.15}
    model = build_model(ModelSpec.model_validate(spec | {"resonate": own}), vocab_size=VOCABULARY)
    assert isinstance(model, Resonate)
    return model


def tokens_of(sequences: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(1))


def adapted_layers(model: Resonate) -> dict[str, AdaptedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


def codebook_of(**fields: int) -> Codebook:
    torch.manual_seed(0)
    return Codebook(CodebookSpec.model_validate(CODEBOOK | fields))


def test_every_large_layer_is_adapted_and_nothing_else() -> None:
    layers = adapted_layers(model_of({}))
    mlp = ["mlp.gate", "mlp.up", "mlp.down"]
    kinds = {
        "blocks.0": ["mixer.input", "mixer.output"],
        "blocks.1": ["mixer.input", "mixer.output"],
        "blocks.2": [f"attention.{name}" for name in ("query", "key", "value", "output")],
        "blocks.3": ["mixer.input", "mixer.output"],
    }
    assert sorted(layers) == sorted(f"{block}.{path}" for block, paths in kinds.items() for path in paths + mlp)


def test_without_adaptation_a_model_is_what_it_was() -> None:
    plain, dense = model_of(None), model_of({"base": "Dense"})
    tokens_BT = tokens_of(2, 9)
    names = {name for name, _ in plain.named_parameters()}
    assert not any("adaptation" in name or "inward" in name for name in names)
    assert names < {name for name, _ in dense.named_parameters()}
    assert torch.equal(plain(tokens_BT), dense(tokens_BT)), "A is 0 at first, and W0 is what the plain model has"


def test_the_function_is_that_of_low_ranks_beside_the_base() -> None:
    """Multiplied out by hand into the weights of a plain model."""
    model, plain = awaken(model_of({"base": "Dense"})), model_of(None)
    weights = plain.state_dict()
    for name, layer in adapted_layers(model).items():
        assert layer.weight is not None
        weights[f"{name}.weight"] = layer.weight + layer.outward.weight[:, :2] @ layer.inward.weight[:2]
    plain.load_state_dict(weights)
    tokens_BT = tokens_of(2, 9)
    torch.testing.assert_close(model(tokens_BT), plain(tokens_BT), rtol=1e-4, atol=1e-4)


@every_kind
def test_growth_changes_no_output_and_then_more_ranks_learn(adaptation: dict[str, Any]) -> None:
    model = model_of(adaptation)
    assert model.shared is not None
    tokens_BT = tokens_of(2, 9)
    weights = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(2))
    learning = []
    before = model(tokens_BT)
    for step, rank in ((0, 2), (9, 2), (10, 4), (20, 8), (1000, 8)):
        model.shared.ranks.grow(step)
        after = model(tokens_BT)
        assert torch.equal(after, before)
        model.zero_grad()
        (after * weights).sum().backward()
        gradient = adapted_layers(model)["blocks.1.mixer.output"].outward.weight.grad
        assert gradient is not None
        learning.append(int((gradient != 0).any(0).sum()))
        assert learning[-1] == rank


@every_kind
def test_gradients_reach_all_that_learns_and_nothing_that_is_frozen(adaptation: dict[str, Any]) -> None:
    model = awaken(model_of(adaptation))
    model(tokens_of(2, 9)).square().sum().backward()
    for name, parameter in model.named_parameters():
        is_frozen = name.endswith(("input.weight", "output.weight", "gate.weight", "up.weight", "down.weight")) or (
            name.endswith(("query.weight", "key.weight", "value.weight")) and "adaptation" not in name
        )
        is_frozen = is_frozen and "adaptation" not in name
        assert (parameter.grad is None) == is_frozen, name
        assert parameter.requires_grad != is_frozen, name


GENERATE = """
from pylon_trainer.models.resonate.dlra import generate
print(generate(7, "blocks.0.mixer.input", 96, 48, 0.02).double().sum().item())
"""


def test_generated_weights_are_the_same_in_every_process_and_in_no_checkpoint() -> None:
    one, other = model_of({}, seed=0), model_of({}, seed=1)
    for name, layer in adapted_layers(one).items():
        assert layer.weight is not None
        twin = adapted_layers(other)[name].weight
        assert twin is not None
        assert torch.equal(layer.weight, twin), "whatever else the seed of the run changes"
    assert one.generated == other.generated != model_of({"baseSeed": 1}).generated
    assert not any(name.endswith("mixer.input.weight") for name in one.state_dict())
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run([sys.executable, "-c", GENERATE], env=os.environ | paths, stdout=subprocess.PIPE, check=True)
    assert float(said.stdout) == float(generate(7, "blocks.0.mixer.input", 96, 48, 0.02).double().sum())


def test_layers_are_generated_unlike_each_other() -> None:
    weights = [layer.weight for layer in adapted_layers(model_of({})).values() if layer.weight is not None]
    assert len({float(weight.flatten()[0]) for weight in weights}) == len(weights) == 22


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "isolated documents"])
def test_no_token_sees_a_later_one_or_another_document(documents: bool) -> None:
    model = awaken(model_of(KINDS["codebook"]))
    tokens_BT = tokens_of(1, 14)
    documents_BT = (torch.arange(14) // 7).int()[None] if documents else None
    before = model(tokens_BT, documents_BT)
    for first in (1, 6, 8, 13):
        changed_BT = tokens_BT.clone()
        changed_BT[0, first] = (changed_BT[0, first] + 1) % VOCABULARY
        differs_T = (model(changed_BT, documents_BT) != before)[0].any(-1)
        assert not differs_T[:first].any()
        assert differs_T[first]
        assert bool(differs_T[7:].any()) == (not documents or first >= 7)


def test_a_summary_reaches_the_scales_of_tokens_far_behind() -> None:
    """The hyper-network alone: what enters at the first token moves the scales of the last."""
    model = awaken(model_of(KINDS["codebook"]))
    block: Any = model.blocks[0]
    context = model.context(tokens_of(1, 14))
    x_BTD = torch.randn(1, 14, 48, generator=torch.Generator().manual_seed(2))
    changed_BTD = x_BTD.clone()
    changed_BTD[0, 0] += 1

    def scales(x: Tensor) -> Tensor:
        entered = block.adaptation.enter(block.adaptation.offers(x, context), context)
        return torch.cat(entered.scales, -1)

    assert not torch.equal(scales(x_BTD)[0, 13], scales(changed_BTD)[0, 13])


@every_kind
@pytest.mark.parametrize("parts", [[1] * 18, [7, 1, 1, 9]])
def test_token_by_token_equals_all_at_once(adaptation: dict[str, Any], parts: list[int]) -> None:
    model = awaken(model_of(adaptation))
    tokens_BT = tokens_of(2, 18)
    cache = Cache(model)
    hidden = torch.cat([cache.extend(part) for part in tokens_BT.split(parts, dim=1)], 1)
    torch.testing.assert_close(hidden, model(tokens_BT), rtol=1e-3, atol=1e-3)


def test_isolated_documents_equal_each_document_alone() -> None:
    model = awaken(model_of(KINDS["codebook"]))
    lengths = [5, 1, 9, 3]
    tokens_BT = tokens_of(1, sum(lengths))
    documents_BT = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]
    together = model(tokens_BT, documents_BT)
    alone = torch.cat([model(part) for part in tokens_BT.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_blocks_compile_without_a_graph_break() -> None:
    torch._dynamo.reset()
    model = awaken(model_of(KINDS["codebook"]))
    tokens_BT, weights = tokens_of(2, 11), torch.randn(2, 11, 48)
    expected = model(tokens_BT)
    (expected * weights).sum().backward()
    assert model.shared is not None
    assert model.shared.codebook is not None
    counts = model.shared.codebook.counts.clone()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.shared.codebook.counts.zero_()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=without_code)
    y = model(tokens_BT)
    (y * weights).sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.shared.codebook.counts, counts)
    for name, gradient in gradients.items():
        actual = model.get_parameter(name).grad
        assert actual is not None, name
        assert (actual - gradient).norm() <= 1e-3 * gradient.norm(), name


@pytest.mark.parametrize(("sub_keys", "top_k"), [(8, 1), (8, 3), (8, 8), (2, 2), (16, 4)])
def test_product_keys_find_the_best_of_all_atoms(sub_keys: int, top_k: int) -> None:
    codebook = codebook_of(subKeys=sub_keys, topK=top_k)
    context = model_of(None).context(tokens_of(1, 1))
    query = torch.randn(50, 16, generator=torch.Generator().manual_seed(3))
    choice, weights = codebook.choose(query, context)
    first, second = (F.rms_norm(half, (8,)) for half in query.chunk(2, -1))
    all_scores = ((first @ codebook.first.weight.T)[:, :, None] + (second @ codebook.second.weight.T)[:, None]).flatten(
        1
    )
    scores, best = all_scores.topk(top_k)
    assert torch.equal(choice, best)
    torch.testing.assert_close(weights, scores.softmax(-1))
    expected = (scores.softmax(-1)[..., None] * codebook.atoms[best]).sum(1)
    torch.testing.assert_close(codebook(query, context), expected)


def test_only_chosen_atoms_get_a_gradient_and_are_counted() -> None:
    codebook = codebook_of()
    context = model_of(None).context(tokens_of(1, 1))
    query = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    choice, _ = codebook.choose(query, context)
    codebook(query, context).sum().backward()
    assert codebook.atoms.grad is not None
    assert set(codebook.atoms.grad.any(1).nonzero().flatten().tolist()) == set(choice.flatten().tolist())
    assert torch.equal(codebook.counts, torch.bincount(choice.flatten(), minlength=64).float())
    with torch.no_grad():
        codebook(query, context)
    assert codebook.counts.sum() == 6, "what carries no gradient does not count"


def test_a_dead_sub_key_moves_next_to_the_busiest_and_is_found_again() -> None:
    codebook = codebook_of()
    counts = torch.full((8, 8), 10.0)
    counts[2] = 0.0
    counts[5] = 50.0
    keys, atoms = codebook.first.weight.detach().clone(), codebook.atoms.detach().clone().view(8, 8, -1)
    second = codebook.second.weight.detach().clone()
    codebook.revive(counts.flatten(), seed=1)
    moved = codebook.first.weight.detach()
    assert (moved[2] - keys[5]).norm() < 0.3 * keys[5].norm()
    assert not torch.equal(moved[2], keys[5])
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(moved[others], keys[others])
    assert torch.equal(codebook.second.weight, second)
    assert torch.equal(codebook.atoms.view(8, 8, -1)[2], atoms[5])
    assert torch.equal(codebook.usage.view(8, 8)[2], codebook.usage.view(8, 8)[5])
    assert codebook.usage.sum() == counts.sum()

    context = model_of(None).context(tokens_of(1, 1))
    query = torch.cat([keys[5], torch.randn(8)]).repeat(1, 1)
    assert {int(one) // 8 for one in codebook.choose(query, context)[0].flatten()} >= {2, 5}


def test_use_is_summed_over_ranks_and_replicas_stay_alike(tmp_path: Path) -> None:
    def take_part(world: World) -> None:
        model = model_of({"codebook": CODEBOOK | {"reviveEverySteps": 2}})
        assert model.shared is not None
        codebook = model.shared.codebook
        assert codebook is not None
        upkeep = Upkeep(model, world, seed=0)
        own = torch.zeros(8, 8)
        own[world.rank * 3 : world.rank * 3 + 3] = 1.0  # sub-keys 6 and 7 are used by nobody, 0 to 5 by one rank each
        codebook.counts.copy_(own.flatten())
        keys = codebook.first.weight.detach().clone()
        before_bytes = world.traffic.sent_bytes
        upkeep.end_step(1)
        assert torch.equal(codebook.first.weight, keys)
        assert world.traffic.sent_bytes == before_bytes, "no bytes between looks"
        upkeep.end_step(2)
        assert world.traffic.sent_bytes - before_bytes == 64 * 4
        moved = (codebook.first.weight != keys).any(1).tolist()
        assert moved == [False] * 6 + [True] * 2
        assert not codebook.counts.any()
        tensors = [*model.parameters(), *model.buffers()]
        hashes = world.gather(fingerprints([x.detach() for x in tensors]).tolist())
        assert hashes[0] == hashes[1]

    run_ranks(take_part, tmp_path, 2)


def test_the_codebook_goes_to_other_ranks_as_rows() -> None:
    shapes = {name: tuple(p.shape) for name, p in model_of(KINDS["codebook"]).named_parameters() if p.requires_grad}
    (group,) = [group for group in group_by_kind(shapes) if group.kind is Kind.CODEBOOK]
    assert sorted(name.rpartition("codebook.")[2] for name in group.shapes) == [
        "atoms",
        "first.weight",
        "second.weight",
    ]
    assert group.row_width == 8


def test_scales_begin_at_one() -> None:
    model, plain = model_of(KINDS["codebook"]), model_of(KINDS["seed"])
    for one in (model, plain):
        for layer in adapted_layers(one).values():
            torch.nn.init.normal_(layer.inward.weight, generator=torch.Generator().manual_seed(5))
            torch.nn.init.normal_(layer.outward.weight, generator=torch.Generator().manual_seed(6), std=0.1)
    tokens_BT = tokens_of(2, 9)
    torch.testing.assert_close(model(tokens_BT), plain(tokens_BT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("step", "fields", "expected"),
    [
        (0, {}, 8),
        (999, {}, 8),
        (1000, {}, 16),
        (2000, {}, 32),
        (10**9, {}, 32),
        (10**9, {"growEverySteps": 0}, 8),
        (2000, {"maximumRank": 24}, 24),
    ],
)
def test_ranks_double_until_there_are_as_many_as_allowed(step: int, fields: dict[str, int], expected: int) -> None:
    spec = AdaptationSpec.model_validate(fields)
    assert spec.rank_at(step) == expected
    assert spec.allocated_rank == spec.rank_at(10**9)


@pytest.mark.gpu
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("adaptation", [KINDS["dense"], KINDS["codebook"]], ids=["dense", "codebook"])
def test_on_a_gpu_steps_repeat_bit_for_bit(adaptation: dict[str, Any], is_compiled: bool) -> None:
    """With deterministic kernels alone, as runs have it, and close to the CPU."""
    torch._dynamo.reset()
    before = torch.get_deterministic_debug_mode()
    make_deterministic()
    try:
        model = awaken(model_of(adaptation))
        tokens_BT = tokens_of(4, 64)
        expected = model(tokens_BT)
        model = model.cuda()
        if is_compiled:
            for block in model.blocks:
                block.compile(fullgraph=True)
        steps = []
        for _ in range(2):
            model.zero_grad()
            hidden = model(tokens_BT.cuda())
            hidden.square().sum().backward()
            steps.append([hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert all(torch.equal(*pair) for pair in zip(*steps, strict=True))
        assert (hidden.cpu() - expected).norm() < 0.05 * expected.norm()
    finally:
        torch.set_deterministic_debug_mode(before)


@pytest.mark.gpu
def test_a_look_at_the_codebook_does_not_wait_for_the_device(waiting_is_an_error: AbstractContextManager[None]) -> None:
    codebook = codebook_of().to("cuda")
    codebook.counts[:32] = 1.0
    with waiting_is_an_error:
        codebook.revive(codebook.counts, seed=1)
