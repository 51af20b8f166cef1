"""Compare ways to choose edges: attribution (EAP and EAP-IG), learned masks, and chance, for several budgets.

Reads   a model; prompts (make_ioi_datasets.py); ordinary text; means (compute_means.py), where a cut edge carries any.
Writes  data/ioi/<run>/: comparison.json (logit difference and ordinary loss of each method and budget, edges, seconds)
        and comparison.png, drawn from it.
Time    three minutes for the shipped model on one core, most of it for the learned masks, one a budget.

EAP and EAP-IG cut the edges whose loss is predicted to lower the logit difference most; they look at prompts alone.
"""

import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_breaking.engine.mask import load_mask, lowest_cut
from circuit_breaking.errors import UserError
from circuit_breaking.figures.indirect_objects import draw_comparison
from circuit_breaking.ioi.setting import Setting, open_setting
from circuit_breaking.ioi.settings import FOLDER
from circuit_breaking.runs.cli import run_script
from circuit_breaking.runs.config import check_counts
from circuit_breaking.runs.files import write_json
from circuit_breaking.training.attribution import eap, eap_ig
from circuit_breaking.training.config import MaskConfig
from circuit_breaking.training.mask_trainer import train_mask


@dataclass
class Settings(MaskConfig):
    model: str = "tiny"  # "tiny" (shipped), a hub name such as gpt2, a folder, or a folder holding a .gguf
    prompts: Literal["one", "two", "all"] = "all"  # set of prompts that make_ioi_datasets.py wrote for this model
    train: Path | None = None  # training prompts; None: those of the set
    test: Path | None = None  # held-out prompts; None: those of the set
    ordinary: str | None = None  # "tiny", a text file, or a data set's hub name; None: "tiny" or NeelNanda/pile-10k
    means: Path | None = None  # what cut edges carry, from compute_means.py; None: nothing (zero ablation)
    run: str = "comparison"  # name of the run folder, data/ioi/<run>
    out: Path = FOLDER  # where run folders are

    budgets: tuple[int, ...] = (5, 10, 20, 50, 100)  # numbers of edges to cut; `max_edges` follows them
    learned: str = "each"  # "each": train a mask for every budget; or a run, of whose mask the edges worth most count
    num_attribution: int = 100  # training prompts that attribution averages over
    ig_steps: int = 10  # points on the line of integrated gradients
    random_seeds: int = 5  # masks drawn at random for each budget
    objective: Literal["logit_difference", "cross_entropy"] = "logit_difference"  # what breaking is to take away
    break_cap: float = 1.0  # most that one prompt counts towards the broken loss; more for cross_entropy
    alpha: float = 0.2  # weight of the indirect-object loss, which is to rise, against the ordinary loss
    length: int = 50  # tokens an ordinary text is cut to
    split_qkv: bool = False  # let each head's query, key and value read for themselves
    seed: int = 0  # another seed, another order of texts and other random masks
    num_test: int = 400  # held-out prompts and texts that are measured
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "float32"  # float32 or bfloat16


def main(settings: Settings) -> None:
    check_counts(settings, "num_attribution", "ig_steps", "random_seeds")
    setting = open_setting(settings)
    model, n_edges = setting.model, len(setting.model.graph)
    if wrong := [budget for budget in settings.budgets if not 1 <= budget <= n_edges]:
        raise UserError(f"a budget of {wrong[0]} is not between 1 and the model's {n_edges:,} edges.")
    if not settings.budgets:
        raise UserError("there is no budget to compare at. Give at least one.")
    original = setting.summary()  # with all edges, before a mask is loaded
    learned = None if settings.learned == "each" else ranked(setting)
    metrics = setting.metrics(settings.num_attribution, 20)
    seconds, scores = {}, {}
    for name, attribute in (("EAP", eap), ("EAP-IG", partial(eap_ig, steps=settings.ig_steps))):
        start = time.perf_counter()
        scores[name] = attribute(tqdm(metrics, desc=name, unit="batch", disable=None), model)
        seconds[name] = time.perf_counter() - start
    rows: dict[str, list[dict]] = {name: [] for name in (*scores, "learned", "random")}
    for budget in settings.budgets:
        for name, each in scores.items():
            rows[name].append(measured(setting, lowest_cut(-each, budget)))
        if learned is None:
            result = train_mask(model, setting.ioi, setting.ordinary, replace(setting.settings, max_edges=budget))
            rows["learned"].append({**measured(setting, result.weights), "seconds": result.seconds})
        else:
            rows["learned"].append(measured(setting, lowest_cut(-learned, budget, threshold=0.0)))
        for seed in range(settings.random_seeds):
            draw = torch.Generator().manual_seed(settings.seed + seed)
            shuffled = torch.rand(n_edges, generator=draw).to(model.device)
            rows["random"].append({"seed": settings.seed + seed, **measured(setting, lowest_cut(shuffled, budget))})
    folder = settings.out / settings.run
    about = {"original": original, "methods": rows, "n_edges": n_edges, "seconds": seconds}
    write_json(folder / "comparison.json", {**about, **setting.record})
    draw_comparison(folder)
    print(f"{'original':>9}           logit difference {original['logit_difference']:6.2f}  ", end="")
    print(f"ordinary loss {original['ordinary_loss']:.3f}")
    for name, found in rows.items():
        for row in found:
            print(
                f"{name:>9} {row['n_cut']:5d} cut  logit difference {row['logit_difference']:6.2f}  "
                f"ordinary loss {row['ordinary_loss']:.3f}"
            )
    print(f"written to {folder}")


def ranked(setting: Setting) -> Tensor:
    """What each edge that a run's mask cuts is worth: its share of how much better the objective gets when they are all
    cut (integrated gradients between the whole model and the mask); -inf for the others: [E]."""
    settings, model = setting.settings, setting.model
    load_mask(settings.out / settings.learned / "mask.safetensors", model)
    model.mask.round_()
    mask = model.mask.weights.detach().clone()
    starts = range(0, settings.num_attribution, 20)
    texts, prompts = (task.train[: settings.num_attribution] for task in (setting.ordinary, setting.ioi))

    def objective(weights: Tensor, rows: slice) -> Tensor:
        keep = setting.ordinary.loss(model, texts[rows], weights)
        broken = setting.ioi.loss(model, prompts[rows], weights, settings.break_cap or None)
        return settings.keep_weight * keep - settings.alpha * broken

    metrics = [
        partial(objective, rows=slice(start, start + 20)) for start in starts if start < min(len(texts), len(prompts))
    ]
    scores = eap_ig(tqdm(metrics, desc="worth", unit="batch", disable=None), model, settings.ig_steps, start=mask)
    return scores.masked_fill(mask == 1, float("-inf"))


def measured(setting: Setting, mask: Tensor) -> dict:
    """What the model does with a mask."""
    with torch.no_grad():
        setting.model.mask.weights.copy_(mask)
    edges = setting.model.mask.cut_edges()
    return {"n_cut": len(edges), **setting.summary(), "edges": edges}


if __name__ == "__main__":
    run_script(main, Settings)
