"""CGGRWrapper: depth routing. The harder a token, the more blocks its gradient goes back over.

With 4 buckets the gradient of the hardest quarter goes back over all blocks, that of the others ends after the upper
75, 50 and 25 %, and rows that have ended are gathered out, so the cost falls with them. Other than in the published
library `leak_rate` is the share of the ended rows that go on all the same, weighted by its inverse, so that the
gradient of the lower blocks stays unbiased; there it damps the gradient of all. 0 and 1 mean the same in both.

Shapes: B sequences, T tokens, N = B * T, D hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast

from pylon_api.training import GatingEngine, GatingSpec, GatingStrategy
from pylon_trainer.cggr.counter import CountingModule
from pylon_trainer.cggr.metrics import means
from pylon_trainer.gating.depth import Depth
from pylon_trainer.gating.gradients import Sink
from pylon_trainer.gating.scores import judge
from pylon_trainer.gating.selection import ranks
from pylon_trainer.huggingface.detour import detour
from pylon_trainer.huggingface.engine import ModelEngine
from pylon_trainer.huggingface.families import check
from pylon_trainer.huggingface.request import Request, has_labels, read
from pylon_trainer.kernels.score import Scores, score
from pylon_trainer.step import IGNORED


class CGGRWrapper(CountingModule):
    """A model whose output is its own and whose gradients are routed. Call `step()` after `optimizer.step()`.

    model: of a supported Hugging Face family. num_buckets: tiers of equal size, 1 for no routing. warmup_steps: over
    which the lower tiers open one by one. The state of the wrapper is one number beside the model's, which keeps its
    keys under the prefix `model.`.

    Raises ValueError for numbers that cannot be, ConfigError for a model that is not supported.
    """

    _count_name = "current_step_count"

    def __init__(
        self, model: Any, num_buckets: int = 4, warmup_steps: int = 1000, leak_rate: float = 0.0, *, seed: int = 0
    ) -> None:
        super().__init__()
        if num_buckets < 1:
            raise ValueError(f"num_buckets: {num_buckets} must be at least 1, which switches routing off")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps: {warmup_steps} must be at least 0, which opens all tiers at once")
        if not 0 <= leak_rate <= 1:
            raise ValueError(f"leak_rate: {leak_rate} must be in [0, 1]")
        check(model)
        self.model = model
        self.num_buckets, self.warmup_steps, self.leak_rate = num_buckets, warmup_steps, leak_rate
        self._seed = seed
        gating = GatingSpec(strategy=GatingStrategy.DIFFICULTY, engine=GatingEngine.SINGLE_PASS)
        self._engine = ModelEngine(model, gating)
        self._scores: Scores | None = None
        self._argument_names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]

    @property
    def num_layers(self) -> int:
        """Blocks of the model."""
        return len(self._engine.trunk.blocks)

    @property
    def opened(self) -> int:
        """Number of the last tier that ends where it should, 0 while all go to the bottom."""
        progress = 1.0 if self.warmup_steps == 0 else min(1.0, self._steps / self.warmup_steps)
        return int(progress * (self.num_buckets - 1))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *positional: Any, **named: Any) -> Any:
        """What the model gives: logits, and a loss where labels are given."""
        arguments = dict(zip(self._argument_names, positional, strict=False)) | named
        self._scores = None
        if not (self.training and torch.is_grad_enabled() and self.opened):
            return self.model(*positional, **named)
        return self._routed(read(arguments, self._engine.trunk.window), has_labels(arguments))

    def get_metrics(self) -> dict[str, Any]:
        """Figures of the last forward pass. Waits for the device."""
        figures: dict[str, Any] = {"step": self._steps, "routing_active": self._scores is not None}
        if self._scores is not None:
            figures |= means(self._scores)
        return figures

    @property
    def metrics(self) -> dict[str, Any]:
        """As get_metrics()."""
        return self.get_metrics()

    def _routed(self, request: Request, is_labelled: bool) -> CausalLMOutputWithPast:
        labels_BT = request.batch.labels_BT
        hidden_ND, back = self._engine.forward(request)
        self._calls += 1
        start = float(np.random.default_rng([self._seed, self._steps, self._calls]).random())
        opened = self.opened

        def way_back(gradient_ND: Tensor, sink: Sink) -> None:
            rows_N = torch.arange(len(gradient_ND), device=gradient_ND.device)
            back(rows_N, gradient_ND, sink, Depth(ranks_N, self.num_buckets, opened, self.leak_rate, start))

        routed_ND = detour(hidden_ND, way_back, self._engine.trainable())
        logits_NV = F.linear(routed_ND, self._engine.trunk.head_weight)
        ranks_N = self._ranks(logits_NV, labels_BT.flatten(), is_labelled)
        loss = None
        if is_labelled:
            loss_sum = F.cross_entropy(logits_NV.float(), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum")
            loss = loss_sum / request.divisor
        return CausalLMOutputWithPast(loss=loss, logits=logits_NV.view(*labels_BT.shape, -1))

    def _ranks(self, logits_NV: Tensor, labels_N: Tensor, is_labelled: bool) -> Tensor:
        """Of every token by difficulty, 0 the hardest; tokens known to have no label come last."""
        labelled_N = (labels_N != IGNORED) | (not is_labelled)
        self._scores = score(logits_NV, labels_N.where(labels_N != IGNORED, 0).where(labelled_N, IGNORED))
        return ranks(judge(GatingStrategy.DIFFICULTY, self._scores), labelled_N)
