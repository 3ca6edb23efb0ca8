"""Data: from files in any store to batches of tokens."""

from pylon_trainer.data.training_data import TrainingData, merge_states, open_data

__all__ = ["TrainingData", "merge_states", "open_data"]
