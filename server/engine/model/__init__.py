"""The base model: Hugging Face's module tree, adapted to per-row edits of a flat batch."""

from __future__ import annotations

from manylora.server.engine.model.adapted import AdaptedModel
from manylora.server.engine.model.encoder import EncoderInputs, EncoderModel
from manylora.server.engine.model.load import load_base, load_model
from manylora.server.engine.model.step import StepInputs, VirtualRows
from manylora.server.engine.model.task_view import PooledModel

__all__ = [
    "AdaptedModel",
    "EncoderInputs",
    "EncoderModel",
    "PooledModel",
    "StepInputs",
    "VirtualRows",
    "load_base",
    "load_model",
]
