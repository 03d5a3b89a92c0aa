"""The base model: Hugging Face's module tree, adapted to per-row edits and paged attention."""

from __future__ import annotations

from manylora.server.engine.model.adapted import AdaptedModel
from manylora.server.engine.model.load import load_model
from manylora.server.engine.model.step import StepInputs

__all__ = ["AdaptedModel", "StepInputs", "load_model"]
