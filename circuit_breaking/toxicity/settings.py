"""The settings that toxicity scripts share, and the data that they read by default. Imports no large library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from circuit_breaking.models.shipped import SHIPPED, TEXT
from circuit_breaking.runs.config import resolve_defaults
from circuit_breaking.runs.files import DATA, require_file
from circuit_breaking.runs.settings import OutSettings
from circuit_breaking.tasks.data import TOXIC_HINT, ordinary_text

FOLDER = DATA / "toxicity"  # run folders, posts and means
POSTS = FOLDER / "posts"  # what toxicity/toxic_data_for_eval.py writes


def default_data(model: str) -> dict[str, Any]:
    """Data settings for a model: the shipped texts for the shipped model, posts and a hub data set for any other."""
    if model == SHIPPED:
        files = {
            "toxic_train": TEXT / "toxic_train.jsonl",
            "toxic_test": TEXT / "toxic_test.jsonl",
            "ordinary_prompts": TEXT / "neutral_prompts.jsonl",
        }
    else:
        files = {"toxic_train": POSTS / "train.jsonl", "toxic_test": POSTS / "test.jsonl"}
    return {**files, "ordinary": ordinary_text(model)}


@dataclass
class TrainingTextSettings:
    """The texts to learn from."""

    TITLE: ClassVar[str] = "data"

    toxic_train: Path | None = None  # toxic training texts, JSON Lines; None: shipped (tiny) or posts/train.jsonl
    ordinary: str | None = None  # tiny, a text file or a data set of the hub; None: tiny or NeelNanda/pile-10k


@dataclass
class ToxicTextSettings(TrainingTextSettings):
    """The texts to learn from and to measure with."""

    toxic_test: Path | None = None  # held-out toxic texts, JSON Lines; None: shipped (tiny) or posts/test.jsonl


@dataclass
class ToxicDataSettings(ToxicTextSettings):
    """These texts, and how much of each is used."""

    length: int = 50  # tokens of a text that are used; the rest is cut off


@dataclass
class ToxicRunSettings(OutSettings):
    """The run folder of an experiment on toxic text."""

    out: Path = FOLDER


def require_data(settings: Any) -> None:
    """Raise a `UserError` if a toxic file that these settings name, or mean by None, is not there."""
    settings = resolve_defaults(settings, default_data(settings.model))
    for name in ("toxic_train", "toxic_test"):
        require_file(getattr(settings, name), TOXIC_HINT)
