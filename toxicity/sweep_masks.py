"""Train masks at several budgets of edges, with several ablation values and seeds, and draw random ones.

Reads   a model; toxic posts and ordinary text, the same parts that finetune_gpt2.py trains on.
Writes  data/toxicity/<run>/masks/<ablation>_<budget>[_seed<n>]/: mask.safetensors, edges.json, metrics.jsonl,
        cost.json; means.safetensors, if ablation values are learned. random_<ablation>_<budget>_seed<n>/, without
        metrics: as many edges, drawn at random, as the mask of that budget cuts. means_<texts>.safetensors beside
        masks/, the ablation values of mean ablation. For the mask with learned values at the budget of several seeds
        three controls: <mask>_bias and <mask>_added, its constants at the same readers without the cut, and
        <mask>_mean, mean ablation of its edges (docs/methods.md). During training also checkpoints in these folders and
        rankings/ (what masks share), from which the same command continues an interrupted sweep.
Time    40 seconds per ranking for the shipped model on one core; masks of several budgets share one.

A ranking of the edges (`--training.method ranking`, the default) is trained once for all budgets up to the largest of
`--training.budgets`; larger ones have a ranking each. Masks with seeds above 0, at one budget, show how stable the
choice of edges is. If ablation values are learned, they are learned for random edges
too, at that budget and in as many steps: the remaining difference is due to the choice of edges.
"""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_ablate_from, check_counts, resolve_defaults
from circuit_breaking.runs.settings import AblateFromSettings, ModelSettings, ResumeSettings
from circuit_breaking.toxicity.settings import ToxicDataSettings, ToxicRunSettings, default_data, require_data
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.methods import GIVEN

ABLATIONS = ("zero", "mean", "optimal")  # kinds of ablation value; "optimal" is learned with the mask


@dataclass
class Settings(ToxicDataSettings, ModelSettings, AblateFromSettings, ToxicRunSettings, ResumeSettings):
    MOST_USED: ClassVar = (
        "model", "budgets", "ablations", "stable_budget", "seeds", "random_seeds", "examples", "run", "seed", "device",
    )  # fmt: skip

    budgets: tuple[int, ...] = (1, 2, 5, 12, 25, 50)  # most edges to cut: one mask for each budget
    ablations: tuple[str, ...] = ABLATIONS  # kinds of ablation value: zero, mean, optimal (learned with the mask)
    learned_lr: float = 0.005  # learning rate of AdamW on ablation values that are learned
    mean_texts: int = 1000  # ordinary training texts that the mean is over
    stable_budget: int = 12  # budget whose masks are trained with several seeds; 0: none
    seeds: int = 3  # masks with stable_budget, the first one with the setting seed
    random_seeds: int = 5  # random masks for each budget, as a control
    training: MaskConfig = field(default_factory=MaskConfig)  # of every mask; max_edges is not used
    examples: int = 100  # toxic texts to learn from; 0: all that are not used for validation
    validation: int = 50  # most texts of each kind that are left to validate fine-tuned models with
    split_qkv: bool = False  # give the query, key and value of a head separate edges
    seed: int = 0  # seed of the choice and order of texts, and of random edges

    def check(self) -> None:
        check_counts(self, "mean_texts", "length", "validation")
        check_ablate_from(self)
        for name in ("seeds", "random_seeds", "stable_budget"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}; it cannot be negative.")
        if not self.budgets or min(self.budgets) < 1:
            raise UserError(f"budgets are {list(self.budgets)}; give one or more, each 1 or more.")
        if not self.ablations or not set(self.ablations) <= set(ABLATIONS):
            raise UserError(f"ablations are {list(self.ablations)}; choose from {', '.join(ABLATIONS)}.")
        require_data(self)


if __name__ == "__main__":
    settings = read_settings(Settings)

import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from circuit_breaking.engine.ablation_values import load_means, read_means, save_mean_outputs, save_means, value_in
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import load_mask, read_mask_record, save_mask
from circuit_breaking.evaluation.constant_controls import write_constant_controls
from circuit_breaking.evaluation.controls import random_edges
from circuit_breaking.models.load import files_of, load_tokenizer
from circuit_breaking.runs.checkpoints import Checkpoints
from circuit_breaking.runs.cost import COST_FILE, cost, together, with_earlier
from circuit_breaking.runs.files import read_jsonl, write_json, write_jsonl
from circuit_breaking.runs.mask_record import MASK, MEANS, MaskRecord, MeansRecord, data_of, write_edges
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.records import fingerprint
from circuit_breaking.runs.run_folder import METRICS, hold, is_up_to_date, resume_key
from circuit_breaking.runs.signals import stop_signals
from circuit_breaking.toxicity.splits import Splits, load_splits
from circuit_breaking.training.budgets import shared_steps
from circuit_breaking.training.run import train_into

RANDOM = "random"
# settings that change no mask by themselves: what they decide for one mask is in `Sweep.key`
APART = ("budgets", "ablations", "stable_budget", "seeds", "random_seeds")


def plan(settings: Settings, n_edges: int) -> Iterator[tuple[str, str, int, int]]:
    """(name, ablation, budget, seed) of the masks to train."""
    for ablation in settings.ablations:
        for budget in settings.budgets:
            if budget <= n_edges:
                yield f"{ablation}_{budget}", ablation, budget, settings.seed
        for more in range(1, settings.seeds if settings.stable_budget else 0):
            seed = settings.seed + more
            yield f"{ablation}_{settings.stable_budget}_seed{seed}", ablation, settings.stable_budget, seed


def read_texts(settings: Settings, tokenizer: Any, seed: int) -> Splits:
    return load_splits(
        tokenizer, settings.toxic_train, settings.toxic_test, settings.ordinary, settings.length,
        settings.examples or None, settings.validation, seed, settings.text_column,
    )  # fmt: skip


def training_of(settings: Settings, ablation: str, budget: int) -> MaskConfig:
    """How a mask is trained."""
    learned_lr = settings.learned_lr if ablation == "optimal" else 0.0
    return replace(settings.training, max_edges=budget, constants_lr=learned_lr)


def given(training: MaskConfig) -> MaskConfig:
    """How what given edges carry is trained: in as many steps as a mask."""
    return replace(training, method=GIVEN, steps=training.steps + training.refine_rounds, refine_rounds=0)


class Sweep:
    """Trains masks of one model on one choice of texts into the folder of a run."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.folder = settings, settings.out / settings.run
        self.tokenizer = load_tokenizer(settings.model)
        self.splits: dict[int, Splits] = {}  # by the seed of the choice and order of texts
        first = self.texts(settings.seed)
        self.model = load_model(settings.model, settings.split_qkv, settings.device, settings.dtype)
        self.model.ablate_from = settings.ablate_from
        self.provenance = provenance(settings, [*first.files, *files_of(settings.model)], texts=first.about)
        self.averages = None if set(settings.ablations) == {"zero"} else self.folder / "means_ordinary.safetensors"
        self.shared: dict[Path, dict[str, Any]] = {}  # what rankings cost that are done, by folder

    def texts(self, seed: int) -> Splits:
        """The texts of a seed."""
        if seed not in self.splits:
            self.splits[seed] = read_texts(self.settings, self.tokenizer, seed)
        return self.splits[seed]

    def average(self) -> None:
        """Write what cut edges carry under mean ablation, if it is needed."""
        if self.averages is not None:
            made_from = fingerprint(resume_key(self.provenance, *APART))
            if self.settings.resume and is_up_to_date(self.averages, made_from, lambda path: read_means(path)[1]):
                return  # writing it again on another machine might change the last digits under finished masks
            texts = self.texts(self.settings.seed).ordinary["train"][: self.settings.mean_texts]
            save_mean_outputs(self.averages, self.model, texts, self.provenance, made_from)

    def set_ablation(self, ablation: str) -> None:
        """Let cut edges carry what is asked for, at first where that is learned."""
        self.model.means = None
        if ablation != "zero":
            load_means(self.averages, self.model)

    def key(self, role: str, ablation: str, budget: int, seed: int) -> dict[str, Any]:
        """What a mask depends on: it is not trained again while this is the same."""
        training = training_of(self.settings, ablation, budget)
        settings = {**self.provenance["settings"], "training": training}
        mask = {"role": role, "ablation": ablation, "budget": budget, "seed": seed}
        return {**resume_key({**self.provenance, "settings": settings}, *APART), "mask": mask}

    def mask(self, name: str, ablation: str, budget: int, seed: int, edges: Tensor | None = None) -> int:
        """Train a mask, or the ablation constants of `edges` [E], into its folder unless it is there; edges it cuts."""
        role = "mask" if edges is None else "random"
        place, key = self.folder / "masks" / name, self.key(role, ablation, budget, seed)
        if self.settings.resume and is_up_to_date(place / MASK, fingerprint(key), read_mask_record):
            load_mask(place / MASK, self.model)
            print(f"{name}: is there, of the same settings, data and code; --no-resume makes it again", flush=True)
            return self.model.mask.n_cut()
        how = training_of(self.settings, ablation, budget)
        how = how if edges is None else given(how)
        resume, earlier = self.settings.resume, None
        with hold(place):
            own, first = Checkpoints(place, key), shared_steps(how)
            if first is not None and not (resume and own.load()):
                earlier, resume = self.rank(ablation, seed, first, own), True
            spent = self.train(place, ablation, seed, how, key, resume, edges, earlier)
            write_json(place / COST_FILE, spent)
            self.save(place, role, ablation, budget, seed)
            own.remove()
        count = self.model.mask.n_cut()
        print(f"{name}: {count} edges cut in {spent['seconds']:.0f} s", flush=True)
        return count

    def shared_place(self, ablation: str, seed: int) -> Path:
        """Folder of the ranking, which the masks of several budgets share."""
        return self.folder / "rankings" / f"{ablation}_seed{seed}"

    def rank(self, ablation: str, seed: int, how: MaskConfig, own: Checkpoints) -> dict[str, Any]:
        """Start a mask from the shared ranking, which is trained first if needed. Returns what the ranking cost."""
        place = self.shared_place(ablation, seed)
        key = self.key("ranking", ablation, 0, seed)
        with hold(place):
            if place not in self.shared:
                spent = self.train(place, ablation, seed, how, key, self.settings.resume)
                write_json(place / COST_FILE, spent)
                self.shared[place] = spent
            write_jsonl(own.folder / METRICS, read_jsonl(place / METRICS))
            Checkpoints(place, key).hand_on(own)
        return self.shared[place]

    def train(
        self, place: Path, ablation: str, seed: int, how: MaskConfig, key: dict[str, Any], resume: bool,
        edges: Tensor | None = None, earlier: dict[str, Any] | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Train the model's mask into a folder that is held; what it cost, with what came `earlier`."""
        tasks = self.texts(seed).tasks(seed)
        torch.manual_seed(seed)
        self.set_ablation(ablation)
        with cost(self.model.device) as spent:
            result = train_into(
                place, self.model, *tasks, how, edges, key, resume, self.settings.checkpoint_every, lock=False
            )
        if earlier is not None:
            return together(earlier, spent)
        return with_earlier(spent, result.seconds - spent["seconds"])

    def control(self, name: str, ablation: str, budget: int, seed: int, count: int) -> None:
        """A control: `count` edges drawn evenly. What they carry is learned at one budget only."""
        self.model.mask.reset_()
        self.model.mask.cut_(random_edges(self.model.graph, count, seed, budget))
        if ablation != "optimal":
            self.set_ablation(ablation)
            self.save(self.folder / "masks" / name, "random", ablation, budget, seed)
        elif budget == self.settings.stable_budget:
            self.mask(name, ablation, budget, seed, self.model.mask.weights.detach() == 0)

    def save(self, place: Path, role: str, ablation: str, budget: int, seed: int) -> None:
        """Write the mask that is in the model, last the file that says that the folder is complete."""
        learned = ablation == "optimal"
        means = place / MEANS if learned else None if ablation == "zero" else self.averages
        if learned:
            save_means(means, self.model, self.model.means, MeansRecord(provenance=self.provenance))
        write_edges(place, self.model.mask.cut_edges())
        record = MaskRecord(
            role=role, method=RANDOM if role == RANDOM else self.settings.training.method, budget=budget, seed=seed,
            ablation_value=value_in(means, learned), data=data_of(asdict(self.settings)),
            made_from=fingerprint(self.key(role, ablation, budget, seed)), provenance=self.provenance,
        )  # fmt: skip
        save_mask(place / MASK, self.model, record)


def main(settings: Settings) -> None:
    settings.check()
    settings = resolve_defaults(settings, default_data(settings.model))
    sweep = Sweep(settings)
    n_edges = len(sweep.model.graph)
    if beyond := [budget for budget in settings.budgets if budget > n_edges]:
        print(f"note: the model has {n_edges} edges, so there is no mask of {', '.join(map(str, beyond))}.")
    cut: dict[tuple[str, int], int] = {}
    with stop_signals():
        sweep.average()
        for name, ablation, budget, seed in plan(settings, n_edges):
            count = sweep.mask(name, ablation, budget, seed)
            cut.setdefault((ablation, budget), count)
            if ablation == "optimal" and budget == settings.stable_budget and seed == settings.seed:
                place = sweep.folder / "masks" / name
                write_constant_controls(place, sweep.model, sweep.averages, settings.resume)
        for (ablation, budget), count in cut.items():
            for number in range(settings.random_seeds if budget in settings.budgets else 0):
                seed = settings.seed + number
                sweep.control(f"random_{ablation}_{budget}_seed{seed}", ablation, budget, seed, count)
    for _, ablation, _, seed in plan(settings, n_edges):  # of an earlier sweep too, which was interrupted
        shutil.rmtree(sweep.shared_place(ablation, seed), ignore_errors=True)
    with suppress(OSError):  # another sweep may be at work there
        (sweep.folder / "rankings").rmdir()
    print(f"written to {sweep.folder / 'masks'}")


if __name__ == "__main__":
    run_script(main, settings)
