"""Compare ways to find edges at equal budgets and equal numbers of texts, and random edges.

Reads   a model; toxic posts and ordinary text; ablation values, if --means names a file.
Writes  data/toxicity/<run>/: methods.json and methods.csv, one row per mask (budget, seed, edges cut, held-out losses,
        gain); methods.png, drawn from the first; masks/<method>_<budget>_seed<n>/: mask.safetensors, edges.json,
        metrics.jsonl, cost.json.
Time    17 seconds per mask for the shipped model on one core, half an hour for the defaults.

A method finds edges, and refinement changes them one by one by their measured effects. `alone` is the method without
refinement; it trains for more steps in exchange, so that it sees the same number of texts. Methods that score edges
(`ranking`, `ugs`, `attribution`) are trained once for all budgets when they are alone. The same command continues an
interrupted run with the masks that are missing.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_ablate_from, check_counts, resolve_defaults
from circuit_breaking.runs.settings import AblateFromSettings, ModelSettings, SeedSettings
from circuit_breaking.toxicity.settings import ToxicDataSettings, ToxicRunSettings, default_data, require_data
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.methods import METHODS


@dataclass
class Settings(ToxicDataSettings, ModelSettings, AblateFromSettings, ToxicRunSettings, SeedSettings):
    MOST_USED: ClassVar = (
        "model", "budgets", "methods", "alone", "seeds", "random_seeds", "means", "num_texts", "run", "seed", "device",
    )  # fmt: skip

    budgets: tuple[int, ...] = (1, 2, 5, 12, 25, 50)  # most edges to cut: one mask of each method for each budget
    methods: tuple[str, ...] = ("clamped", "hard-concrete")  # methods with refinement, for which each mask is trained
    alone: tuple[str, ...] = tuple(METHODS)  # methods without refinement
    seeds: int = 3  # masks of each method and budget
    random_seeds: int = 5  # masks of each budget whose edges are drawn at random
    training: MaskConfig = field(  # of every mask, for the objective that is compared; max_edges, method: not used
        default_factory=lambda: MaskConfig(steps=200, refine_rounds=60, keep_loss="loss")
    )
    means: Path | None = None  # file of ablation values from compute_means.py; None: zero
    run: str = "methods"
    resume: bool = True  # keep masks of a run with the same settings, data and code
    examples: int = 100  # toxic texts to learn from; 0: all of the file
    num_texts: int = 500  # most held-out texts of each kind
    split_qkv: bool = False  # give the query, key and value of a head separate edges
    seed: int = 0  # the first seed; another one gives another choice and order of texts

    def check(self) -> None:
        check_counts(self, "seeds", "length", "num_texts")
        check_ablate_from(self)
        if self.random_seeds < 0:
            raise UserError(f"random_seeds is {self.random_seeds}; it cannot be negative.")
        if not self.budgets or min(self.budgets) < 1:
            raise UserError(f"budgets are {list(self.budgets)}; give one or more, each 1 or more.")
        if wrong := [name for name in (*self.methods, *self.alone) if name not in METHODS]:
            raise UserError(f"method {wrong[0]!r} is not one of {', '.join(METHODS)}.")
        if self.training.constants_lr:
            raise UserError(
                "constants_lr is not compared here: methods would then differ by more than their edges. Set it to 0."
            )
        require_data(self)


if __name__ == "__main__":
    settings = read_settings(Settings)

from collections.abc import Iterator
from functools import cache

import torch

from circuit_breaking.engine.ablation_values import load_means, value_in
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import load_mask, read_mask_record, save_mask
from circuit_breaking.evaluation.controls import random_edges
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.methods import FILE, draw_methods, table
from circuit_breaking.models.load import files_of, load_tokenizer
from circuit_breaking.runs.cost import COST_FILE, cost
from circuit_breaking.runs.files import write_csv, write_json, write_jsonl
from circuit_breaking.runs.mask_record import MASK, MaskRecord, data_of, write_edges
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.records import fingerprint
from circuit_breaking.runs.results import MethodComparison
from circuit_breaking.runs.run_folder import is_up_to_date
from circuit_breaking.toxicity.splits import Splits, load_splits
from circuit_breaking.training.mask_trainer import MaskResult, train_mask
from circuit_breaking.training.methods import method_class
from circuit_breaking.training.methods.base import MaskMethod
from circuit_breaking.training.prefix_choice import choice_steps

RANDOM = "random"
# settings that a mask depends on, besides its own budget, seed and training; others may differ in a run that is resumed
MADE_BY = (
    "model", "means", "ablate_from", "toxic_train", "toxic_test", "ordinary", "text_column", "length", "examples",
    "split_qkv", "device", "dtype",
)  # fmt: skip


def texts_seen(training: MaskConfig) -> int:
    """Texts of each task that training draws, a text drawn twice counted twice."""
    in_steps = training.batch_size * (training.steps + choice_steps(training))
    return in_steps + training.refine_batch_size * training.refine_rounds


def unrefined(training: MaskConfig) -> MaskConfig:
    """The same without refinement, whose texts are seen in more steps that find edges."""
    texts = training.batch_size * training.steps + training.refine_batch_size * training.refine_rounds
    return replace(training, refine_rounds=0, steps=texts // training.batch_size)


def at_equal_texts(training: MaskConfig) -> MaskConfig:
    """The same with fewer steps that find edges, in exchange for those that choose how many of them to cut."""
    extra = choice_steps(training)
    return replace(training, steps=max(1, training.steps - extra)) if extra else training


def for_all_budgets(training: MaskConfig) -> bool:
    """Whether one training scores the edges for every budget. Refinement changes the mask of one budget."""
    return training.refine_rounds == 0 and method_class(training.method).scores is not MaskMethod.scores


def plan(settings: Settings, budgets: list[int]) -> Iterator[tuple[str, int, int, MaskConfig | None]]:
    """(method, budget, seed, training) of every mask; random ones are not trained."""
    ways = {method: replace(settings.training, method=method) for method in settings.methods}
    ways |= {f"{method} alone": unrefined(replace(settings.training, method=method)) for method in settings.alone}
    for method, training in ways.items():
        training = at_equal_texts(training)
        for budget in budgets:
            of_budget = replace(training, max_edges=budget)
            if for_all_budgets(training):
                of_budget = replace(training, max_edges=max(budgets), budgets=tuple(budgets))
            for number in range(settings.seeds):
                yield method, budget, settings.seed + number, of_budget
    for budget in budgets:
        for number in range(settings.random_seeds):
            yield RANDOM, budget, settings.seed + number, None


def main(settings: Settings) -> None:
    settings.check()
    settings = resolve_defaults(settings, default_data(settings.model))
    folder = settings.out / settings.run
    tokenizer = load_tokenizer(settings.model)

    @cache
    def texts(seed: int) -> Splits:
        return load_splits(
            tokenizer, settings.toxic_train, settings.toxic_test, settings.ordinary, settings.length,
            settings.examples or None, seed=seed, text_column=settings.text_column,
        )  # fmt: skip

    model = load_model(settings.model, settings.split_qkv, settings.device, settings.dtype)
    model.ablate_from = settings.ablate_from
    inputs = [*texts(settings.seed).files, *files_of(settings.model)]
    if settings.means is not None:
        load_means(settings.means, model)
        inputs.append(settings.means)
    run = provenance(settings, inputs, texts=texts(settings.seed).about)
    held_out = dict(zip(("toxic", "ordinary"), texts(settings.seed).tasks(settings.seed), strict=True))

    def measured() -> dict[str, float]:
        """Held-out losses of the model with the mask that is in it, and the objective, which is to be low."""
        found = {name: task.get_test_loss(model, settings.num_texts) for name, task in held_out.items()}
        weights = settings.training.keep_weight, settings.training.alpha
        return {**found, "objective": weights[0] * found["ordinary"] - weights[1] * found["toxic"]}

    if beyond := [budget for budget in settings.budgets if budget > len(model.graph)]:
        print(f"note: the model has {len(model.graph)} edges, so there is no mask of {', '.join(map(str, beyond))}.")
    original, rows = measured(), []
    rankings: dict[tuple[str, int], tuple[MaskResult, dict[str, Any]]] = {}  # and what they cost, by method and seed
    masks = list(plan(settings, [budget for budget in settings.budgets if budget not in beyond]))
    for method, budget, seed, training in progress_bar(masks, desc="masks", unit="mask"):
        place = folder / "masks" / f"{method.replace(' ', '_')}_{budget}_seed{seed}"
        record = record_of(run, settings, method, budget, seed, training)
        if not (settings.resume and is_up_to_date(place / MASK, record.made_from, read_mask_record)):
            if training is None:
                model.mask.reset_()
                model.mask.cut_(random_edges(model.graph, budget, seed))
            else:
                make(place, model, texts(seed).tasks(seed), budget, seed, training, rankings)
            write_edges(place, model.mask.cut_edges())
            save_mask(place / MASK, model, record)  # last: it says that the folder is complete
        load_mask(place / MASK, model)
        row = {"method": method, "budget": budget, "seed": seed, "edges_cut": model.mask.n_cut(), **measured()}
        rows.append({**row, "gain": original["objective"] - row["objective"]})

    each = {"refined": settings.training, "alone": unrefined(settings.training)}
    seen = {name: texts_seen(at_equal_texts(training)) for name, training in each.items()}
    write_csv(folder / "methods.csv", rows)
    MethodComparison(original=original, masks=rows, texts_seen=seen, provenance=run).write(folder / FILE)
    draw_methods(folder)
    end_with_page(folder)
    print_table(*table(folder))
    print(f"written to {folder}")


def record_of(
    run: dict[str, Any], settings: Settings, method: str, budget: int, seed: int, training: MaskConfig | None
) -> MaskRecord:
    """How a mask is made; `run` is the run's provenance, `training` None for random edges."""
    key = {name: run["settings"][name] for name in MADE_BY}
    key |= {"inputs": run["inputs"], "texts": run["texts"], "code": run["code"]}
    key |= {"method": method, "budget": budget, "seed": seed}
    return MaskRecord(
        role="mask" if training else "random", method=method, budget=budget, seed=seed,
        ablation_value=value_in(settings.means), data=data_of(asdict(settings)),
        made_from=fingerprint({**key, "training": training}), provenance=run,
    )  # fmt: skip


def make(
    folder: Path, model: Any, tasks: tuple[Any, Any], budget: int, seed: int, training: MaskConfig,
    rankings: dict[tuple[str, int], tuple[MaskResult, dict[str, Any]]],
) -> None:  # fmt: skip
    """Put a trained mask into the model, and what training left into a folder.

    A ranking for all budgets is trained once and kept in `rankings`.
    """
    key, shared = (training.method, seed), for_all_budgets(training)
    if shared and key in rankings:
        result, spent = rankings[key]
    else:
        torch.manual_seed(seed)
        with cost(model.device) as spent:
            result = train_mask(model, *tasks, training, progress=False)
    if shared:
        rankings[key] = result, spent
        with torch.no_grad():
            model.mask.weights.copy_(result.at(budget))
    write_jsonl(folder / "metrics.jsonl", result.history)
    write_json(folder / COST_FILE, spent)


if __name__ == "__main__":
    run_script(main, settings)
