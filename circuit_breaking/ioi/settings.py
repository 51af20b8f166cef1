"""The settings that indirect-object scripts share, and the data that they read by default. Imports no large library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.files import DATA, require_file
from circuit_breaking.runs.settings import ModelSettings, OrdinaryTextSettings, OutSettings
from circuit_breaking.tasks.data import PROMPTS_HINT, ordinary_text
from circuit_breaking.training.config import MaskConfig, check_mask

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
class PromptSettings(OrdinaryTextSettings):
    """The prompts and texts of an experiment."""

    TITLE: ClassVar[str] = "data"

    prompts: Literal["one", "two", "all"] = "all"  # set of prompts of make_ioi_datasets.py, by its number of templates
    train: Path | None = None  # training prompts, JSON Lines; None: those of the set
    test: Path | None = None  # held-out prompts, JSON Lines; None: those of the set
    length: int = 50  # tokens of an ordinary text that are used; the rest is cut off


@dataclass
class IOIRunSettings(OutSettings):
    """The run folder of an experiment on indirect objects."""

    out: Path = FOLDER


@dataclass
class ObjectiveSettings:
    """What breaking the behaviour means."""

    TITLE: ClassVar[str] = "mask training"

    objective: Literal["logit_difference", "cross_entropy"] = "logit_difference"  # loss that training worsens
    break_cap: float = 1.0  # cap on the loss of one prompt, so that none dominates; give more for cross_entropy
    alpha: float = 0.2  # weight of the indirect-object loss, which training raises; the ordinary loss has weight 1


@dataclass
class IOIMaskSettings(ObjectiveSettings, MaskConfig, PromptSettings, ModelSettings, IOIRunSettings):
    """A mask against indirect objects."""

    means: Path | None = None  # file of ablation values from compute_means.py; None: zero
    max_edges: int = 10  # most edges that the mask cuts
    split_qkv: bool = False  # give the query, key and value of a head separate edges
    num_test: int = 400  # held-out prompts and texts that are measured

    def check(self) -> None:
        check_mask(self)
        check_counts(self, "num_test", "length")
        require_prompts(self)


def require_prompts(settings: Any) -> None:
    """Raise a `UserError` if a file of prompts that these settings name, or mean by None, is not there."""
    settings = resolve_defaults(settings, default_data(settings.model, settings.prompts))
    for name in ("train", "test"):
        require_file(getattr(settings, name), PROMPTS_HINT)
