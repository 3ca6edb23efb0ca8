"""What resonate_quality.py compares: architectures of about equal size, and Resonate with one part changed at a time.

An ablation is a line in VARIANTS: the fields of `model.resonate` by which it differs, or its optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from quality_runs import Strategy
from resonate_throughput import Mamba2

from pylon_api.training import ModelSpec, OptimizerName, OptimizerSpec
from pylon_trainer.models import Decoder, build_model


@dataclass(frozen=True)
class Shape:
    """Widths that all architectures share, and layers that give each about as many parameters as the others."""

    model: dict[str, Any]
    layers: dict[str, int]


LARGE = Shape({"hidden_size": 512, "heads": 8}, {"transformer": 8, "mamba2": 16, "resonate": 7})
"""30 million parameters with 8192 tokens in the vocabulary."""
SMALL = Shape({"hidden_size": 64, "heads": 4}, {"transformer": 2, "mamba2": 4, "resonate": 2})


@dataclass(frozen=True)
class Variant:
    """One column of the comparison."""

    architecture: str
    ablation: str = ""
    """What differs from a trunk that never attends; empty: nothing."""
    resonate: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "AdamW"
    rates: tuple[float, ...] = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    """Peak learning rates, ascending, among which the best is looked for from the middle on."""

    @property
    def name(self) -> str:
        """`resonate`, or `resonate: attention`."""
        return f"{self.architecture}: {self.ablation}" if self.ablation else self.architecture

    @property
    def strategy(self) -> Strategy:
        """Plain steps and the optimizer."""
        return Strategy("plain", optimizer=OptimizerSpec(name=OptimizerName(self.optimizer)))

    def build(self, shape: Shape, vocabulary: int) -> Decoder:
        """Fresh weights, from torch's generator as it stands."""
        fields = shape.model | {"layers": shape.layers[self.architecture]}
        if self.architecture != "transformer":
            fields |= {"architecture": "Resonate", "resonate": {"attention_every": 0} | self.resonate}
        spec = ModelSpec.model_validate(fields)
        return Mamba2(spec, vocabulary) if self.architecture == "mamba2" else build_model(spec, vocab_size=vocabulary)


def _adapted(**fields: Any) -> dict[str, Any]:
    """Adapted layers of a rank that stays."""
    return {"adaptation": {"rank": 32, "grow_every_steps": 0} | fields}


MUON_RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)

VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("transformer"),
        Variant("transformer", "Muon", optimizer="Muon", rates=MUON_RATES),
        Variant("mamba2"),
        Variant("resonate"),
        Variant("resonate", "attention", {"attention_every": 8}),
        Variant("resonate", "long convolution", {"long_convolution_every": 4}),
        Variant("resonate", "Binlop", {"activation": "Binlop"}),
        Variant("resonate", "Gelu", {"activation": "Gelu"}),
        Variant("resonate", "Relu", {"activation": "Relu"}),
        Variant("resonate", "low rank, no base", _adapted(base="Zero")),
        Variant("resonate", "low rank, seeded base", _adapted(base="Seed")),
        Variant("resonate", "low rank 8, seeded base", _adapted(base="Seed", rank=8)),
        *(
            Variant(
                "resonate",
                f"low rank, seeded base, codebook{ending}",
                _adapted(base="Seed", codebook={"top_k": top_k, "revive_every_steps": 0}),
            )
            for top_k, ending in ((4, ""), (1, " with top 1"), (16, " with top 16"))
        ),
        Variant("resonate", "control", {"control": {}}),
        Variant("resonate", "norm limit", {"stability": {}}),
        Variant("resonate", "Muon", optimizer="Muon", rates=MUON_RATES),
        Variant("resonate", "attention, Muon", {"attention_every": 8}, optimizer="Muon", rates=MUON_RATES),
        Variant("resonate", "Lion", optimizer="Lion", rates=(5e-5, 1e-4, 2e-4, 4e-4, 8e-4)),
        Variant("resonate", "Adafactor", optimizer="Adafactor", rates=(1e-2, 2e-2, 4e-2, 8e-2)),
    )
}
CORE = (
    *("transformer", "mamba2", "resonate", "resonate: attention"),
    *("transformer: Muon", "resonate: Muon", "resonate: attention, Muon"),
)
"""Mamba-2 as published has no MLP. The rest are ablations: each trains what it would in a job, but for the schedules by
which ranks grow and atoms are revived, which need more steps than these runs have."""
