"""Resonate as a decoder, with every kind of block: causal, isolated, the same token by token, compiled whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from advice import open_ports
from compilers import without_code
from pydantic import ValidationError
from torch import Tensor

from pylon_api.training import Architecture, ModelSpec, ResonateSpec
from pylon_trainer.models import Decoder, Resonate, build_model
from pylon_trainer.models.resonate import scan
from pylon_trainer.models.resonate.cache import Cache
from pylon_trainer.models.resonate.model import kind_of

VOCABULARY = 97
KINDS: dict[str, dict[str, Any]] = {
    "scan": {"attentionEvery": 0},
    "long convolution": {"attentionEvery": 0, "longConvolutionEvery": 1},
    "attention": {"attentionEvery": 1},
    "all three": {"longConvolutionEvery": 4, "attentionEvery": 4},
    "groups": {"attentionEvery": 0, "groups": 2},
    "ports": {"longConvolutionEvery": 4, "attentionEvery": 4, "control": {"vectorSize": 8}, "stability": {}},
}
every_kind = pytest.mark.parametrize("own", KINDS.values(), ids=KINDS.keys())


def model_of(own: dict[str, Any], **fields: object) -> Decoder:
    """A tiny model with weights large enough that a mistake shows."""
    torch.manual_seed(0)
    spec = {
        "architecture": "Resonate",
        "layers": 4,
        "hiddenSize": 48,
        "heads": 4,
        "kvHeads": 2,
        "initializerStd": 0.15,
        "resonate": {"stateSize": 8, "headWidth": 16, "chunkTokens": 4} | own,
    }
    return open_ports(build_model(ModelSpec.model_validate(spec | fields), vocab_size=VOCABULARY))


def tokens_of(sequences: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (sequences, length), generator=torch.Generator().manual_seed(1))


@every_kind
def test_no_token_sees_a_later_one(own: dict[str, Any]) -> None:
    model = model_of(own)
    tokens_BT = tokens_of(1, 14)
    before = model(tokens_BT)
    for first in (1, 6, 8, 13):
        changed_BT = tokens_BT.clone()
        changed_BT[0, first:] = (changed_BT[0, first:] + 1) % VOCABULARY
        after = model(changed_BT)
        assert torch.equal(before[:, :first], after[:, :first])
        assert not torch.allclose(before[:, first:], after[:, first:])


@every_kind
def test_a_token_reaches_those_far_behind_it(own: dict[str, Any]) -> None:
    model = model_of(own)
    tokens_BT = tokens_of(1, 14)
    changed_BT = tokens_BT.clone()
    changed_BT[0, 0] = (changed_BT[0, 0] + 1) % VOCABULARY
    assert not torch.equal(model(tokens_BT)[:, 13], model(changed_BT)[:, 13])


@every_kind
def test_isolated_documents_equal_each_document_alone(own: dict[str, Any]) -> None:
    model = model_of(own)
    lengths = [5, 1, 9, 3]
    tokens_BT = tokens_of(1, sum(lengths))
    documents_BT = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]

    together = model(tokens_BT, documents_BT)
    alone = torch.cat([model(part) for part in tokens_BT.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@every_kind
@pytest.mark.parametrize("parts", [[1] * 18, [7, 1, 1, 9], [17, 1]])
def test_token_by_token_equals_all_at_once(own: dict[str, Any], parts: list[int]) -> None:
    model = model_of(own)
    tokens_BT = tokens_of(2, 18)
    cache = Cache(model)
    hidden = torch.cat([cache.extend(part) for part in tokens_BT.split(parts, dim=1)], 1)
    torch.testing.assert_close(hidden, model(tokens_BT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "grows"), [("scan", False), ("long convolution", False), ("all three", True)])
def test_only_attention_remembers_more_with_every_token(kind: str, grows: bool) -> None:
    model = model_of(KINDS[kind])
    cache = Cache(model)
    cache.extend(tokens_of(1, 4))
    early = cache.bytes()
    for _ in range(3):
        cache.extend(tokens_of(1, 1))
    assert (cache.bytes() > early) == grows
    assert model.attends == grows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "documents", "span_chunks"),
    [
        (KINDS["groups"] | {"activation": "Binlop"}, False, 128),
        (KINDS["ports"], True, 128),
        (KINDS["all three"], True, 2),
    ],
)
def test_blocks_compile_without_a_graph_break(
    own: dict[str, Any], documents: bool, span_chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "SPAN_CHUNKS", span_chunks)
    torch._dynamo.reset()
    model = model_of(own)
    tokens_BT = tokens_of(2, 11)
    documents_BT = (torch.arange(11) // 5).int().expand(2, -1).contiguous() if documents else None
    weights = torch.randn(2, 11, 48)
    expected = model(tokens_BT, documents_BT)
    (expected * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=without_code)
    y = model(tokens_BT, documents_BT)
    (y * weights).sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad - gradients[name]).norm() <= 1e-4 * gradients[name].norm(), name


@every_kind
def test_bfloat16_is_close_to_float32(own: dict[str, Any]) -> None:
    model = model_of(own, initializerStd=0.05)
    tokens_BT = tokens_of(2, 17)
    exact = model(tokens_BT)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        rounded = model(tokens_BT)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("attention_every", "long_convolution_every", "kinds"),
    [
        (8, 0, "A"),
        (8, 0, "SA"),
        (8, 0, "SSSASSS"),
        (8, 0, "SSSSASSSSSSS"),
        (8, 0, "SSSSASSSSSSSASSSSSSSASSS"),
        (1, 0, "AAAA"),
        (0, 0, "SSSS"),
        (8, 8, "SSASL"),
        (8, 4, "SSSLASSLSSSL"),
        (4, 3, "SSLSSL"),
        (8, 1, "LLLLLL"),
    ],
)
def test_the_middle_block_of_every_so_many_attends_and_the_last_convolves(
    attention_every: int, long_convolution_every: int, kinds: str
) -> None:
    own = ResonateSpec(attention_every=attention_every, long_convolution_every=long_convolution_every)
    spec = ModelSpec(architecture=Architecture.RESONATE, layers=len(kinds), resonate=own)
    assert "".join(kind_of(spec, number).name[0] for number in range(len(kinds))) == kinds


def test_residual_projections_shrink_with_depth() -> None:
    model = model_of({}, layers=8, hiddenSize=128, initializerStd=0.05)
    assert isinstance(model, Resonate)
    weights = model.state_dict()
    assert weights["blocks.3.mixer.input.weight"].std() == pytest.approx(0.05, rel=0.05)
    assert weights["blocks.3.mixer.output.weight"].std() == pytest.approx(0.05 / 4, rel=0.05)
    assert weights["blocks.3.mlp.down.weight"].std() == pytest.approx(0.05 / 4, rel=0.05)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"hiddenSize": 40, "heads": 2, "resonate": {}}, "headWidth 64"),
        ({"hiddenSize": 40, "heads": 2, "resonate": None}, "headWidth 64"),
        ({"resonate": {"headWidth": 16, "groups": 4}}, "groups 4"),
        ({"architecture": "Transformer", "resonate": {}}, "Transformer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        model_of({}, **fields)
