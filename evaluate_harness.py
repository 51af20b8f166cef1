"""Measure a model, also an ablated one, on tasks of EleutherAI's lm-evaluation-harness (lm-eval 0.4).

Reads   a saved ablated model (`save_ablated`), or any Hugging Face model; tasks of lm-eval, or those of --include-path.
Writes  data/harness/<run>/harness.json: lm-eval's results for each model, versions and settings.
Time    that of the tasks; a task of 1,000 questions takes minutes for GPT-2 small on two cores.

Everything but loading the model is lm-eval's own. It is an extra: pip install -e ".[harness]"
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import one_sentence, read_settings, run_script
from circuit_breaking.runs.config import check_counts
from circuit_breaking.runs.files import DATA
from circuit_breaking.runs.settings import ComputeSettings, SeedSettings


@dataclass
class Settings(ComputeSettings, SeedSettings):
    MOST_USED: ClassVar = ("model", "tasks", "original", "batch_size", "limit", "num_fewshot", "device", "out")

    model: str = ""  # folder or hub name of a saved ablated model, or of any other model
    tasks: tuple[str, ...] = ()  # names of tasks, as `lm_eval ls tasks` lists them
    original: bool = True  # measure an ablated model without its cuts too, for comparison
    include_path: Path | None = None  # folder with YAML files of further tasks
    batch_size: int = 8  # requests that are computed together
    limit: int = 0  # questions of each task; 0: all
    num_fewshot: int = -1  # solved examples before each question; -1: as each task says
    run: str = "run"  # name of the folder of results in out
    out: Path = DATA / "harness"  # folder of all runs

    def check(self) -> None:
        check_counts(self, "batch_size")
        if not self.model or not self.tasks:
            raise UserError("give the model (--model) and at least one task (--tasks).")
        if self.limit < 0 or self.num_fewshot < -1:
            raise UserError("limit must be 0 (all) or more, and num_fewshot -1 (as the task says) or more.")
        if self.include_path is not None and not self.include_path.is_dir():
            raise UserError(f"include_path {self.include_path} is no folder.")


if __name__ == "__main__":
    settings = read_settings(Settings)

from torch import nn
from transformers import PreTrainedTokenizerBase

from circuit_breaking.ablation.saved import is_ablated, load_ablated, read_ablated
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.models.load import load_hf_model, load_tokenizer
from circuit_breaking.runs.files import finite, write_json
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.provenance import provenance

with one_sentence():
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError('lm-eval is missing. Install it: pip install -e ".[harness]"') from error


def load(settings: Settings) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model, with its cuts if it has any, and its tokenizer."""
    if is_ablated(settings.model):
        hf = load_ablated(settings.model, settings.device, settings.dtype)
        return hf, load_tokenizer(read_ablated(hf.edge_cuts.saved_as).base)
    return load_hf_model(settings.model, settings.device, settings.dtype), load_tokenizer(settings.model)


def task_manager(settings: Settings) -> TaskManager:
    """lm-eval's index of tasks. Reading all of its own takes a minute, so they are left out where none is asked for."""
    path = settings.include_path and str(settings.include_path)
    if path:
        inside = TaskManager(include_path=path, include_defaults=False)
        if set(settings.tasks) <= set(inside.all_tasks):
            return inside
    return TaskManager(include_path=path)


def evaluate(
    hf: nn.Module, tokenizer: PreTrainedTokenizerBase, settings: Settings, manager: TaskManager
) -> dict[str, Any]:
    """lm-eval's results of one model: scores by task and metric, versions of tasks, samples counted."""
    try:
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=hf, tokenizer=tokenizer, batch_size=settings.batch_size),
            tasks=list(settings.tasks),
            task_manager=manager,
            num_fewshot=None if settings.num_fewshot < 0 else settings.num_fewshot,
            limit=settings.limit or None,
            random_seed=settings.seed,
            numpy_random_seed=settings.seed,
            torch_random_seed=settings.seed,
            fewshot_random_seed=settings.seed,
            log_samples=False,
            verbosity="ERROR",
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"lm-eval does not take these tasks ({error}). `lm_eval ls tasks` lists all.") from error
    return {name: found[name] for name in ("results", "versions", "n-samples", "higher_is_better") if name in found}


def main(settings: Settings) -> None:
    settings.check()
    hf, tokenizer = load(settings)
    results, manager = {}, task_manager(settings)
    cuts = getattr(hf, "edge_cuts", None)
    results["model" if cuts is None else "ablated"] = evaluate(hf, tokenizer, settings, manager)
    if cuts is not None and settings.original:
        cuts.remove()
        results["original"] = evaluate(hf, tokenizer, settings, manager)
    rows = [
        [task, metric, *(f"{one['results'][task][metric]:.4f}" for one in results.values())]
        for task, scores in next(iter(results.values()))["results"].items()
        for metric, value in scores.items()
        if isinstance(value, float) and "stderr" not in metric
    ]
    print_table(["task", "metric", *results], rows, settings.model)
    path = settings.out / settings.run / "harness.json"
    edges = None if cuts is None else list(map(str, cuts.edges))
    write_json(path, finite({"models": results, "edges": edges, "provenance": provenance(settings)}))
    end_with_page(path.parent)
    print(f"written to {path}")


if __name__ == "__main__":
    run_script(main, settings)
