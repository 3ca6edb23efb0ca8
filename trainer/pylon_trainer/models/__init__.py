"""Networks, each built from a `ModelSpec`."""

from __future__ import annotations

from pylon_api.training import Architecture, ModelSpec
from pylon_trainer.errors import ConfigError
from pylon_trainer.models.decoder import Decoder
from pylon_trainer.models.resonate import Resonate
from pylon_trainer.models.transformer import Transformer

__all__ = ["Decoder", "Resonate", "Transformer", "build_model"]

ARCHITECTURES: dict[Architecture, type[Decoder]] = {
    Architecture.TRANSFORMER: Transformer,
    Architecture.RESONATE: Resonate,
}


def build_model(spec: ModelSpec, *, vocab_size: int) -> Decoder:
    """The network, initialised from torch's global random state, on the default device, in float32.

    vocab_size: ids that the tokenizer needs. spec.vocab_size may be larger (rows are then spare), never smaller:
    raises ConfigError.
    """
    if spec.vocab_size is not None and spec.vocab_size < vocab_size:
        raise ConfigError(
            f"training.model.vocabSize: {spec.vocab_size} is too small, the tokenizer has {vocab_size} tokens; "
            f"set at least {vocab_size} or leave it out"
        )
    if spec.embedding_rank >= spec.hidden_size:
        raise ConfigError(
            f"training.model.embeddingRank: {spec.embedding_rank} saves nothing at hiddenSize {spec.hidden_size}; "
            "set a smaller rank, or 0 for plain embeddings"
        )
    return ARCHITECTURES[spec.architecture](spec, spec.vocab_size or vocab_size)
