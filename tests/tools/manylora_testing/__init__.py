"""Tools that tests share: tiny random models and adapters, and the oracle."""

from __future__ import annotations

from manylora_testing.adapters import tiny_lora
from manylora_testing.flat import FlatRunner, Stream
from manylora_testing.models import ARCHITECTURES, tiny_model
from manylora_testing.oracle import Oracle, peft_greedy, peft_logits

__all__ = [
    "ARCHITECTURES",
    "FlatRunner",
    "Oracle",
    "Stream",
    "peft_greedy",
    "peft_logits",
    "tiny_lora",
    "tiny_model",
]
