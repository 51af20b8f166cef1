"""Learn which few weights to set to zero so that a model stops producing toxic text: a mask over weights, not edges.

Reads   a model of any supported family; toxic texts (train and held out); ordinary text; prompts.
Writes  data/mask_learning/<run>/: settings.json, metrics.jsonl (a row a step), weight_mask.safetensors (the numbers of
        the masked units, nothing dense), report.json and report.png (what toxicity/evaluation.py measures of edge
        masks, in the same form), and, if asked for, model/ (a stock Hugging Face model, masked weights zero); and
        checkpoints, from which a run that was interrupted goes on when it is started again.
Time    a minute for the shipped model on one core.

    python mask_learning.py --model tiny                       # 0.05% of the weights of the shipped model
    python mask_learning.py --model tiny --granularity neuron

To break or keep something else, put other tasks into `load_tasks`. Nothing that a model writes is printed.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import nn

from circuit_breaking.ablation.weight_mask import WeightMask, mask_weights, save_weight_mask, shares
from circuit_breaking.evaluation.generate import Sampling
from circuit_breaking.evaluation.measure import evaluate
from circuit_breaking.evaluation.measurements import TOXIC
from circuit_breaking.evaluation.scorers import load_scorer
from circuit_breaking.evaluation.tables import table
from circuit_breaking.figures.report import draw_report
from circuit_breaking.models.load import files_of, load_hf_model, load_tokenizer
from circuit_breaking.models.save import save_hf_folder
from circuit_breaking.models.tokens import prefix_token
from circuit_breaking.runs.cli import run_script
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.files import DATA, write_json
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.run_folder import recorded
from circuit_breaking.tasks import OWTTask, ToxicTask
from circuit_breaking.tasks.owt import load_texts
from circuit_breaking.toxicity.inputs import load_prompts
from circuit_breaking.toxicity.settings import default_data
from circuit_breaking.training.config import WeightMaskSettings
from circuit_breaking.training.weight_trainer import train_weight_mask


@dataclass
class Settings(WeightMaskSettings):
    model: str = "gpt2-medium"  # a hub name, "tiny" (shipped), a folder, or a folder holding a .gguf
    toxic_train: Path | None = None  # toxic texts to learn from; None: shipped for tiny, else data/toxicity/posts
    toxic_test: Path | None = None  # toxic texts held out; None: as above
    ordinary: str | None = None  # "tiny", a text file, or a data set's hub name; None: tiny, else NeelNanda/pile-10k
    ordinary_prompts: Path | None = None  # JSON Lines; None: the shipped ones, or beginnings of held-out texts
    run: str = "run"  # name of the run folder, data/mask_learning/<run>
    out: Path = DATA / "mask_learning"  # where run folders are

    granularity: Literal["weight", "neuron", "head"] = "weight"  # what is masked as a whole
    method: Literal["clamped", "hard-concrete"] = "clamped"  # how weights in [0, 1] are learned
    length: int = 50  # tokens a text is cut to
    examples: int = 100  # toxic texts to learn from; 0: all of the file
    num_texts: int = 500  # most held-out texts of each kind whose loss is measured
    num_prompts: int = 100  # most prompts of each kind; 0: nothing is sampled
    samples: int = 5  # continuations of each prompt
    prompt_tokens: int = 10  # how much of a text is its prompt, where no prompt is written out
    new_tokens: int = 20  # most tokens of a continuation
    scorer: str = "auto"  # detoxify, profanity-check, or auto: detoxify where it can be had
    eval_batch: int = 32  # texts or continuations at a time when measuring
    save_model: bool = False  # write the masked model as a Hugging Face folder too
    seed: int = 0  # another seed, another order of texts
    resume: bool = True  # go on from the run folder's checkpoint, if it is of the same settings, data and code
    checkpoint_every: int = 50  # steps between checkpoints; 0: only at the end and when told to stop (SIGTERM, SIGUSR1)
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "float32"  # float32 or bfloat16


def load_tasks(settings: Settings, tokenizer) -> dict[str, ToxicTask | OWTTask]:
    """What to break and what to keep: any `circuit_breaking.tasks.Task`."""
    return {
        "toxic": ToxicTask(
            tokenizer, settings.toxic_train, settings.toxic_test, settings.length, settings.examples or None,
            settings.seed,
        ),
        "ordinary": OWTTask(tokenizer, settings.ordinary, settings.length, seed=settings.seed),
    }  # fmt: skip


@contextmanager
def masked(hf: nn.Module, mask: WeightMask) -> Iterator[nn.Module]:
    """The model with masked weights zero, while the block lasts."""
    with mask_weights(hf, mask):
        yield hf


def main(settings: Settings) -> None:
    check_counts(settings, "num_texts", "samples", "prompt_tokens", "new_tokens", "eval_batch")
    settings = resolve_defaults(settings, default_data(settings.model))
    torch.manual_seed(settings.seed)
    folder = settings.out / settings.run
    tokenizer = load_tokenizer(settings.model)
    tasks = load_tasks(settings, tokenizer)
    sources = {
        "toxic": settings.toxic_test,
        "ordinary": settings.ordinary_prompts or load_texts(settings.ordinary, 4 * settings.num_prompts or 1)[1],
    }
    prompts = {
        name: load_prompts(tokenizer, source, settings.num_prompts, settings.prompt_tokens)
        for name, source in sources.items()
        if settings.num_prompts
    }
    scorer = load_scorer(settings.scorer, settings.device)
    hf = load_hf_model(settings.model, settings.device, settings.dtype)
    inputs = [settings.toxic_train, settings.toxic_test, Path(settings.ordinary), *files_of(settings.model)]
    record = provenance(settings, [path for path in inputs if path.is_file()], model=settings.model)
    with recorded(folder, record, settings.resume, settings.checkpoint_every) as how:
        write_json(folder / "settings.json", record)
        result = train_weight_mask(hf, tasks["toxic"], tasks["ordinary"], settings, **how)
        save_weight_mask(folder / "weight_mask.safetensors", hf, result.mask, record)
    if settings.save_model:
        with mask_weights(hf, result.mask):
            save_hf_folder(folder / "model", hf, tokenizer)

    models = {"original": lambda: nullcontext(hf), "masked": lambda: masked(hf, result.mask)}
    texts = {name: task.test[: settings.num_texts] for name, task in tasks.items()}
    sampling = Sampling(
        prefix_token(tokenizer), settings.samples, settings.new_tokens, settings.eval_batch, settings.seed
    )
    measured, _ = evaluate(models, tokenizer, texts, prompts, scorer, sampling)
    share = shares(result.mask, hf)
    for one in measured.values():
        one["edges_cut"] = 0
    report = {
        "scorer": {"name": scorer.name, "version": scorer.version, "threshold": TOXIC},
        "reference": "original",
        "models": {"original": measured["original"], "masked": {**measured["masked"], "masked": share}},
        "num_texts": {name: len(batch) for name, batch in texts.items()},
        "num_prompts": {name: len(batch) for name, batch in prompts.items()},
        **record,
    }
    write_json(folder / "report.json", report)
    if prompts:  # else there is little to draw
        draw_report(folder)
    Console().print(table(report))
    print(
        f"{share['units']:,} of {share['all_units']:,} {settings.granularity}s masked, {share['weights']:,} of the "
        f"model's {share['all_weights']:,} weights ({share['weights'] / share['all_weights']:.3%}), in "
        f"{result.seconds:.0f} s"
    )
    if measured["masked"]["note"]:
        print(f"note: {measured['masked']['note']}.")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, Settings)
