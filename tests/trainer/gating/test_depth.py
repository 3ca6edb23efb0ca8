"""Depths: which rows leave where, at what weight, and that the engines follow."""

from __future__ import annotations

import pytest
import torch
from engines import ROW_ENGINES, assert_same, batch_of, depth_of, engine_of, kv_gradient_of, model_of, reference, run

from pylon_trainer.gating.depth import Depth
from pylon_trainer.gating.engine import HeadOnly

ROWS = list(range(0, 39, 2))


def blocks_of_ranks(depth: Depth, layers: int) -> list[int]:
    """Blocks that the gradient of each row goes back over, by rank."""
    ranks_M = depth.ranks_K
    blocks = [layers] * len(ranks_M)
    for over, narrowing in sorted(depth.narrowings(layers).items()):
        left = set(ranks_M.tolist()) - set(ranks_M[narrowing.kept_R].tolist())
        for rank in left:
            blocks[rank] = over
        assert narrowing.kept_R.tolist() == sorted(set(narrowing.kept_R.tolist()))
        ranks_M = ranks_M[narrowing.kept_R]
    return blocks


@pytest.mark.parametrize(
    ("rows", "layers", "fields", "expected"),
    [
        (8, 8, {}, [8, 8, 6, 6, 4, 4, 2, 2]),
        (8, 8, {"opened": 2}, [8, 8, 6, 6, 4, 4, 4, 4]),
        (8, 8, {"opened": 1}, [8, 8, 6, 6, 6, 6, 6, 6]),
        (8, 8, {"opened": 0}, [8] * 8),
        (6, 8, {"buckets": 2, "opened": 1}, [8, 8, 8, 4, 4, 4]),
        (7, 30, {"buckets": 3, "opened": 2}, [30, 30, 30, 20, 20, 10, 10]),
        (4, 2, {}, [2, 1, 1, 1]),
        (2, 8, {}, [8, 4]),
        (1, 1, {}, [1]),
        (0, 4, {}, []),
        (8, 8, {"leak_rate": 1.0}, [8] * 8),
    ],
)
def test_the_hardest_rows_go_furthest(rows: int, layers: int, fields: dict[str, float], expected: list[int]) -> None:
    assert blocks_of_ranks(depth_of(rows, **fields), layers) == expected


def test_leaks_are_a_fixed_share_drawn_evenly_and_weighted_so_that_nothing_is_biased() -> None:
    rows, draws, total = 40, 100, torch.zeros(40)
    for draw in range(draws):
        depth = depth_of(rows, leak_rate=0.3, start=(draw + 0.5) / draws)
        weights_M, ranks_M = torch.ones(rows), depth.ranks_K
        for _, narrowing in sorted(depth.narrowings(8).items()):
            weights_M = weights_M[narrowing.kept_R] * narrowing.weights_R
            ranks_M = ranks_M[narrowing.kept_R]
        assert len(ranks_M) == 10 + 3 * 3
        assert set(range(10)) <= set(ranks_M.tolist())
        total.index_add_(0, ranks_M, weights_M)
    torch.testing.assert_close(total / draws, torch.ones(rows), rtol=0, atol=0.04)


def test_any_leak_lets_one_row_of_every_bucket_go_on_with_the_weight_of_all() -> None:
    depth = depth_of(8, leak_rate=0.01)
    for _, narrowing in sorted(depth.narrowings(8).items()):
        assert narrowing.weights_R.max() == 2
    assert len(narrowing.kept_R) == 2 + 3


@pytest.mark.parametrize("fields", [{}, {"opened": 2}, {"leak_rate": 0.4, "start": 0.7}, {"buckets": 2, "opened": 1}])
@pytest.mark.parametrize("layers", [1, 4, 6])
@pytest.mark.parametrize("name", ROW_ENGINES)
def test_gradients_equal_the_cut_dense_ones(name: str, layers: int, fields: dict[str, float]) -> None:
    model, batch, depth = model_of(layers=layers), batch_of(isolated=True), depth_of(len(ROWS), **fields)
    engine = engine_of(name, model, depth_buckets=depth.buckets)
    _, actual = run(engine, model, batch, ROWS, depth)
    assert_same(actual, reference(model, batch, ROWS, kv_gradient_of(name), depth=depth)[1], 1e-5)


def test_depth_changes_the_gradient_below_and_not_the_top_block() -> None:
    """Guards the test above."""
    model, batch = model_of(layers=4), batch_of()
    engine = engine_of("SinglePass-Truncated-Keep", model)
    full, cut = (run(engine, model, batch, ROWS, depth)[1] for depth in (None, depth_of(len(ROWS))))
    torch.testing.assert_close(cut["blocks.3.mlp.up.weight"], full["blocks.3.mlp.up.weight"])
    assert (cut["blocks.0.mlp.up.weight"] - full["blocks.0.mlp.up.weight"]).norm() > 0.1 * full[
        "blocks.0.mlp.up.weight"
    ].norm()


def test_an_engine_that_goes_back_over_everything_refuses_depths() -> None:
    model = model_of()
    engine = engine_of("HeadOnly", model)
    assert isinstance(engine, HeadOnly)
    with pytest.raises(ValueError, match="use SinglePass or TwoPass"):
        run(engine, model, batch_of(), ROWS, depth_of(len(ROWS)))
