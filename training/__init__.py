"""Makes adapters with peft and transformers' Trainer, in the very format that is served.

`train(TrainSettings(...))` is all of it. Needs the extra `train`.
"""

from manylora.training.settings import TrainSettings
from manylora.training.train import TrainResult, train

__all__ = ["TrainResult", "TrainSettings", "train"]
