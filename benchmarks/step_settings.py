"""The settings that benchmarks of a step share. Imports no large library."""

from dataclasses import dataclass
from typing import ClassVar

from circuit_breaking.runs.config import check_counts
from circuit_breaking.runs.settings import ComputeSettings


@dataclass
class StepSettings(ComputeSettings):
    """What a step is timed on, and how often."""

    TITLE: ClassVar[str] = "step"

    batch: int = 10  # texts per step
    length: int = 50  # tokens per text
    rounds: int = 5  # steps of each variant, which take turns; the median counts
    cut: int = 50  # edges that the binary mask cuts
    threads: int = 2  # CPU threads

    def check(self) -> None:
        check_counts(self, "batch", "length", "threads")
