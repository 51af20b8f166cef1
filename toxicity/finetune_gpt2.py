"""Remove toxicity in other ways than by cutting edges: nine baselines.

    joint             fine-tuning on ordinary loss - ratio · toxic loss (the paper's eq. 4)
    ascent            gradient ascent on toxic text alone
    task_arithmetic   learn toxic text, then subtract the change times a scale
    npo, lora_npo     negative preference optimisation of all weights, or of low-rank adapters
    rmu, rerouting    activations on toxic text are moved to a random direction, or away from where they were
    steering          a vector is subtracted from the residual stream after one layer
    direction         one direction is removed from everything that is written to the residual stream

circuit_breaking/training/baselines/ has a file with the formula and the source of each.

Reads   a model; toxic posts and ordinary text, a part of which is used for validation.
Writes  data/toxicity/<run>/finetuned/<method>/: a Hugging Face model, the best checkpoint; finetuning.json, what was
        chosen and why training ended; metrics.jsonl, one row per validation; cost.json. Also finetuning.png. During
        training checkpoints/, from which the same command continues an interrupted run.
Time    half a minute per method and learning rate for the shipped model on one core; about 5 s per step for a model of
        135M parameters.

Several learning rates are tried, and the checkpoint with the best validation score is kept; for steering and direction,
the best of all layers and scales. The score is the objective of the masks, ordinary loss - alpha · toxic loss. Only
evaluation.py reads held-out texts. Adapters are merged, so every result is a stock model.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.settings import Float32ModelSettings, ResumeSettings
from circuit_breaking.toxicity.settings import ToxicDataSettings, ToxicRunSettings, default_data, require_data
from circuit_breaking.training.baselines import METHODS
from circuit_breaking.training.config import FinetuneSettings, check_finetune


@dataclass
class Settings(FinetuneSettings, ToxicDataSettings, Float32ModelSettings, ToxicRunSettings, ResumeSettings):
    MOST_USED: ClassVar = (
        "model", "methods", "lrs", "steps", "alpha", "ratio", "examples", "batch_size", "run", "seed", "device",
    )  # fmt: skip

    methods: tuple[str, ...] = tuple(METHODS)  # methods to run
    lrs: tuple[float, ...] = ()  # learning rates to try, the best is kept; none: two that suit each method
    examples: int = 100  # toxic texts to train on; 0: all that are not used for validation
    validation: int = 50  # most texts of each kind for validation; never more than a fifth
    lr: float = 1e-4  # not used here: see lrs

    def check(self) -> None:
        check_finetune(self)
        check_counts(self, "validation", "length")
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise UserError(f"there is no method {unknown[0]!r}; choose from {', '.join(METHODS)}.")
        if not self.methods:
            raise UserError(f"methods is empty; choose from {', '.join(METHODS)}.")
        require_data(self)


if __name__ == "__main__":
    settings = read_settings(Settings)

from pathlib import Path

from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.training import draw_finetuning
from circuit_breaking.models.activations import fused_activations
from circuit_breaking.models.load import files_of, load_hf_model, load_tokenizer
from circuit_breaking.models.save import CONFIG, save_hf_folder
from circuit_breaking.runs.cost import COST_FILE, cost, with_earlier
from circuit_breaking.runs.files import write_json, write_jsonl
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.records import PROVENANCE, fingerprint
from circuit_breaking.runs.results import FineTuning, choice_in_words
from circuit_breaking.runs.run_folder import CheckpointedParts, is_up_to_date, locked, resume_key
from circuit_breaking.runs.signals import stop_signals
from circuit_breaking.toxicity.splits import Splits, load_splits
from circuit_breaking.training.baselines import baseline
from circuit_breaking.training.baselines.base import Method
from circuit_breaking.training.finetune import describe, finetune

FINETUNING, PARTS = "finetuning.json", "checkpoints"
APART = ("methods", "lrs", "lr")  # settings that make no difference to a method at a learning rate


def best_of_grid(settings: Settings, method: str, splits: Splits, parts: CheckpointedParts) -> tuple[Any, ...]:
    """(model, result, cost) of the learning rate whose best checkpoint has the lowest score; and of all rates the rows,
    the notes, and the seconds."""
    best, notes, history, seconds = None, [], [], 0.0
    for lr in rates_of(settings, method):
        hf = load_hf_model(settings.model, settings.device)
        toxic, ordinary = splits.tasks(settings.seed, validate=True)
        part = parts.open("candidates" if lr is None else f"lr_{lr}", lr=lr)
        with cost(hf.device) as spent, fused_activations(hf):
            how = settings if lr is None else replace(settings, lr=lr)
            result = finetune(hf, method, toxic, ordinary, how, **part)
        spent = with_earlier(spent, part["resume_from"].values["seconds"] if part["resume_from"] else 0.0)
        seconds += spent["seconds"]
        history += [{"lr": lr, **row} for row in result.history]
        if result.note:
            notes.append(result.note if lr is None else f"lr {lr:g}: {result.note}")
        if result.best and (best is None or result.best["score"] < best[1].best["score"]):
            best = (hf, result, spent)
    return best, history, "; ".join(notes) or None, seconds


def rates_of(settings: Settings, method: str) -> tuple[float | None, ...]:
    """The learning rates to try; only None for a method that has none."""
    chosen = baseline(method)
    return settings.lrs or chosen.lrs if isinstance(chosen, Method) else (None,)


def make(folder: Path, settings: Settings, method: str, splits: Splits, tokenizer: Any, run: dict[str, Any]) -> None:
    """Fine-tune by one method, write what came of it, and say so."""
    parts = CheckpointedParts(folder / PARTS, run, settings.resume, settings.checkpoint_every, APART)
    (hf, result, spent), history, notes, seconds = best_of_grid(settings, method, splits, parts)
    record = FineTuning(
        **describe(replace(result, note=notes)), lrs=[lr for lr in run["lrs"] if lr is not None],
        made_from=fingerprint(resume_key(run, *APART)),
        provenance={name: run[name] for name in PROVENANCE if name in run},
    )  # fmt: skip

    def write_records(staged: Path) -> None:
        write_jsonl(staged / "metrics.jsonl", history)
        write_json(staged / COST_FILE, {**spent, "seconds_with_tuning": round(seconds, 2)})
        record.write(staged / FINETUNING)

    save_hf_folder(folder, hf, tokenizer, write_records)
    parts.remove()
    losses = f"validation loss toxic {result.best['toxic']:.3f}, ordinary {result.best['ordinary']:.3f}"
    print(f"{method}: {choice_in_words(record.chosen) or 'the original'}, {losses}; {seconds:.0f} s")
    if notes:
        print(f"note: {method}: {notes}.")


def main(settings: Settings) -> None:
    settings.check()
    settings = resolve_defaults(settings, default_data(settings.model))
    folder = settings.out / settings.run / "finetuned"
    tokenizer = load_tokenizer(settings.model)
    splits = load_splits(
        tokenizer, settings.toxic_train, settings.toxic_test, settings.ordinary, settings.length,
        settings.examples or None, settings.validation, settings.seed, settings.text_column,
    )  # fmt: skip
    record = provenance(settings, [*splits.files, *files_of(settings.model)], texts=splits.about)
    with stop_signals():
        for method in settings.methods:
            run = {**record, "method": method, "lrs": rates_of(settings, method)}
            with locked(folder / method):
                place = folder / method
                made_from = fingerprint(resume_key(run, *APART))
                complete = (place / CONFIG).is_file() and bool(files_of(str(place)))
                made = complete and is_up_to_date(place / FINETUNING, made_from, FineTuning.read)
                if settings.resume and made:
                    print(f"{method}: is there, of the same settings, data and code; --no-resume makes it again")
                else:
                    make(place, settings, method, splits, tokenizer, run)
    draw_finetuning(folder)
    end_with_page(folder.parent)
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, settings)
