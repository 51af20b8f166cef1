"""Compare ways to choose edges for several budgets: attribution, learned masks, random edges.

Reads   a model; prompts (make_ioi_datasets.py); ordinary text; ablation values (compute_means.py), if --means names a
        file.
Writes  data/ioi/<run>/: ioi_comparison.json, the logit difference and ordinary loss of each method and budget, edges
        and seconds; comparison.png, drawn from it.
Time    three minutes for the shipped model on one core, most of it for the learned masks, one for each budget.

Attribution (EAP, and integrated mask gradients) cuts the edges whose removal is predicted to lower the logit difference
most. It uses prompts only. ioi/faithfulness.py has EAP-IG too.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.ioi.settings import IOIMaskSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts
from circuit_breaking.runs.settings import SeedSettings


@dataclass
class Settings(IOIMaskSettings, SeedSettings):
    MOST_USED: ClassVar = (
        "model", "task", "prompts", "budgets", "learned", "num_attribution", "ig_steps", "random_seeds", "means", "run",
        "seed", "device",
    )  # fmt: skip

    budgets: tuple[int, ...] = (5, 10, 20, 50, 100)  # numbers of edges to cut; max_edges is not used
    learned: str = "each"  # each: train a mask for every budget; or a run, of whose edges the most important are cut
    num_attribution: int = 100  # training prompts that attribution averages over
    ig_steps: int = 20  # points of integrated mask gradients
    random_seeds: int = 5  # random masks for each budget
    run: str = "comparison"

    def check(self) -> None:
        super().check()
        check_counts(self, "num_attribution", "ig_steps", "random_seeds")
        if wrong := [budget for budget in self.budgets if budget < 1]:
            raise UserError(f"a budget of {wrong[0]} is not between 1 and the model's edges.")
        if not self.budgets:
            raise UserError("there is no budget to compare at. Give at least one.")


if __name__ == "__main__":
    settings = read_settings(Settings)

import time
from functools import partial

import torch
from torch import Tensor

from circuit_breaking.engine.mask import load_mask, lowest_cut, read_mask_record
from circuit_breaking.evaluation.controls import random_edges
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.indirect_objects import draw_comparison
from circuit_breaking.ioi.experiment import Experiment, open_experiment
from circuit_breaking.runs.ioi_results import MASK_GRADIENTS, IOIComparison
from circuit_breaking.runs.mask_record import MASK
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.training.attribution import eap, integrated_mask_gradients
from circuit_breaking.training.mask_trainer import train_mask


def main(settings: Settings) -> None:
    settings.check()
    experiment = open_experiment(settings)
    model, n_edges = experiment.model, len(experiment.model.graph)
    if wrong := [budget for budget in settings.budgets if not 1 <= budget <= n_edges]:
        raise UserError(f"a budget of {wrong[0]} is not between 1 and the model's {n_edges:,} edges.")
    original = experiment.summary()  # with all edges, before a mask is loaded
    learned = None if settings.learned == "each" else ranked(experiment)
    metrics = experiment.metrics(settings.num_attribution, 20)
    seconds, scores = {}, {}
    ways = {"EAP": eap, MASK_GRADIENTS: partial(integrated_mask_gradients, steps=settings.ig_steps)}
    for name, attribute in ways.items():
        start = time.perf_counter()
        scores[name] = attribute(progress_bar(metrics, desc=name, unit="batch"), model)
        seconds[name] = time.perf_counter() - start
    rows: dict[str, list[dict]] = {name: [] for name in (*scores, "learned", "random")}
    for budget in settings.budgets:
        for name, each in scores.items():
            rows[name].append(measured(experiment, lowest_cut(-each, budget)))
        if learned is None:
            result = train_mask(
                model, experiment.task, experiment.ordinary, replace(experiment.settings, max_edges=budget)
            )
            rows["learned"].append({**measured(experiment, result.weights), "seconds": result.seconds})
        else:
            rows["learned"].append(measured(experiment, lowest_cut(-learned, budget, threshold=0.0)))
        for seed in range(settings.random_seeds):
            mask = torch.ones_like(model.mask.weights)
            drawn = random_edges(model.graph, budget, settings.seed + seed)
            mask[[model.graph.index(edge) for edge in drawn]] = 0.0
            rows["random"].append({"seed": settings.seed + seed, **measured(experiment, mask)})
    folder = settings.out / settings.run
    compared = IOIComparison(
        original=original, methods=rows, n_edges=n_edges, seconds=seconds, provenance=experiment.provenance
    )
    compared.write(folder / "ioi_comparison.json")
    draw_comparison(folder)
    end_with_page(folder)
    lines = [["original", original]] + [[name, row] for name, found in rows.items() for row in found]
    cells = [
        [name, str(row.get("n_cut", 0)), f"{row['logit_difference']:.2f}", f"{row['ordinary_loss']:.3f}"]
        for name, row in lines
    ]
    print_table(["", "edges cut", "logit difference", "ordinary loss"], cells)
    print(f"written to {folder}")


def ranked(experiment: Experiment) -> Tensor:
    """What each edge that a run's mask cuts is worth: its share of how much better the objective gets when they are all
    cut (integrated mask gradients between the whole model and the mask); -inf for the others: [E]."""
    settings, model = experiment.settings, experiment.model
    path = settings.out / settings.learned / MASK
    if (theirs := read_mask_record(path).ablate_from) != settings.ablate_from:
        raise UserError(
            f"{path} was made with ablate_from {theirs}, and the other methods have {settings.ablate_from}. "
            f"Set ablate_from to {theirs}, or train that mask again."
        )
    load_mask(path, model)
    model.mask.round_()
    mask = model.mask.weights.detach().clone()
    starts = range(0, settings.num_attribution, 20)
    texts, prompts = (task.train[: settings.num_attribution] for task in (experiment.ordinary, experiment.task))

    def objective(weights: Tensor, rows: slice) -> Tensor:
        keep = experiment.ordinary.loss(model, texts[rows], weights)
        broken = experiment.task.loss(model, prompts[rows], weights, settings.break_cap or None)
        return settings.keep_weight * keep - settings.alpha * broken

    metrics = [
        partial(objective, rows=slice(start, start + 20)) for start in starts if start < min(len(texts), len(prompts))
    ]
    scores = integrated_mask_gradients(
        progress_bar(metrics, desc="worth", unit="batch"), model, settings.ig_steps, start=mask
    )
    return scores.masked_fill(mask == 1, float("-inf"))


def measured(experiment: Experiment, mask: Tensor) -> dict:
    """What the model does with a mask."""
    with torch.no_grad():
        experiment.model.mask.weights.copy_(mask)
    edges = experiment.model.mask.cut_edges()
    return {"n_cut": len(edges), **experiment.summary(), "edges": edges}


if __name__ == "__main__":
    run_script(main, settings)
