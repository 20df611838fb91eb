"""Run from the repository's root: python -m benchmarks.core, then python -m benchmarks.tables."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "examples"))
