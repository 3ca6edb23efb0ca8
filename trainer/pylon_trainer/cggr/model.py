"""CGGRModel: a causal language model that spends its training on the hard part of each batch.

By sequences, a truncated router scores all of them and the model runs, forward and backward, on the chosen ones alone.
By tokens, the model runs on all and goes back from the chosen tokens (huggingface/gated.py). A batch of one sequence is
thinned by tokens in both, as there is nothing to choose among; whole, where tokens cannot be chosen, as with dropout.

Shapes: B sequences, T tokens, K chosen sequences, D hidden width; S tokens that the router looks at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.generic import TransformersKwargs

from pylon_api.training import GatingEngine, GatingSelection
from pylon_trainer.cggr.counter import CountingModule
from pylon_trainer.cggr.metrics import Metrics
from pylon_trainer.cggr.options import chosen, gating_of
from pylon_trainer.cggr.router import TruncatedRouter, create_truncated_router
from pylon_trainer.errors import ConfigError
from pylon_trainer.gating.gate import Gate, build_gate
from pylon_trainer.gating.ratio import PLAIN
from pylon_trainer.gating.scores import judge
from pylon_trainer.gating.selection import all_rows
from pylon_trainer.huggingface.detour import Collect, detour
from pylon_trainer.huggingface.families import check, check_ends, family_of, layers_of
from pylon_trainer.huggingface.gated import GatedModel
from pylon_trainer.huggingface.request import divisor_of
from pylon_trainer.kernels import head
from pylon_trainer.kernels.score import Scores, score
from pylon_trainer.step import IGNORED

ROUTER_STRIDE = 4
"""The router scores every fourth token: a mean over them ranks sequences as well, and its head costs a quarter."""

GRANULARITIES = {"token": "token", "sequence": "sequence"}


class CGGRModel(CountingModule):
    """A model with its gate. Call `step()` after `optimizer.step()`.

    model: of a supported Hugging Face family. router: None for its lowest quarter; or a TruncatedRouter, or a callable
    that gives logits B x T x V or an object with `logits`. The other arguments are as CGGRLoss has them.

    Raises ValueError for names and numbers that cannot be, ConfigError for a model that is not supported.
    """

    def __init__(
        self,
        model: Any,
        router: Callable[..., Any] | None = None,
        min_tokens_ratio: float = 0.25,
        warmup_steps: int = 1000,
        dynamic_threshold: bool = True,
        threshold_sensitivity: float = 0.5,
        selection: str = "topk",
        *,
        granularity: str = "sequence",
        scoring: str = "gradient_norm",
        seed: int = 0,
    ) -> None:
        super().__init__()
        gating = gating_of(
            scoring=scoring,
            selection=selection,
            dynamic_threshold=dynamic_threshold,
            threshold_sensitivity=threshold_sensitivity,
            min_tokens_ratio=min_tokens_ratio,
            warmup_steps=warmup_steps,
        )
        self.granularity = chosen("granularity", granularity, GRANULARITIES)
        self.model = model
        self.selection, self.scoring = selection, scoring
        self._gating = gating
        self._body = family_of(model).body
        layers = len(layers_of(model, family_of(model)))
        # In a tuple, where torch does not look for modules: a router owns nothing of its own.
        self._router = (router or create_truncated_router(model, max(1, layers // 4)),)
        self._seed = seed
        self._metrics: Metrics | None = None
        names = inspect.signature(type(model).forward).parameters.keys() | TransformersKwargs.__annotations__.keys()
        self._argument_names = names - {"self", "kwargs"}
        (check if self.granularity == "token" else check_ends)(model)

    @cached_property
    def _by_tokens(self) -> GatedModel:
        gating = self._gating.model_copy(update={"engine": GatingEngine.SINGLE_PASS})
        return GatedModel(self.model, gating, self._seed)

    @cached_property
    def _can_choose_tokens(self) -> bool:
        try:
            check(self.model)
        except ConfigError:
            return False
        return True

    @cached_property
    def _gate(self) -> Gate:
        """Built when it is first asked, as the model may move to another device before."""
        return build_gate(self._gating, seed=self._seed, device=self.model.device)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **arguments: Any) -> Any:
        """The loss, a scalar; without labels the model's own output.

        labels: B x T, not shifted, -100 for none. arguments: the model's own; those with one entry per sequence follow
        the chosen sequences. In evaluation mode the loss is that of all tokens.

        Raises ValueError when shapes do not fit, ConfigError for arguments that the model does not have.
        """
        unknown = sorted(arguments.keys() - self._argument_names)
        if unknown:
            raise ConfigError(f"{unknown[0]}: {type(self.model).__name__} takes no such argument; leave it out")
        if labels is None:
            return self.model(input_ids, **arguments)
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels {tuple(labels.shape)} must have the shape of input_ids {tuple(input_ids.shape)}")
        if not self.training:
            return self.model(input_ids, labels=labels, **arguments).loss
        if self.granularity == "token" or (len(input_ids) == 1 and self._can_choose_tokens):
            return self._loss_by_tokens(input_ids, labels, arguments)
        return self._loss_by_sequences(input_ids, labels, arguments)

    def get_metrics(self) -> dict[str, Any]:
        """Figures of the last gated forward pass, {} before it. Waits for the device, which forward does not."""
        return {} if self._metrics is None else self._metrics.read()

    @property
    def metrics(self) -> dict[str, Any]:
        """As get_metrics()."""
        return self.get_metrics()

    def _loss_by_tokens(self, input_ids: Tensor, labels_BT: Tensor, arguments: dict[str, Any]) -> Tensor:
        gated = self._by_tokens
        gated.step = self._steps
        loss: Tensor = gated.forward(input_ids=input_ids, labels=labels_BT, **arguments).loss
        if gated.last is not None:
            scores, selection = gated.last
            selected_K = selection.weights_K > 0
            self._metrics = Metrics(
                self._steps, gated.report().ratio, selected_K, _shifted(labels_BT).flatten(), scores
            )
        return loss

    def _loss_by_sequences(self, input_ids: Tensor, labels_BT: Tensor, arguments: dict[str, Any]) -> Tensor:
        ratio = self._gate.begin(self._steps)
        if ratio == PLAIN and not self._gate.needs_scores:
            loss: Tensor = self.model(input_ids, labels=labels_BT, **arguments).loss
            return loss
        items = arguments.pop("num_items_in_batch", None)
        labels_BT = _shifted(labels_BT)
        labelled_BT = labels_BT != IGNORED
        scores, scores_B, norms_B = self._score(input_ids, labels_BT, arguments)
        labelled_1B = labelled_BT.any(1).unsqueeze(0)
        self._gate.count_nonfinite(scores.nonfinite_rows)
        self._gate.observe(scores_B, norms_B, labelled_1B, scores.nonfinite_rows)
        if ratio == PLAIN:
            rows_K, weights_K = all_rows(labelled_1B)
        else:
            rows_K, weights_K = self._gate.choose(scores_B, labelled_1B, ratio, self._gate.draw())
        self._metrics = Metrics(self._steps, ratio, labelled_BT[rows_K], labels_BT, scores)
        weighted_sum = self._run(rows_K, weights_K, input_ids, labels_BT, arguments)
        is_biased = self._gating.selection is GatingSelection.TOP
        return weighted_sum / divisor_of(items, labelled_BT[rows_K] if is_biased else labelled_BT)

    @torch.no_grad()
    def _score(self, input_ids: Tensor, labels_BT: Tensor, arguments: dict[str, Any]) -> tuple[Scores, Tensor, Tensor]:
        """Scores of the tokens looked at, and of every sequence the mean of its score and the root mean square of its
        gradient norm."""
        router: Any = self._router[0]
        looked_BS = _looked_at(labels_BT != IGNORED)
        labels_BS = labels_BT.gather(1, looked_BS)
        fused = isinstance(router, TruncatedRouter)
        x_BTX = router.hidden(input_ids, **arguments) if fused else _logits(router(input_ids, **arguments))
        x_NX = x_BTX.gather(1, looked_BS.unsqueeze(-1).expand(-1, -1, x_BTX.shape[-1])).flatten(0, 1)
        labels_N = labels_BS.flatten()
        scores = head.score(x_NX, router.head_weight, labels_N) if fused else score(x_NX, labels_N)

        def mean(figures_N: Tensor) -> Tensor:
            labelled_BS = labels_BS != IGNORED
            figures_BS = torch.where(labelled_BS, figures_N.view_as(labels_BS), 0.0)
            return figures_BS.sum(1) / labelled_BS.sum(1).clamp_min(1)

        scores_B, squares_B = mean(judge(self._gating.strategy, scores)), mean(scores.gradient_norm_N.square())
        return scores, scores_B, squares_B.sqrt()

    def _run(
        self, rows_K: Tensor, weights_K: Tensor, input_ids: Tensor, labels_BT: Tensor, arguments: dict[str, Any]
    ) -> Tensor:
        """Weighted sum of the chosen sequences' losses; the logits of none of them are written."""
        sequences = len(input_ids)
        theirs = {
            name: x[rows_K] if isinstance(x, Tensor) and x.ndim and len(x) == sequences else x
            for name, x in arguments.items()
        }
        body = getattr(self.model, self._body)
        hidden_KTD = body(input_ids[rows_K], **{"use_cache": False, **theirs}).last_hidden_state
        labels_N = labels_BT[rows_K].flatten()
        return _weighted_loss(
            hidden_KTD.flatten(0, 1),
            self.model.get_output_embeddings().weight,
            labels_N,
            weights_K.repeat_interleave(labels_BT.shape[1]),
        )


def _weighted_loss(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, weights_N: Tensor) -> Tensor:
    """Weighted sum of the rows' losses, with the gradients of hidden states and weight, from one look at the logits."""
    found = head.loss_gradients(hidden_ND, weight_VD, labels_N, weights_N, wants_weight=weight_VD.requires_grad)

    def way_back(gradient: Tensor, collect: Collect) -> None:
        def keep(x: Tensor, d_x: Tensor) -> None:
            # As in huggingface/gated.py: a logit that is no number adds nothing.
            collect(x, torch.where(found.nonfinite_rows == 0, d_x * gradient, 0))

        keep(hidden_ND, found.d_hidden_KH)
        if found.d_weight_VH is not None:
            keep(weight_VD, found.d_weight_VH)

    return detour(weights_N @ found.losses_K, way_back, [hidden_ND, weight_VD])


def _shifted(labels_BT: Tensor) -> Tensor:
    """Each token's label is the next one."""
    return F.pad(labels_BT, (0, 1), value=IGNORED)[:, 1:]


def _looked_at(labelled_BT: Tensor) -> Tensor:
    """Places B x S that the router scores: every fourth, but labelled ones before others."""
    tokens = labelled_BT.shape[1]
    is_on_stride_T = torch.arange(tokens, device=labelled_BT.device) % ROUTER_STRIDE == 0
    priority_BT = 2 * labelled_BT.int() + is_on_stride_T
    return priority_BT.argsort(dim=1, descending=True, stable=True)[:, : -(-tokens // ROUTER_STRIDE)]


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
