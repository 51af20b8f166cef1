"""Measure the original model, masks and a fine-tuned model: logit difference, accuracy, ordinary loss.

Reads   the masks and settings of runs (train_mask.py, alternative_masks.py), the model, held-out prompts and texts and,
        if there is one, the model that finetune_gpt2.py wrote.
Writes  data/ioi/<report>/: ioi_report.json and, drawn from it, report.png; prints a table.
Time    seconds per model for the shipped one.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from circuit_breaking.errors import UserError
from circuit_breaking.ioi.settings import FOLDER, PromptSettings, default_data
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.settings import ModelSettings, SeedSettings
from circuit_breaking.tasks.registry import PROMPT_TASKS

HINT = "Train one with ioi/train_mask.py, or set runs to those that are there."


@dataclass
class Settings(PromptSettings, ModelSettings, SeedSettings):
    MOST_USED: ClassVar = ("runs", "finetuned", "report", "out", "model", "task", "prompts", "num_test", "device")

    runs: tuple[str, ...] = ("run",)  # runs in the folder out whose masks are measured
    finetuned: str | None = "finetuned"  # run of finetune_gpt2.py; left out if it is not there; None: none
    report: str = "report"  # name of the report's folder, in the folder out
    out: Path = FOLDER  # folder that holds the run folders
    model: str | None = None  # tiny, a name on the Hugging Face hub, a folder or a .gguf file; None: as in training
    task: Literal[tuple(PROMPT_TASKS)] | None = None  # behaviour (docs/tasks.md); None: as in training
    prompts: Literal["one", "two", "all"] | None = None  # set of prompts; None: as in training
    train: Path | None = None  # training prompts, none of which may be held out; None: as in training
    test: Path | None = None  # held-out prompts; None: as in training
    ordinary: str | None = None  # ordinary text: tiny, a file or a hub data set; None: as in training
    text_column: str | None = None  # column of a table or data set that holds the ordinary text; None: as in training
    length: int | None = None  # tokens of an ordinary text that are used; None: as in training
    num_test: int = 400  # held-out prompts and texts
    seed: int = 0  # seed of the bootstrap intervals

    def check(self) -> None:
        check_counts(self, "num_test")
        if not self.runs:
            raise UserError(f"there is no run to measure. {HINT}")


if __name__ == "__main__":
    settings = read_settings(Settings)

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import read_mask_record
from circuit_breaking.evaluation.bootstrap import estimate
from circuit_breaking.evaluation.compared_models import Engines, load_masked
from circuit_breaking.evaluation.tables import interval
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.indirect_objects import draw_models
from circuit_breaking.ioi.experiment import open_task
from circuit_breaking.ioi.measures import labels_of, prompt_measures, text_measures
from circuit_breaking.models.load import files_of, load_tokenizer
from circuit_breaking.runs.ioi_results import IOIReport
from circuit_breaking.runs.mask_record import MASK
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.tasks import OWTTask


@contextmanager
def masked(path: Path, engine: Engines) -> Iterator[Any]:
    """The model with a run's mask, rounded, and its ablation values while the block lasts; the whole model after."""
    model, _ = load_masked(path, engine)
    try:
        model.mask.round_()
        yield model
    finally:
        model.means, model.resample = None, False
        model.mask.reset_()


def main(settings: Settings) -> None:
    settings.check()
    masks = {run: settings.out / run / MASK for run in settings.runs}
    records = {run: read_mask_record(path, HINT) for run, path in masks.items()}
    first = next(iter(records.values()))
    defaults = {"model": "tiny", "task": "ioi", "prompts": "all", "length": 50, "text_column": "text"}
    settings = resolve_defaults(settings, {**first.data, "model": first.model or None}, defaults)
    settings = resolve_defaults(settings, default_data(settings.model, settings.prompts, settings.task))
    tuned = settings.out / settings.finetuned / "model" if settings.finetuned else None
    if tuned is not None and not tuned.is_dir():
        settings, tuned = replace(settings, finetuned=None), None
    tokenizer = load_tokenizer(settings.model)
    task = open_task(replace(settings, seed=0), tokenizer)
    ordinary = OWTTask(tokenizer, settings.ordinary, settings.length, text_column=settings.text_column)

    engine = cache(lambda split_qkv: load_model(settings.model, split_qkv, settings.device, settings.dtype))

    @contextmanager
    def loaded(path: Path) -> Iterator[Any]:
        yield load_model(path, device=settings.device, dtype=settings.dtype)

    @contextmanager
    def original() -> Iterator[Any]:
        yield engine(False)

    models: dict[str, Any] = {"original": original}
    models |= {run: partial(masked, path, engine) for run, path in masks.items()}
    if tuned is not None:
        models["fine-tuned"] = lambda: loaded(tuned)

    found: dict[str, Any] = {}
    sums: dict[str, dict[str, Any]] = {}
    for name, opened in models.items():
        with opened() as model:
            cut, every = model.mask.n_cut(), len(model.graph)
            sums[name] = prompt_measures(task, model, settings.num_test)
            sums[name]["ordinary_loss"] = text_measures(ordinary, model, settings.num_test)
        base = None if name == "original" else sums["original"]
        measures = {
            key: estimate(*pair, settings.seed, None if base is None else base[key]) for key, pair in sums[name].items()
        }
        found[name] = {"edges_cut": cut, "n_edges": every, "measures": measures}
    folder = settings.out / settings.report
    inputs = [*masks.values(), settings.test, Path(settings.ordinary), *files_of(settings.model)]
    run = provenance(settings, [path for path in inputs if path and path.is_file()])
    count = {"prompts": min(settings.num_test, len(task.test)), "texts": min(settings.num_test, len(ordinary.test))}
    IOIReport(models=found, measured_on=count, provenance=run).write(folder / "ioi_report.json")
    draw_models(folder)
    end_with_page(folder)
    show(found, settings.task)
    print(f"written to {folder}")


def show(models: dict[str, Any], task: str) -> None:
    """Print a row for each model, with 95% intervals in brackets."""
    labels = labels_of(task)
    rows = [
        [name, f"{one['edges_cut']:,}", *(interval(one["measures"][key]) for key in (*labels, "ordinary_loss"))]
        for name, one in models.items()
    ]
    title = "indirect objects" if task == "ioi" else task
    print_table(["", "edges cut", *labels.values(), "ordinary loss, nats"], rows, title)


if __name__ == "__main__":
    run_script(main, settings)
