"""Makes `manylora_testing` (tests/tools) importable. Not the repository's root: see STYLE."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tools"))
