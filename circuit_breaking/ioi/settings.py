"""The settings that indirect-object scripts share, and the data that they read by default. Imports no large library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from circuit_breaking.runs.files import DATA
from circuit_breaking.runs.settings import OutSettings
from circuit_breaking.tasks.data import ordinary_text

FOLDER = DATA / "ioi"  # run folders, prompts and means
SETS = {"one": 1, "two": 2, "all": None}  # sets of prompts, and how many templates each is made from


def prompts_of(model: str, name: str, part: str, abc: bool = False) -> Path:
    """The file of a set ("one", "two", "all") and part ("train", "test") of a model's prompts."""
    return FOLDER / "prompts" / Path(model).name / f"{name}{'_abc' * abc}_{part}.jsonl"


def default_data(model: str, prompts: str) -> dict[str, Any]:
    """Data settings for a model and a set of prompts, where settings leave them None."""
    return {
        "train": prompts_of(model, prompts, "train"),
        "test": prompts_of(model, prompts, "test"),
        "ordinary": ordinary_text(model),
    }


@dataclass
class PromptSettings:
    """The prompts and texts of an experiment."""

    TITLE: ClassVar[str] = "data"

    prompts: Literal["one", "two", "all"] = "all"  # set of prompts of make_ioi_datasets.py, by its number of templates
    train: Path | None = None  # training prompts, JSON Lines; None: those of the set
    test: Path | None = None  # held-out prompts, JSON Lines; None: those of the set
    ordinary: str | None = None  # tiny, a text file or a data set of the hub; None: tiny or NeelNanda/pile-10k
    length: int = 50  # tokens of an ordinary text that are used; the rest is cut off


@dataclass
class IOIRunSettings(OutSettings):
    """The run folder of an experiment on indirect objects."""

    out: Path = FOLDER
