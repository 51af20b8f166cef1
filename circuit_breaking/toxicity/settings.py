"""The settings that toxicity scripts share, and the data that they read by default. Imports no large library."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.models.shipped import SHIPPED, TEXT
from circuit_breaking.runs.config import resolve_defaults
from circuit_breaking.runs.files import DATA, require_file
from circuit_breaking.runs.settings import OrdinaryTextSettings, OutSettings, SeedSettings
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


def default_constants(model: str, means: Path | None) -> dict[str, Any]:
    """Whether and how ablation constants are learned for a model, if its settings do not say.

    Cuts alone break the behaviour of the shipped model, but hardly that of SmolLM2 (docs/experiments.md), where learned
    constants do. So these are the default for other models, unless `means` says what cut edges carry.
    """
    if model == SHIPPED:
        return {"constants_lr": 0.0, "constants_loss": "keep"}
    return {"constants_lr": 0.0 if means is not None else 0.02, "constants_loss": "objective"}


@dataclass
class TrainingTextSettings(OrdinaryTextSettings):
    """The texts to learn from."""

    TITLE: ClassVar[str] = "data"

    toxic_train: Path | None = None  # toxic training texts, JSON Lines; None: shipped (tiny) or posts/train.jsonl


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


@dataclass
class PostSettings(SeedSettings):
    """Which posts are drawn from the dump."""

    TITLE: ClassVar[str] = "posts"

    dump: Path = FOLDER / "pol_0616-1119_labeled.tar.zst"  # the dump, or any file of its format
    n_train: int = 400  # posts to train on (the paper takes 100)
    n_test: int = 200  # held-out posts of the same toxicity
    band: tuple[float, float] = (0.9, 1.0)  # range of their toxicity, with the first number and without the second
    n_uniform: int = 1000  # posts spread evenly over toxicity, rounded down to a multiple of n_bins
    n_bins: int = 10  # bins of [0, 1] that get equally many of them
    min_characters: int = 10  # shortest text that is used
    max_posts: int = 0  # stop after the thread in which this many posts have been read; 0: read all
    seed: int = 0  # seed of the sample

    def check(self) -> None:
        """Refuse settings that make no sense, before an hour of reading."""
        low, high = self.band
        if not 0 <= low < high <= 1:
            raise UserError(f"band {low} {high} is no stretch of [0, 1]; give two rising numbers such as --band 0.9 1.")
        for name in ("n_train", "n_test", "n_uniform", "max_posts"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; give 0 or more.")
        if self.n_train + self.n_test + self.n_uniform == 0:
            raise UserError("n_train, n_test and n_uniform are all 0: nothing to draw. Set one of them.")
        if not 1 <= self.n_bins <= 1000:
            raise UserError(f"n_bins is {self.n_bins}; give 1 to 1000.")
        if 0 < self.n_uniform < self.n_bins:
            raise UserError(f"n_uniform {self.n_uniform} is fewer than one post for each of {self.n_bins} bins.")
