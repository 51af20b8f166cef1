"""Blocks of settings that scripts share: a script's `Settings` inherits those that it needs.

Each setting is written down once, with its comment. A script that wants another default gives that alone, without a
comment. `TITLE` is the heading of a block in `--help`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from circuit_breaking.runs.files import DATA


@dataclass
class DeviceSettings:
    """Where the script computes."""

    TITLE: ClassVar[str] = "model"

    device: str = "auto"  # auto (a GPU if there is one), cpu, cuda or mps


@dataclass
class ComputeSettings(DeviceSettings):
    """Where and in which type the script computes."""

    dtype: str = "float32"  # type of the weights and of the computation: float32 or bfloat16


@dataclass
class Float32ModelSettings(DeviceSettings):
    """A model that computes in float32."""

    model: str = "tiny"  # tiny (the shipped model), a name on the Hugging Face hub, a folder or a .gguf file


@dataclass
class ModelSettings(Float32ModelSettings, ComputeSettings):
    """A model, where it computes and in which type."""


@dataclass
class OffloadSettings:
    """Where the weights of a large model are kept."""

    TITLE: ClassVar[str] = "model"

    offload: bool = False  # keep layers in CPU memory and copy them to the GPU one at a time: less GPU memory, slower
    device_map: tuple[str, ...] = ()  # GPUs to spread the layers over, in place of device: auto (all), or cuda:0 cuda:1


@dataclass
class AblateFromSettings:
    """Where in a text cuts act."""

    TITLE: ClassVar[str] = "model"

    ablate_from: int = 1  # first position at which cuts act; 1 leaves the first token alone, an attention sink


@dataclass
class OrdinaryTextSettings:
    """The ordinary text, which the model should still predict."""

    TITLE: ClassVar[str] = "data"

    ordinary: str | None = None  # ordinary text: tiny, a text, JSONL or CSV file, or a hub name; None: tiny or pile-10k
    text_column: str = "text"  # column that holds the ordinary text, where a file or data set has columns


@dataclass
class OutSettings:
    """The run folder."""

    TITLE: ClassVar[str] = "run"

    run: str = "run"  # name of the run folder, in the folder out
    out: Path = DATA  # folder that holds the run folders


@dataclass
class SeedSettings:
    """The source of every random choice."""

    TITLE: ClassVar[str] = "run"

    seed: int = 0  # seed of every random choice


@dataclass
class ResumeSettings(SeedSettings):
    """Checkpoints."""

    resume: bool = True  # continue from the checkpoint of a run with the same settings, data and code, if there is one
    checkpoint_every: int = 50  # steps between checkpoints; 0: one at the end, and one when SIGTERM or SIGUSR1 arrives


@dataclass
class TrackingSettings:
    """Where the rows of metrics.jsonl go as well."""

    TITLE: ClassVar[str] = "run"

    log_with: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # tool that also gets the rows of each step
