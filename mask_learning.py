"""Learn which few weights to set to zero so that a model stops producing toxic text: a mask over weights, not edges.

    python mask_learning.py --model tiny                       # 0.05% of the weights of the shipped model
    python mask_learning.py --model tiny --granularity neuron

Reads   a model of any supported family; toxic texts for training and held-out ones; ordinary text; prompts.
Writes  data/mask_learning/<run>/: settings.json; metrics.jsonl, one row per step; weight_mask.safetensors, the numbers
        of the masked units; report.json and report.png, what toxicity/evaluation.py measures of edge masks, in the same
        form; training.png; model/, with --save-model, a Hugging Face model whose masked weights are zero. During
        training also checkpoints, from which the same command continues an interrupted run.
Time    a minute for the shipped model on one core.

To break or keep something else, put other tasks into `load_tasks`. No text that a model writes is printed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from circuit_breaking.evaluation.settings import MeasureSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.files import DATA
from circuit_breaking.runs.settings import ModelSettings, OutSettings, ResumeSettings, TrackingSettings
from circuit_breaking.toxicity.settings import ToxicDataSettings, default_data, require_data
from circuit_breaking.training.config import WeightMaskSettings, check_weight_mask


@dataclass
class Settings(
    WeightMaskSettings, MeasureSettings, ToxicDataSettings, ModelSettings, OutSettings, ResumeSettings, TrackingSettings
):
    MOST_USED: ClassVar = (
        "model", "granularity", "max_masked", "method", "alpha", "examples", "scorer", "save_model", "run", "seed",
        "device",
    )  # fmt: skip

    model: str = "gpt2-medium"  # a name on the Hugging Face hub, tiny (the shipped model), a folder or a .gguf file
    granularity: Literal["weight", "neuron", "head"] = "weight"  # unit that is masked as a whole
    method: Literal["clamped", "hard-concrete"] = "clamped"  # how weights in [0, 1] are learned
    ordinary_prompts: Path | None = None  # JSON Lines; None: the shipped ones, or the first words of held-out texts
    out: Path = DATA / "mask_learning"
    examples: int = 100  # toxic texts to learn from; 0: all of the file
    num_prompts: int = 100  # most prompts of each kind; 0: no continuations are sampled
    eval_batch: int = 32  # texts or continuations per forward pass when measuring
    save_model: bool = False  # also write the masked model as a Hugging Face folder

    def check(self) -> None:
        check_weight_mask(self)
        check_counts(self, "num_texts", "samples", "prompt_tokens", "new_tokens", "eval_batch")
        require_data(self)


if __name__ == "__main__":
    settings = read_settings(Settings)

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from circuit_breaking.ablation.weight_mask import WeightMask, mask_weights, save_weight_mask, shares
from circuit_breaking.evaluation.generate import Sampling
from circuit_breaking.evaluation.measure import evaluate
from circuit_breaking.evaluation.measurements import TOXIC
from circuit_breaking.evaluation.scorers import load_scorer
from circuit_breaking.evaluation.tables import show
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.report import draw_report
from circuit_breaking.figures.training import draw_training
from circuit_breaking.models.load import files_of, load_hf_model, load_tokenizer
from circuit_breaking.models.save import save_hf_folder
from circuit_breaking.models.tokens import prefix_token
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.records import RunSettings
from circuit_breaking.runs.results import REPORT, Report
from circuit_breaking.runs.run_folder import METRICS, recorded
from circuit_breaking.tasks import OWTTask, ToxicTask
from circuit_breaking.tasks.owt import load_texts
from circuit_breaking.toxicity.inputs import load_prompts
from circuit_breaking.training.weight_trainer import train_weight_mask


def load_tasks(settings: Settings, tokenizer) -> dict[str, ToxicTask | OWTTask]:
    """What to break and what to keep: any `circuit_breaking.tasks.Task`."""
    return {
        "toxic": ToxicTask(
            tokenizer, settings.toxic_train, settings.toxic_test, settings.length, settings.examples or None,
            settings.seed,
        ),
        "ordinary": OWTTask(
            tokenizer, settings.ordinary, settings.length, seed=settings.seed, text_column=settings.text_column
        ),
    }  # fmt: skip


@contextmanager
def masked(hf: nn.Module, mask: WeightMask) -> Iterator[nn.Module]:
    """The model with masked weights zero, while the block lasts."""
    with mask_weights(hf, mask):
        yield hf


def main(settings: Settings) -> None:
    settings.check()
    settings = resolve_defaults(settings, default_data(settings.model))
    torch.manual_seed(settings.seed)
    folder = settings.out / settings.run
    tokenizer = load_tokenizer(settings.model)
    tasks = load_tasks(settings, tokenizer)
    sources = {
        "toxic": settings.toxic_test,
        "ordinary": settings.ordinary_prompts
        or load_texts(settings.ordinary, 4 * settings.num_prompts or 1, settings.text_column)[1],
    }
    prompts = {
        name: load_prompts(tokenizer, source, settings.num_prompts, settings.prompt_tokens)
        for name, source in sources.items()
        if settings.num_prompts
    }
    scorer = load_scorer(settings.scorer, settings.device)
    hf = load_hf_model(settings.model, settings.device, settings.dtype, only_supported=True)
    inputs = [settings.toxic_train, settings.toxic_test, Path(settings.ordinary), *files_of(settings.model)]
    record = provenance(settings, [path for path in inputs if path.is_file()])
    with recorded(folder, record, settings.resume, settings.checkpoint_every, log_with=settings.log_with) as how:
        RunSettings(script="mask_learning.py", provenance=record).write(folder / "settings.json")
        result = train_weight_mask(hf, tasks["toxic"], tasks["ordinary"], settings, **how)
        save_weight_mask(folder / "weight_mask.safetensors", hf, result.mask, record, settings.model)
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
    report = Report(
        models={"original": measured["original"], "masked": {**measured["masked"], "masked": share}},
        scorer={"name": scorer.name, "version": scorer.version, "threshold": TOXIC},
        reference="original",
        model=settings.model,
        samples=settings.samples,
        num_texts={name: len(batch) for name, batch in texts.items()},
        num_prompts={name: len(batch) for name, batch in prompts.items()},
        provenance=record,
    )
    report.write(folder / REPORT)
    if (folder / METRICS).stat().st_size:  # no step was made if nothing may be masked
        draw_training(folder, count="n_masked", counted=f"{settings.granularity}s masked", final=share["units"])
    if prompts:  # else there is little to draw
        draw_report(folder)
    end_with_page(folder)
    show(report.to_json())
    print(
        f"{share['units']:,} of {share['all_units']:,} {settings.granularity}s masked, {share['weights']:,} of the "
        f"model's {share['all_weights']:,} weights ({share['weights'] / share['all_weights']:.3%}), in "
        f"{result.seconds:.0f} s"
    )
    if measured["masked"]["note"]:
        print(f"note: {measured['masked']['note']}.")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, settings)
