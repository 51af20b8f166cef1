"""Fine-tune the whole model against toxic text, in five ways: what cutting a few edges is compared with.

    joint             ordinary loss - ratio · toxic loss (the paper's eq. 4)
    ascent            gradient ascent on toxic text alone
    task_arithmetic   learn toxic text, subtract the change times a scale
    npo, rmu          two unlearning methods of 2024 (circuit_breaking/unlearning.py says what each minimises)

Reads   a model; toxic posts and ordinary text, of which a part validates checkpoints.
Writes  data/toxicity/<run>/finetuned/<method>/: an ordinary Hugging Face model (the best checkpoint), finetuning.json
        (what was chosen, and why it ended), metrics.jsonl (a row a checkpoint), cost.json; and finetuning.png. While
        a method trains, checkpoints/, from which a run that was interrupted goes on when it is started again.
Time    half a minute for a method and learning rate on the shipped model, one core; a model of 135M parameters takes
        about 5 s a step.

Several learning rates are tried, and the best checkpoint of all on validation texts is kept. Best is by the
masks' objective, ordinary loss - alpha · toxic loss. Held-out texts are read by evaluation.py alone.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from circuit_breaking.errors import UserError
from circuit_breaking.figures.training import draw_finetuning
from circuit_breaking.models.activations import fused_activations
from circuit_breaking.models.load import files_of, load_hf_model, load_tokenizer
from circuit_breaking.models.save import save_hf_folder
from circuit_breaking.runs.cli import run_script
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.cost import COST_FILE, cost, with_earlier
from circuit_breaking.runs.files import read_json, write_json, write_jsonl
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.run_folder import CheckpointedParts, is_up_to_date, locked
from circuit_breaking.runs.signals import stop_signals
from circuit_breaking.toxicity.settings import FOLDER, default_data
from circuit_breaking.toxicity.splits import Splits, load_splits
from circuit_breaking.training.config import FinetuneSettings, check_finetune
from circuit_breaking.training.finetune import describe, finetune
from circuit_breaking.training.unlearning import METHODS

# What only goes one way is trained more slowly. On the shipped model the next rate up or down was worse for each.
SLOW, FAST = (1e-5, 1e-4), (1e-4, 1e-3)
LRS = {"joint": FAST, "ascent": SLOW, "task_arithmetic": SLOW, "npo": FAST, "rmu": FAST}
FINETUNING, PARTS = "finetuning.json", "checkpoints"
APART = ("methods", "lrs", "lr")  # settings that make no difference to a method at a learning rate


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
    resume: bool = True  # keep models that are there and go on from checkpoints, of the same settings, data and code
    checkpoint_every: int = 50  # steps between checkpoints; 0: only at the end and when told to stop (SIGTERM, SIGUSR1)
    device: str = "auto"  # auto, cpu, cuda, mps


def best_of_grid(settings: Settings, method: str, splits: Splits, parts: CheckpointedParts) -> tuple[Any, ...]:
    """(model, result, cost) of the learning rate whose best checkpoint has the lowest score; and of all rates the rows,
    the notes, and the seconds."""
    best, notes, history, seconds = None, [], [], 0.0
    for lr in rates_of(settings, method):
        hf = load_hf_model(settings.model, settings.device)
        toxic, ordinary = splits.tasks(settings.seed, validate=True)
        part = parts.open(f"lr_{lr}", lr=lr)
        with cost(hf.device) as spent, fused_activations(hf):
            result = finetune(hf, method, toxic, ordinary, replace(settings, lr=lr), **part)
        spent = with_earlier(spent, part["resume_from"].values["seconds"] if part["resume_from"] else 0.0)
        seconds += spent["seconds"]
        history += [{"lr": lr, **row} for row in result.history]
        if result.note:
            notes.append(f"lr {lr:g}: {result.note}")
        if result.best and (best is None or result.best["score"] < best[1].best["score"]):
            best = (hf, result, spent)
    return best, history, "; ".join(notes) or None, seconds


def rates_of(settings: Settings, method: str) -> tuple[float, ...]:
    return settings.lrs or LRS[method]


def make(folder: Path, settings: Settings, method: str, splits: Splits, tokenizer: Any, run: dict[str, Any]) -> None:
    """Fine-tune by one method, write what came of it, and say so."""
    parts = CheckpointedParts(folder / PARTS, run, settings.resume, settings.checkpoint_every, APART)
    (hf, result, spent), history, notes, seconds = best_of_grid(settings, method, splits, parts)
    save_hf_folder(folder, hf, tokenizer)
    write_jsonl(folder / "metrics.jsonl", history)
    write_json(folder / COST_FILE, {**spent, "seconds_with_tuning": round(seconds, 2)})
    # last: it says that the folder is complete
    write_json(folder / FINETUNING, {**describe(replace(result, note=notes)), **run})
    parts.remove()
    row = result.best
    print(
        f"{method}: lr {result.settings.lr:g}, step {row['step']}, validation loss toxic {row['toxic']:.3f}, "
        f"ordinary {row['ordinary']:.3f}; {seconds:.0f} s"
    )
    if notes:
        print(f"note: {method}: {notes}.")


def main(settings: Settings) -> None:
    check_finetune(settings)
    check_counts(settings, "validation", "length")
    if unknown := [name for name in settings.methods if name not in METHODS]:
        raise UserError(f"there is no method {unknown[0]!r}; choose from {', '.join(METHODS)}.")
    if not settings.methods:
        raise UserError(f"methods is empty; choose from {', '.join(METHODS)}.")
    settings = resolve_defaults(settings, default_data(settings.model))
    folder = settings.out / settings.run / "finetuned"
    tokenizer = load_tokenizer(settings.model)
    splits = load_splits(
        tokenizer, settings.toxic_train, settings.toxic_test, settings.ordinary, settings.length,
        settings.examples or None, settings.validation, settings.seed,
    )  # fmt: skip
    record = provenance(settings, [*splits.files, *files_of(settings.model)], texts=splits.about)
    with stop_signals():
        for method in settings.methods:
            run = {**record, "method": method, "lrs": rates_of(settings, method)}
            with locked(folder / method):
                place = folder / method
                complete = bool(files_of(str(place))) and is_up_to_date(place / FINETUNING, read_json, run, *APART)
                if settings.resume and complete:
                    print(f"{method}: is there, of the same settings, data and code; --no-resume makes it anew")
                else:
                    make(place, settings, method, splits, tokenizer, run)
    draw_finetuning(folder)
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, Settings)
