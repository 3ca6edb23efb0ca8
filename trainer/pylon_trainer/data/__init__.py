"""Data: from files in any store to batches of tokens."""

from pylon_trainer.data.training_data import TrainingData, open_data

__all__ = ["TrainingData", "open_data"]
