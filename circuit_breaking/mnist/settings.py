"""The settings that MNIST scripts share. Imports no large library."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from circuit_breaking.errors import UserError
from circuit_breaking.runs.config import option
from circuit_breaking.runs.files import DATA
from circuit_breaking.runs.settings import DeviceSettings, OutSettings, ResumeSettings

Source = Literal["auto", "idx", "hub", "digits"]
DEFAULT_FOLDER = DATA / "mnist"
POSITIVE = (
    "n_bad", "width", "train_steps", "train_batch_size", "train_lr", "steps", "n_keep", "finetune_lr", "batch_size",
    "lr", "evaluate_every",
)  # fmt: skip
NOT_NEGATIVE = (
    "threads", "ratio", "ratio_kept", "cap", "cap_kept", "shift", "sparsity", "ramp_steps", "round_every", "max_edges",
    "checkpoint_every",
)  # fmt: skip


@dataclass
class ImageSettings:
    """The images, and the behaviour to remove."""

    TITLE: ClassVar[str] = "data"

    data: Path = DEFAULT_FOLDER  # folder of the four IDX files, compressed (.gz) or not
    source: Source = "auto"  # auto: IDX files if there are any, else the hub, else scikit-learn's small digits
    transpose: bool = False  # swap the rows and columns of each image; needed for EMNIST's files
    target_class: int = 3  # class that the network should no longer put into its group
    n_bad: int = 30  # examples of target_class to learn from, taken from the test images


@dataclass
class NetworkSettings:
    """The network and its training."""

    TITLE: ClassVar[str] = "network"

    width: int = 50  # hidden units
    train_steps: int = 1800  # steps of the network's training
    train_batch_size: int = 512  # images per step
    train_lr: float = 8e-3  # highest learning rate of the one-cycle schedule


@dataclass
class ExperimentSettings(ImageSettings, NetworkSettings, DeviceSettings, OutSettings, ResumeSettings):
    """An experiment on a small network."""

    out: Path = DEFAULT_FOLDER
    seed: int = 0  # seed of the pairs of classes, the initial weights, the batches and the choice of examples
    threads: int = 1  # CPU threads; more are hardly faster, and much slower on shared cores; 0: torch's choice
    checkpoint_every: int = 200

    def check(self) -> None:
        """Refuse numbers that make no sense before any work is done."""
        for name in POSITIVE:
            if getattr(self, name, 1) <= 0:
                raise UserError(f"{option(name)} is {getattr(self, name)}; it must be positive.")
        for name in NOT_NEGATIVE:
            if getattr(self, name, 0) < 0:
                raise UserError(f"{option(name)} is {getattr(self, name)}; it cannot be negative.")
        if not self.run or self.run != self.run.strip("./ ") or "/" in self.run or "\\" in self.run:
            raise UserError(f"--run {self.run!r} is not a plain folder name; give the place with --out.")
