"""Backends of torch.compile for tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx


def without_code(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """inductor up to where it would generate code, which is slow and torch's business: its passes over the graph, and
    the cut into what is held and what is computed again, are where recomputed parts can go wrong."""

    def inner(graph: torch.fx.GraphModule, _: list[Any], **__: Any) -> Callable[..., Any]:
        return make_boxed_func(graph.forward)

    compiled: Callable[..., Any] = compile_fx(graph, inputs, inner_compile=inner)
    return compiled
