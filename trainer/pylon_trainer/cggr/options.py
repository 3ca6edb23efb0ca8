"""The published library's options as Pylon's gate has them. Unknown names raise ValueError before anything runs.

`dynamic_threshold` follows the gradient mass (gating/ratio.py) within min_tokens_ratio * (1 +- threshold_sensitivity),
so that, other than in the published library, an easy batch falls below min_tokens_ratio.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import ValidationError

from pylon_api.manifest import describe
from pylon_api.training import (
    GatingFallback,
    GatingSelection,
    GatingSpec,
    GatingStrategy,
    RatioControl,
)

SCORINGS = {
    "entropy": GatingStrategy.ENTROPY,
    "margin": GatingStrategy.MARGIN,
    "loss": GatingStrategy.LOSS,
    "combined": GatingStrategy.COMBINED,
    "difficulty": GatingStrategy.DIFFICULTY,
    "gradient_norm": GatingStrategy.GRADIENT_NORM,
    "random": GatingStrategy.RANDOM,
}

SELECTIONS = {
    "topk": GatingSelection.TOP,
    "fixed_quota": GatingSelection.TOP,
    "stratified": GatingSelection.STRATIFIED,
    "sequence_aware": GatingSelection.SEQUENCE_AWARE,
    "sampled": GatingSelection.SAMPLED,
}

Choice = TypeVar("Choice")


def chosen(field: str, value: str, choices: Mapping[str, Choice]) -> Choice:
    """The choice of that name. Raises ValueError that lists all."""
    if value not in choices:
        raise ValueError(f"{field}: {value!r} is unknown; choose one of {', '.join(choices)}")
    return choices[value]


def gating_of(
    *,
    scoring: str,
    selection: str,
    dynamic_threshold: bool,
    threshold_sensitivity: float,
    min_tokens_ratio: float,
    warmup_steps: int,
    num_strata: int = 4,
    sequence_share: float = 0.5,
) -> GatingSpec:
    """What the gate is asked for. Raises ValueError that names the field, the value and the fix."""
    follows = dynamic_threshold and selection != "fixed_quota"
    if not 0 <= threshold_sensitivity < 1:
        raise ValueError(f"threshold_sensitivity: {threshold_sensitivity} is not in [0, 1); 0 keeps the ratio fixed")
    if not 0 < min_tokens_ratio <= 1:
        raise ValueError(f"min_tokens_ratio: {min_tokens_ratio} is not in (0, 1]; 1 leaves no token out")
    if not 1 <= num_strata <= 64:
        raise ValueError(f"num_strata: {num_strata} is not in [1, 64]; 1 draws all tokens alike")
    strategy = chosen("scoring", scoring, SCORINGS)
    rule = chosen("selection", selection, SELECTIONS)
    if rule is GatingSelection.STRATIFIED and num_strata == 1:
        strategy = GatingStrategy.RANDOM  # in a single stratum no token is likelier than another
    try:
        return GatingSpec(
            strategy=strategy,
            selection=rule,
            strata=max(2, num_strata),
            sequence_share=sequence_share,
            ratio_control=RatioControl.GRADIENT_MASS if follows else RatioControl.FIXED,
            fallback=GatingFallback.NEVER,
            token_ratio=min_tokens_ratio,
            minimum_token_ratio=min_tokens_ratio * (1 - threshold_sensitivity) if follows else min_tokens_ratio,
            maximum_token_ratio=min(1.0, min_tokens_ratio * (1 + threshold_sensitivity)) if follows else 1.0,
            warmup_steps=warmup_steps,
        )
    except ValidationError as error:
        raise ValueError("; ".join(describe(error))) from error
