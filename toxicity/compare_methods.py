"""Compare ways to find edges at equal budgets and equal numbers of texts: clamped, hard-concrete, attribution, chance.

Reads   a model; toxic posts and ordinary text; means, where a cut edge carries any.
Writes  data/toxicity/<run>/: methods.json and methods.csv (a row a mask: budget, seed, edges cut, held-out losses,
        gain), methods.png, drawn from the first; masks/<method>_<budget>_seed<n>/: mask.safetensors, edges.json,
        metrics.jsonl, cost.json.
Time    17 seconds a mask for the shipped model on one core, half an hour for the defaults.

A method finds edges and measured effects refine them. `alone` is the method without the refinement, for which it gets
as many more steps as see the refinement's texts. A run that was interrupted goes on with the masks that are missing.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from circuit_breaking.engine.ablation_values import load_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import load_mask, save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.figures.methods import FILE, draw_methods, table
from circuit_breaking.models.load import files_of, load_tokenizer
from circuit_breaking.runs.cli import run_script
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.cost import COST_FILE, cost
from circuit_breaking.runs.files import plain, write_csv, write_json, write_jsonl
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.tensors import read_tensors
from circuit_breaking.toxicity.settings import FOLDER, default_data
from circuit_breaking.toxicity.splits import Splits, load_splits
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import train_mask
from circuit_breaking.training.methods import METHODS

MASK, RANDOM = "mask.safetensors", "random"
MADE_BY = (  # settings by which a mask is made; others may differ where a run goes on
    "model", "max_edges", "seed", "training", "means", "toxic_train", "toxic_test", "ordinary", "length", "examples",
    "split_qkv", "device", "dtype",
)  # fmt: skip


@dataclass
class Settings:
    model: str = "tiny"  # "tiny" (shipped), a hub name such as gpt2, a folder, or a folder holding a .gguf
    budgets: tuple[int, ...] = (1, 2, 5, 12, 25, 50)  # most edges to cut, a mask of each method for each
    methods: tuple[str, ...] = tuple(METHODS)  # ways to find edges, refined
    alone: tuple[str, ...] = tuple(METHODS)  # ways to find edges, not refined
    seeds: int = 3  # masks of each
    random_seeds: int = 5  # masks of each budget whose edges are drawn evenly from all
    training: MaskConfig = field(default_factory=MaskConfig)  # of every mask, but for max_edges and method
    means: Path | None = None  # what cut edges carry, from compute_means.py; None: nothing (zero)
    toxic_train: Path | None = None  # toxic texts to learn from; None: shipped for tiny, else posts/train.jsonl
    toxic_test: Path | None = None  # toxic texts held out; None: the shipped ones for tiny, else posts/test.jsonl
    ordinary: str | None = None  # "tiny", a text file, or a data set's hub name; None: tiny, else NeelNanda/pile-10k
    run: str = "methods"  # name of the run folder, data/toxicity/<run>
    out: Path = FOLDER  # where run folders are
    resume: bool = True  # keep masks that are there, of the same settings and data; the code is not compared

    length: int = 50  # tokens a text is cut to
    examples: int = 100  # toxic texts to learn from; 0: all
    num_texts: int = 500  # most held-out texts of each kind
    split_qkv: bool = False  # let each head's query, key and value read for themselves
    seed: int = 0  # the first; another seed, another choice and order of texts
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "float32"  # float32 or bfloat16


def texts_seen(training: MaskConfig) -> int:
    """Texts of each task that training draws, a text drawn twice counted twice."""
    steps = training.relax_steps + training.anneal_steps
    return training.batch_size * steps + training.refine_batch_size * training.refine_rounds


def unrefined(training: MaskConfig) -> MaskConfig:
    """The same without refinement, whose texts are seen in more steps of both phases that find edges."""
    more = training.refine_batch_size * training.refine_rounds // training.batch_size
    relax, anneal = training.relax_steps, training.anneal_steps
    share = round(more * relax / (relax + anneal)) if relax + anneal else more
    return replace(training, refine_rounds=0, relax_steps=relax + share, anneal_steps=anneal + more - share)


def plan(settings: Settings, budgets: list[int]) -> Iterator[tuple[str, int, int, MaskConfig | None]]:
    """(method, budget, seed, training) of every mask; random ones are not trained."""
    ways = {method: replace(settings.training, method=method) for method in settings.methods}
    ways |= {f"{method} alone": unrefined(replace(settings.training, method=method)) for method in settings.alone}
    for method, training in ways.items():
        for budget in budgets:
            for number in range(settings.seeds):
                yield method, budget, settings.seed + number, replace(training, max_edges=budget)
    for budget in budgets:
        for number in range(settings.random_seeds):
            yield RANDOM, budget, settings.seed + number, None


def check(settings: Settings) -> None:
    check_counts(settings, "seeds", "length", "num_texts")
    if settings.random_seeds < 0:
        raise UserError(f"random_seeds is {settings.random_seeds}; it cannot be negative.")
    if not settings.budgets or min(settings.budgets) < 1:
        raise UserError(f"budgets are {list(settings.budgets)}; give one or more, each 1 or more.")
    if wrong := [name for name in (*settings.methods, *settings.alone) if name not in METHODS]:
        raise UserError(f"method {wrong[0]!r} is not one of {', '.join(METHODS)}.")
    if settings.training.constants_lr:
        raise UserError(
            "constants_lr is not compared here: it would tell methods apart by more than their edges. Set it to 0."
        )


def main(settings: Settings) -> None:
    check(settings)
    settings = resolve_defaults(settings, default_data(settings.model))
    folder = settings.out / settings.run
    tokenizer = load_tokenizer(settings.model)

    @cache
    def texts(seed: int) -> Splits:
        return load_splits(
            tokenizer, settings.toxic_train, settings.toxic_test, settings.ordinary, settings.length,
            settings.examples or None, seed=seed,
        )  # fmt: skip

    model = load_model(settings.model, settings.split_qkv, settings.device, settings.dtype)
    inputs = [*texts(settings.seed).files, *files_of(settings.model)]
    if settings.means is not None:
        load_means(settings.means, model)
        inputs.append(settings.means)
    record = provenance(settings, inputs, texts=texts(settings.seed).about)
    held_out = dict(zip(("toxic", "ordinary"), texts(settings.seed).tasks(settings.seed), strict=True))

    def measured() -> dict[str, float]:
        """Held-out losses of the model with the mask that is in it, and the objective, which is to be low."""
        found = {name: task.get_test_loss(model, settings.num_texts) for name, task in held_out.items()}
        weights = settings.training.keep_weight, settings.training.alpha
        return {**found, "objective": weights[0] * found["ordinary"] - weights[1] * found["toxic"]}

    if beyond := [budget for budget in settings.budgets if budget > len(model.graph)]:
        print(f"note: the model has {len(model.graph)} edges, so there is no mask of {', '.join(map(str, beyond))}.")
    original, rows = measured(), []
    masks = list(plan(settings, [budget for budget in settings.budgets if budget not in beyond]))
    for method, budget, seed, training in tqdm(masks, desc="masks", unit="mask", disable=None):
        place = folder / "masks" / f"{method.replace(' ', '_')}_{budget}_seed{seed}"
        about = record_of(record, settings, method, budget, seed, training)
        if not (settings.resume and is_up_to_date(place / MASK, about)):
            make(place, model, texts(seed).tasks(seed), budget, seed, training)
            write_json(place / "edges.json", model.mask.cut_edges())
            save_mask(place / MASK, model, about)  # last: it says that the folder is complete
        load_mask(place / MASK, model)
        row = {"method": method, "budget": budget, "seed": seed, "edges_cut": model.mask.n_cut(), **measured()}
        rows.append({**row, "gain": original["objective"] - row["objective"]})

    seen = {"refined": texts_seen(settings.training), "alone": texts_seen(unrefined(settings.training))}
    write_csv(folder / "methods.csv", rows)
    write_json(folder / FILE, {"original": original, "masks": rows, "texts_seen": seen, **record})
    draw_methods(folder)
    print(table(folder))
    print(f"written to {folder}")


def record_of(
    record: dict[str, Any], settings: Settings, method: str, budget: int, seed: int, training: MaskConfig | None
) -> dict[str, Any]:
    """What a mask's file says of how it was made, in the form of train_mask.py, so that evaluation.py reads both."""
    own = {"max_edges": budget, "seed": seed, "means": settings.means, "training": training}
    kind = "mask" if training else "random"
    about = {**record, "settings": {**record["settings"], **own}, "kind": kind, "method": method}
    return json.loads(json.dumps(about, default=plain))  # as it will be read


def is_up_to_date(path: Path, about: dict[str, Any]) -> bool:
    """Whether a mask is there that was made with the same settings from the same files."""
    if not path.is_file():
        return False
    there = read_tensors(path)[1]
    same = ("method", "inputs", "texts")
    mine, theirs = ({k: v for k, v in one["settings"].items() if k in MADE_BY} for one in (about, there))
    return mine == theirs and all(about[name] == there.get(name) for name in same)


def make(folder: Path, model: Any, tasks: tuple[Any, Any], budget: int, seed: int, training: MaskConfig | None) -> None:
    """Put a mask into the model, trained or drawn, and what training left into a folder."""
    if training is None:
        model.mask.reset_()
        model.mask.cut_(random.Random(f"{seed} {budget}").sample(model.graph.edges, budget))
        return
    torch.manual_seed(seed)
    with cost(model.device) as spent:
        result = train_mask(model, *tasks, training, progress=False)
    write_jsonl(folder / "metrics.jsonl", result.history)
    write_json(folder / COST_FILE, spent)


if __name__ == "__main__":
    run_script(main, Settings)
