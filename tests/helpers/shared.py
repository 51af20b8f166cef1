"""Real inputs, where a checkout has them beside it."""

from pathlib import Path

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
