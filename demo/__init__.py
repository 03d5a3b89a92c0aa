"""`manylora demo`: `run_demo(DemoSettings())` is all of it. Needs the extras `train` and `gguf`."""

from manylora.demo.run import DemoResult, run_demo
from manylora.demo.settings import DemoSettings

__all__ = ["DemoResult", "DemoSettings", "run_demo"]
