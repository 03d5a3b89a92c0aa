"""manylora: one resident base model, thousands of hot-loaded adapters, one batch."""

__version__ = "0.1.0"
