"""Fine-tune all weights on the objective that masks are trained for, to compare with cutting edges.

Reads   a model; prompts (make_ioi_datasets.py); ordinary text.
Writes  data/ioi/<run>/: model/, a Hugging Face folder with its tokenizer; settings.json; metrics.jsonl. During training
        also checkpoints, from which the same command continues an interrupted run.
Time    half a minute for the shipped model on one core.

Minimises ordinary loss - alpha * indirect-object loss. A prompt counts with at most `break_cap`, because without a cap
this loss has no minimum. Despite the name of the script, any model that the other scripts take can be fine-tuned.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.ioi.settings import (
    IOIRunSettings,
    ObjectiveSettings,
    PromptSettings,
    default_data,
    require_prompts,
)
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.settings import ModelSettings, ResumeSettings, TrackingSettings


@dataclass
class Settings(ObjectiveSettings, PromptSettings, ModelSettings, IOIRunSettings, ResumeSettings, TrackingSettings):
    MOST_USED: ClassVar = (
        "model", "task", "prompts", "steps", "batch_size", "lr", "alpha", "break_cap", "objective", "run", "seed",
        "device",
    )  # fmt: skip

    run: str = "finetuned"
    steps: int = 100  # steps of training
    batch_size: int = 10  # prompts and texts per step
    lr: float = 1e-4  # learning rate of AdamW without weight decay

    def check(self) -> None:
        check_counts(self, "steps", "batch_size")
        if self.lr <= 0:
            raise UserError(f"lr is {self.lr}; it must be above 0.")
        require_prompts(self)


if __name__ == "__main__":
    settings = read_settings(Settings)

import math
from collections.abc import Callable

import torch
from torch import nn

from circuit_breaking.ioi.experiment import open_task
from circuit_breaking.models.load import files_of, load_hf_model, load_tokenizer
from circuit_breaking.models.save import save_hf_folder
from circuit_breaking.runs.checkpoints import (
    Checkpoints,
    Saved,
    restore_parts,
    restore_training,
    state_of,
    training_state,
)
from circuit_breaking.runs.files import read_jsonl
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.records import RunSettings
from circuit_breaking.runs.run_folder import recorded
from circuit_breaking.tasks import OWTTask, PromptTask
from circuit_breaking.tasks.losses import trainable_prediction_losses
from circuit_breaking.tasks.stock_model import StockModel
from circuit_breaking.training.loop import Row, run_steps


def main(settings: Settings) -> None:
    settings.check()
    settings = resolve_defaults(settings, default_data(settings.model, settings.prompts, settings.task))
    torch.manual_seed(settings.seed)
    folder = settings.out / settings.run
    tokenizer = load_tokenizer(settings.model)
    task = open_task(settings, tokenizer, settings.objective)
    ordinary = OWTTask(
        tokenizer, settings.ordinary, settings.length, seed=settings.seed, text_column=settings.text_column
    )
    inputs = [settings.train, settings.test, Path(settings.ordinary), *files_of(settings.model)]
    record = provenance(settings, [path for path in inputs if path and path.is_file()])
    hf = load_hf_model(settings.model, settings.device, settings.dtype)
    with recorded(folder, record, settings.resume, settings.checkpoint_every, log_with=settings.log_with) as how:
        finetune(hf, task, ordinary, settings, **how)
        save_hf_folder(folder / "model", hf, tokenizer)
        RunSettings(script="ioi/finetune_gpt2.py", provenance=record).write(folder / "settings.json")
        how["checkpoints"].remove()
    rows = read_jsonl(folder / "metrics.jsonl")
    print(f"ordinary loss {rows[0]['keep_loss']:.3f} -> {rows[-1]['keep_loss']:.3f} (batches), written to {folder}")


def finetune(
    hf: nn.Module,
    task: PromptTask,
    ordinary: OWTTask,
    settings: Settings,
    on_step: Callable[[dict[str, Any]], None],
    checkpoints: Checkpoints,
    resume_from: Saved | None = None,
) -> None:
    """Train all weights in place, without dropout. `on_step` receives a row of metrics after each step."""
    hf.requires_grad_(True)
    stock, parameters = StockModel(hf), dict(hf.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.lr, weight_decay=0.0)
    tasks, done = {"ioi": task, "ordinary": ordinary}, 0
    if resume_from is not None:
        done = resume_from.step
        restore_training(optimizer, parameters, resume_from.tensors)
        restore_parts(resume_from.tensors, tasks)
    losses = {}

    def step(number: int) -> Row:
        keep = trainable_prediction_losses(hf, ordinary.draw(settings.batch_size))[0].mean()
        broken = task.loss(stock, task.draw(settings.batch_size), cap=settings.break_cap)
        loss = keep - settings.alpha * broken
        if not math.isfinite(float(loss.detach())):
            raise UserError(f"the loss is not finite any more at step {number}. Lower the learning rate or alpha.")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update(keep_loss=float(keep.detach()), break_loss=float(broken.detach()))
        return dict(losses)

    run_steps(
        step,
        settings.steps,
        label="fine-tuning",
        done=done,
        describe=lambda: f"keep {losses['keep_loss']:.3f}, break {losses['break_loss']:.3f}",
        on_step=on_step,
        checkpoints=checkpoints,
        state=lambda: training_state(optimizer, parameters) | state_of(**tasks),
    )
    hf.requires_grad_(False)


if __name__ == "__main__":
    run_script(main, settings)
