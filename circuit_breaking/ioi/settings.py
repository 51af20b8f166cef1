"""The settings that the scripts of `ioi/` share, and the data that they read by default. Imports no large library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from circuit_breaking.errors import UserError
from circuit_breaking.runs.config import check_ablate_from, check_choice, check_counts, resolve_defaults
from circuit_breaking.runs.files import DATA, require_file
from circuit_breaking.runs.settings import (
    AblateFromSettings,
    ModelSettings,
    OffloadSettings,
    OrdinaryTextSettings,
    OutSettings,
)
from circuit_breaking.tasks.data import PROMPTS_HINT, ordinary_text
from circuit_breaking.tasks.registry import IOI, PROMPT_TASKS
from circuit_breaking.training.config import MaskConfig, check_mask

FOLDER = DATA / "ioi"  # run folders, prompts and means
SETS = {"one": 1, "two": 2, "all": None}  # sets of prompts, and how many templates each is made from


def prompts_of(model: str, name: str, part: str, abc: bool = False) -> Path:
    """The file of a set ("one", "two", "all") and part ("train", "test") of a model's prompts."""
    return FOLDER / "prompts" / Path(model).name / f"{name}{'_abc' * abc}_{part}.jsonl"


def default_data(model: str, prompts: str, task: str = IOI) -> dict[str, Any]:
    """Data settings for a model and a set of prompts, where settings leave them None. Other tasks read no files."""
    files = {part: prompts_of(model, prompts, part) for part in ("train", "test")} if task == IOI else {}
    return {**files, "ordinary": ordinary_text(model)}


@dataclass
class PromptSettings(OrdinaryTextSettings):
    """The prompts and texts of an experiment."""

    TITLE: ClassVar[str] = "data"

    task: Literal[tuple(PROMPT_TASKS)] = "ioi"  # behaviour (docs/tasks.md); prompts of all but ioi are generated
    prompts: Literal["one", "two", "all"] = "all"  # ioi: prompts of make_ioi_datasets.py, by number of templates
    train: Path | None = None  # ioi: training prompts, JSON Lines; None: those of the set
    test: Path | None = None  # ioi: held-out prompts, JSON Lines; None: those of the set
    length: int = 50  # tokens of an ordinary text that are used; the rest is cut off


@dataclass
class IOIRunSettings(OutSettings):
    """The run folder of an experiment on prompts."""

    out: Path = FOLDER


@dataclass
class ObjectiveSettings:
    """What breaking the behaviour means."""

    TITLE: ClassVar[str] = "mask training"

    objective: Literal["logit_difference", "cross_entropy"] = "logit_difference"  # loss that training worsens
    break_cap: float = 1.0  # cap on the loss of one prompt, so that none dominates; give more for cross_entropy
    alpha: float = 0.2  # weight of the loss on prompts, which training raises; the ordinary loss has weight 1


@dataclass
class IOIMaskSettings(
    ObjectiveSettings, MaskConfig, PromptSettings, ModelSettings, OffloadSettings, AblateFromSettings, IOIRunSettings
):
    """A mask against a behaviour on prompts."""

    means: Path | None = None  # file of ablation values from compute_means.py; None: zero
    resample: bool = False  # cut edges carry outputs on the counterfactual of each prompt; ordinary text has means
    max_edges: int = 10  # most edges that the mask cuts
    split_qkv: bool = False  # give the query, key and value of a head separate edges
    num_test: int = 400  # held-out prompts and texts that are measured

    def check(self) -> None:
        check_mask(self)
        check_counts(self, "num_test", "length")
        check_ablate_from(self)
        if self.resample and self.constants_lr:
            raise UserError(
                "constants_lr learns ablation constants, and with resample the cut edges of a prompt carry outputs on "
                "its counterfactual. Leave one of them out."
            )
        require_prompts(self)


def require_prompts(settings: Any) -> None:
    """Raise a `UserError` if a file of prompts that these settings name, or mean by None, is not there."""
    check_choice("task", settings.task, PROMPT_TASKS)
    if settings.task != IOI:
        if named := [name for name in ("train", "test") if getattr(settings, name) is not None]:
            raise UserError(f"prompts of the task {settings.task} are generated. Leave {' and '.join(named)} out.")
        return
    settings = resolve_defaults(settings, default_data(settings.model, settings.prompts))
    for name in ("train", "test"):
        require_file(getattr(settings, name), PROMPTS_HINT)
