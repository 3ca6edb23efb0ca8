"""What resonate_quality.py compares: architectures of about equal size, and Resonate with one part changed at a time.

An ablation is a line in VARIANTS: the fields of `model.resonate` or of `optimizer` by which it differs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from resonate_throughput import Mamba2

from pylon_api.training import ModelSpec, OptimizerSpec
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
    """What differs from the architecture as such; empty: nothing."""
    resonate: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Peak learning rates of which the best is taken."""

    @property
    def name(self) -> str:
        """`resonate`, or `resonate: attention`."""
        return f"{self.architecture}: {self.ablation}" if self.ablation else self.architecture

    def spec(self, shape: Shape) -> ModelSpec:
        """The network. `middle` stands for the number of the middle layer."""
        fields = shape.model | {"layers": (layers := shape.layers[self.architecture])}
        if self.architecture != "transformer":
            own = {key: layers // 2 + 1 if value == MIDDLE else value for key, value in self.resonate.items()}
            fields |= {"architecture": "Resonate", "resonate": own}
        return ModelSpec.model_validate(fields)

    def build(self, shape: Shape, vocabulary: int) -> Decoder:
        """Fresh weights, from torch's generator as it stands."""
        spec = self.spec(shape)
        return Mamba2(spec, vocabulary) if self.architecture == "mamba2" else build_model(spec, vocab_size=vocabulary)

    def optimizer_spec(self) -> OptimizerSpec:
        """AdamW where the variant does not say otherwise."""
        return OptimizerSpec.model_validate(self.optimizer)


MIDDLE = "middle"
"""As a period of layers: just the one in the middle."""
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("transformer"),
        Variant("mamba2"),
        Variant("resonate"),
        Variant("resonate", "attention", {"attention_every": MIDDLE}),
        Variant("resonate", "long convolution", {"long_convolution_every": MIDDLE}),
    )
}
CORE = ("transformer", "mamba2", "resonate", "resonate: attention")
"""Mamba-2 as published has no MLP; one attention layer is the trunk's own share."""
