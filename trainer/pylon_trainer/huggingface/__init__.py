"""Confidence-gated gradients for Hugging Face: one line before `trainer.train()`.

    import pylon_trainer.huggingface as pylon

    gated = pylon.enable(trainer, target_mass=0.9)

Works on Llama, Mistral, Qwen2, Qwen3 and GPT-2, alone, under transformers.Trainer and under TRL's SFTTrainer, with or
without PEFT adapters. Whatever a gated step would compute differently from the model is refused by name.
"""

try:
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "pylon_trainer.huggingface needs transformers: pip install 'pylon-training[huggingface]'"
    ) from error

from pylon_trainer.huggingface.patch import disable, enable

__all__ = ["disable", "enable"]
