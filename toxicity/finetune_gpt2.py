"""Fine-tune the whole model against toxic text, in five ways: what cutting a few edges is compared with.

    joint             ordinary loss - ratio · toxic loss (the paper's eq. 4)
    ascent            gradient ascent on toxic text alone
    task_arithmetic   learn toxic text, subtract the change times a scale
    npo, rmu          two unlearning methods of 2024 (circuit_breaking/unlearning.py says what each minimises)

Reads   a model; toxic posts and ordinary text, of which a part validates checkpoints.
Writes  data/toxicity/<run>/finetuned/<method>/: an ordinary Hugging Face model (the best checkpoint), finetuning.json
        (what was chosen, and why it ended), metrics.jsonl (a row a checkpoint), cost.json; and finetuning.png.
Time    half a minute for a method and learning rate on the shipped model, one core; a model of 135M parameters takes
        about 5 s a step.

Several learning rates are tried, and the best checkpoint of all on validation texts is kept. Best is by the
masks' objective, ordinary loss - alpha · toxic loss. Held-out texts are read by evaluation.py alone.
"""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils import FOLDER, check_counts, default_data, files_of, fill_in

from circuit_breaking.cli import UserError, run_script
from circuit_breaking.comparison_figures import draw_finetuning
from circuit_breaking.costs import COST_FILE, cost
from circuit_breaking.files import provenance, write_json, write_jsonl
from circuit_breaking.finetuning import Finetuned, FinetuneSettings, describe, finetune
from circuit_breaking.models import load_hf_model, load_tokenizer
from circuit_breaking.splits import Splits, load_splits
from circuit_breaking.unlearning import METHODS

# What only goes one way is trained more slowly. On the shipped model the next rate up or down was worse for each.
SLOW, FAST = (1e-5, 1e-4), (1e-4, 1e-3)
LRS = {"joint": FAST, "ascent": SLOW, "task_arithmetic": SLOW, "npo": FAST, "rmu": FAST}


@dataclass
class Settings(FinetuneSettings):
    model: str = "tiny"  # "tiny" (shipped), a hub name such as gpt2, a folder, or a folder holding a .gguf
    methods: tuple[str, ...] = tuple(METHODS)  # which methods to run
    lrs: tuple[float, ...] = ()  # learning rates to try, the best is kept; none: two for each method, see LRS
    toxic_train: Path | None = None  # toxic texts to unlearn; None: shipped for tiny, else posts/train.jsonl
    toxic_test: Path | None = None  # toxic texts held out, only to make sure none is trained on; None: as above
    ordinary: str | None = None  # "tiny", a text file, or a data set's hub name; None: tiny, else NeelNanda/pile-10k
    run: str = "finetune"  # name of the run folder, data/toxicity/<run>
    out: Path = FOLDER  # where run folders are

    length: int = 50  # tokens a text is cut to
    examples: int = 100  # toxic texts to train on; 0: all that do not validate
    validation: int = 50  # most texts of each kind that choose checkpoints; at most a fifth
    lr: float = 1e-4  # not used here: see lrs
    seed: int = 0  # of the choice and the order of texts
    device: str = "auto"  # auto, cpu, cuda, mps


def best_of_grid(settings: Settings, method: str, splits: Splits, history: list[dict[str, Any]]) -> tuple[Any, ...]:
    """(model, result, its cost) of the learning rate whose best checkpoint has the lowest score, and notes on all.
    Every rate's rows go into `history`."""
    best, notes = None, []
    for lr in settings.lrs or LRS[method]:
        hf = load_hf_model(settings.model, settings.device)
        toxic, ordinary = splits.tasks(settings.seed, validate=True)
        with cost(hf.device) as spent:
            result = finetune(
                hf,
                method,
                toxic,
                ordinary,
                replace(settings, lr=lr),
                lambda row, lr=lr: history.append({"lr": lr, **row}),
            )
        if result.note:
            notes.append(f"lr {lr:g}: {result.note}")
        if result.best and (best is None or result.best["score"] < best[1].best["score"]):
            best = (hf, result, spent)
    return best, "; ".join(notes) or None


def save(folder: Path, hf: Any, tokenizer: Any, result: Finetuned, record: dict[str, Any]) -> None:
    """Write the model as an ordinary Hugging Face folder; what was there before is replaced."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}. Choose another folder.") from error
    write_json(folder / "finetuning.json", {**describe(result), **record})


def main(settings: Settings) -> None:
    check_counts(settings, "validation", "length")
    if unknown := [name for name in settings.methods if name not in METHODS]:
        raise UserError(f"there is no method {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    if not settings.methods:
        raise UserError(f"methods is empty; choose from {', '.join(METHODS)}.")
    settings = fill_in(settings, default_data(settings.model))
    folder = settings.out / settings.run / "finetuned"
    tokenizer = load_tokenizer(settings.model)
    splits = load_splits(
        tokenizer, settings.toxic_train, settings.toxic_test, settings.ordinary, settings.length,
        settings.examples or None, settings.validation, settings.seed,
    )  # fmt: skip
    record = provenance(settings, [*splits.files, *files_of(settings.model)], texts=splits.about)
    for method in settings.methods:
        history: list[dict[str, Any]] = []
        begin = time.perf_counter()
        (hf, result, spent), notes = best_of_grid(settings, method, splits, history)
        seconds = time.perf_counter() - begin
        save(folder / method, hf, tokenizer, replace(result, note=notes), record)
        write_jsonl(folder / method / "metrics.jsonl", history)
        write_json(folder / method / COST_FILE, {**spent, "seconds_with_tuning": round(seconds, 2)})
        row = result.best
        print(
            f"{method}: lr {result.settings.lr:g}, step {row['step']}, validation loss toxic {row['toxic']:.3f}, "
            f"ordinary {row['ordinary']:.3f}; {seconds:.0f} s"
        )
        if notes:
            print(f"note: {method}: {notes}.")
    draw_finetuning(folder)
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, Settings)
