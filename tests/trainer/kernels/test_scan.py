"""The scan's kernels against the chunked scan, which models/resonate/test_scan.py holds to the recurrence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from pylon_api.training import ModelSpec
from pylon_trainer.kernels.scan import scan
from pylon_trainer.models import build_model
from pylon_trainer.models.resonate.scan import chunked_scan

# Sums of strong decays in float32 cost the gradients of poles a digit.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """Random inputs of a shape; documents by their lengths, one tuple for each sequence."""

    sequences: int = 1
    tokens: int = 37
    heads: int = 2
    groups: int = 1
    width: int = 6
    size: int = 5
    documents: tuple[tuple[int, ...], ...] = ()
    continues: bool = False
    """Whether there are tokens before."""
    slowness: float = 1.0
    """A larger one makes states last longer."""
    reads_state: bool = True
    """Whether the loss depends on the state after the last token."""

    def leaves(self, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
        """Values, steps, poles, write, read and perhaps a state; values and maps are parts of wider rows, as a model's
        are."""
        inner, maps = self.heads * self.width, self.groups * self.size
        rows = torch.randn(self.sequences, self.tokens, inner + 2 * maps, device=device).to(dtype)
        values, write, read = rows.split([inner, maps, maps], -1)
        steps = torch.rand(self.sequences, self.tokens, self.heads, device=device) / self.slowness
        poles = -8 * torch.rand(self.heads, device=device)
        leaves = [values.unflatten(2, (self.heads, -1)), steps, poles]
        leaves += [x.unflatten(2, (self.groups, -1)) for x in (write, read)]
        if self.continues:
            leaves.append(torch.randn(self.sequences, self.heads, self.size, self.width, device=device))
        return [leaf.detach().requires_grad_() for leaf in leaves]

    def starts_BT(self, device: torch.device) -> Tensor | None:
        starts = [[sum(of[:n]) for n, length in enumerate(of) for _ in range(length)] for of in self.documents]
        return torch.tensor(starts, device=device) if starts else None


CASES = {
    "groups": Case(sequences=2, heads=4, groups=2),
    "documents": Case(documents=((5, 1, 1, 9, 21),)),
    "state": Case(continues=True, slowness=20.0),
    "state and documents": Case(sequences=2, continues=True, documents=((5, 1, 1, 9, 21), (16, 16, 5)), slowness=20.0),
    "fast": Case(slowness=0.1),
    "tiles in a head": Case(width=40, size=20),
    "whole chunks": Case(tokens=32, width=16, size=16, reads_state=False),
    "less than a chunk": Case(tokens=3),
}


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and tiles that even a few tokens, heads and columns overflow."""
    launch = pytest.importorskip("pylon_trainer.kernels.scan.launch")
    tiling = launch.Tiling(stages=1, warps=4, tile=3)
    of_numbers = replace(tiling, tile=16)
    tilings = launch.Tilings(16, 16, sweep=of_numbers, outputs=tiling, gradients=tiling, maps=of_numbers)
    monkeypatch.setattr(launch, "choose_tilings", lambda *_: tilings)


def scan_kernels(leaves: list[Tensor], starts_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    *arguments, state = [*leaves, None][:6]
    return scan(*arguments, starts_BT=starts_BT, state_BHNP=state)


def scan_reference(leaves: list[Tensor], starts_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    *arguments, state = [*leaves, None][:6]
    return chunked_scan(*arguments, chunk_tokens=8, starts_BT=starts_BT, state_BHNP=state)


def with_gradients(results: tuple[Tensor, Tensor], leaves: list[Tensor], case: Case) -> list[Tensor]:
    """What came out, and the gradient at every leaf, of a loss that is the same in every run."""
    results = results if case.reads_state else results[:1]
    draws = torch.Generator().manual_seed(1)
    loss = sum((x.double() * torch.randn(x.shape, generator=draws).to(x.device)).sum() for x in results)
    return [x.detach() for x in results] + list(torch.autograd.grad(loss, leaves))


def exact(leaves: list[Tensor]) -> list[Tensor]:
    return [leaf.detach().double().requires_grad_() for leaf in leaves]


def assert_kernels_agree(case: Case, dtype: torch.dtype, device: torch.device) -> None:
    leaves, starts_BT = case.leaves(dtype, device), case.starts_BT(device)
    exact_leaves = exact(leaves)
    actual = with_gradients(scan_kernels(leaves, starts_BT), leaves, case)
    expected = with_gradients(scan_reference(exact_leaves, starts_BT), exact_leaves, case)
    for number, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape
        error = (a.double() - e.double()).norm() / e.double().norm().clamp(min=1e-6)
        assert error <= TOLERANCE[dtype], f"relative error {error:.2e} of result {number}"


@pytest.mark.usefixtures("_tiny")
@pytest.mark.parametrize("name", CASES)
def test_kernels_agree_with_the_reference(device, name) -> None:
    assert_kernels_agree(CASES[name], torch.float32, device)


@pytest.mark.usefixtures("_tiny")
def test_kernels_agree_in_half_precision(device) -> None:
    assert_kernels_agree(CASES["state and documents"], torch.float16, device)


@pytest.mark.usefixtures("_tiny")
def test_decays_of_any_strength_leave_gradients_finite(device) -> None:
    """And a short one keeps its digits after a long one, which running sums in float32 would cost it."""
    case = Case(tokens=20, slowness=100.0)
    leaves = case.leaves(torch.float32, device)
    with torch.no_grad():
        leaves[1][:, 3] = 1e5
        leaves[1][:, 7] = 0.0
    actual = with_gradients(scan_kernels(leaves, None), leaves, case)
    expected = with_gradients(scan_reference(leaves, None), leaves, case)
    torch.testing.assert_close(actual[0][:, 4:], expected[0][:, 4:], rtol=1e-4, atol=1e-5)
    assert all(x.isfinite().all() for x in actual)


@pytest.mark.usefixtures("_tiny")
def test_no_token_hears_of_a_later_one_or_of_another_document(device) -> None:
    case = Case(documents=((16, 21),))
    leaves = [leaf.detach() for leaf in case.leaves(torch.float32, device)]
    before, _ = scan_kernels(leaves, case.starts_BT(device))
    for changed in (slice(16), slice(16, None)):
        others = slice(16, None) if changed == slice(16) else slice(16)
        values = leaves[0].clone()
        values[:, changed] += 1
        after, _ = scan_kernels([values, *leaves[1:]], case.starts_BT(device))
        assert torch.equal(before[:, others], after[:, others])
        assert not torch.equal(before[:, changed], after[:, changed])


@pytest.mark.usefixtures("_tiny")
def test_compiled_code_calls_the_kernels(device) -> None:
    """Without a break in the graph, and without compiling anew for other documents."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(scan_kernels, backend=counter, fullgraph=True)
    for documents in ((4, 16), (19, 1)):
        case = Case(tokens=20, documents=(documents,))
        leaves, starts_BT = case.leaves(torch.float32, device), case.starts_BT(device)
        actual = with_gradients(compiled(leaves, starts_BT), leaves, case)
        expected = with_gradients(scan_kernels(leaves, starts_BT), leaves, case)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e)
    assert counter.frame_count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "size"),
    [(24, 1, 64, 64), (8, 2, 128, 128), (4, 4, 64, 16), (4, 1, 64, 256), (2, 1, 80, 40), (2, 1, 16, 16)],
)
def test_kernels_at_full_size(heads, groups, width, size, documents, dtype) -> None:
    """Twice, to the same bits; the last chunk is not full."""
    device, lengths = torch.device("cuda"), ((300, 3, 397), (256, 444)) if documents else ()
    case = Case(2, 700, heads, groups, width, size, lengths, continues=True, slowness=30.0)
    assert_kernels_agree(case, dtype, device)
    leaves, starts_BT = case.leaves(dtype, device), case.starts_BT(device)
    first, second = (with_gradients(scan_kernels(leaves, starts_BT), leaves, case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_compiled_block_is_one_graph() -> None:
    """Forward and backward of a whole block in bfloat16, with what it recomputes, against the same block eagerly."""
    spec = ModelSpec.model_validate({"architecture": "Resonate", "hiddenSize": 128, "layers": 2})
    model = build_model(spec, vocab_size=64).to("cuda")
    block, context = model.blocks[0], model.context(torch.zeros(2, 200, dtype=torch.int64, device="cuda"))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    results = []
    for run in (block, torch.compile(block, backend=counter, fullgraph=True)):
        for seed in (1, 0):
            torch.manual_seed(seed)
            x_BTD = torch.randn(2, 200, 128, device="cuda", requires_grad=True)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                y_BTD = run(x_BTD, context)
            gradients = torch.autograd.grad(y_BTD.float().sin().sum(), [x_BTD, *block.parameters()])
        results.append([y_BTD.detach(), *gradients])
    assert counter.frame_count == 1
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).norm() <= 0.02 * eager.norm()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"read": (1, 4, 1, 6)}, r"write \(1, 4, 1, 5\) and read \(1, 4, 1, 6\)"),
        ({"write": (1, 4, 3, 5), "read": (1, 4, 3, 5)}, "H a multiple of G"),
        ({"write": (1, 4, 1, 512), "read": (1, 4, 1, 512)}, "512 numbers per channel; give at most 256"),
    ],
)
def test_bad_input_is_named(changes, complaint) -> None:
    shapes = {"values": (1, 4, 2, 6), "steps": (1, 4, 2), "poles": (2,), "write": (1, 4, 1, 5), "read": (1, 4, 1, 5)}
    with pytest.raises(ValueError, match=complaint):
        scan(*(torch.zeros(shape) for shape in (shapes | changes).values()))
