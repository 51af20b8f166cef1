"""Compute ablation values: the mean output of every node over ABC prompts (no name repeats) or ordinary text.

Reads   a model; the ABC prompts that make_ioi_datasets.py wrote, or the training part of the ordinary text.
Writes  data/ioi/means/<model>_<kind>_<texts>.safetensors, for the setting `means` of the other scripts here.
Time    seconds for the shipped model; 0.1 s per prompt for a model of 135M parameters on one core.

Means per position serve prompts whose names are at the same positions: the sets one and two, whose templates have one
layout. Beyond the longest prompt, which only ordinary text reaches, they are the plain means.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from circuit_breaking.errors import UserError
from circuit_breaking.ioi.settings import FOLDER, default_data, prompts_of
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_ablate_from, check_choice, check_counts, resolve_defaults
from circuit_breaking.runs.settings import AblateFromSettings, ModelSettings, OffloadSettings, OrdinaryTextSettings
from circuit_breaking.tasks.registry import IOI, PROMPT_TASKS


@dataclass
class Settings(OrdinaryTextSettings, ModelSettings, OffloadSettings, AblateFromSettings):
    MOST_USED: ClassVar = ("model", "task", "kind", "texts", "prompts", "num_texts", "length", "out", "device")

    kind: Literal["zero", "mean", "position"] = "mean"  # zeros, one mean per node, or one per node and position
    task: Literal[tuple(PROMPT_TASKS)] = "ioi"  # behaviour that the means are for (docs/tasks.md)
    texts: Literal["abc", "ordinary"] = "abc"  # abc: prompts with three names, or other tasks' counterfactual prompts
    prompts: Literal["one", "two", "all"] = "all"  # ioi: set of ABC prompts
    abc: Path | None = None  # ioi: ABC prompts; None: those of the set that make_ioi_datasets.py wrote for this model
    num_texts: int = 1000  # most texts that the mean is over
    length: int = 50  # tokens of an ordinary text that are used; for kind position also the longest text to serve
    batch_size: int = 8  # texts per forward pass
    out: Path | None = None  # file to write; None: in data/ioi/means, named by model, kind and texts

    def check(self) -> None:
        check_counts(self, "num_texts", "length", "batch_size")
        check_ablate_from(self)
        check_choice("task", self.task, PROMPT_TASKS)
        if self.task != IOI and self.abc is not None:
            raise UserError(f"prompts of the task {self.task} are generated. Leave abc out.")


if __name__ == "__main__":
    settings = read_settings(Settings)

import torch
import torch.nn.functional as F

from circuit_breaking.engine.ablation_values import compute_means, save_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.ioi.prompts import check_layout
from circuit_breaking.models.load import files_of, load_tokenizer
from circuit_breaking.models.tokens import TokenBatch, encode, prefix_token
from circuit_breaking.runs.files import read_jsonl
from circuit_breaking.runs.mask_record import MeansRecord
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.tasks.data import PROMPTS_HINT
from circuit_breaking.tasks.ioi import encode_prompts, read_prompts
from circuit_breaking.tasks.owt import load_texts
from circuit_breaking.tasks.registry import prompt_task


def main(settings: Settings) -> None:
    settings.check()
    abc = prompts_of(settings.model, settings.prompts, "train", abc=True) if settings.task == IOI else None
    settings = resolve_defaults(settings, {"abc": abc, **default_data(settings.model, settings.prompts)})
    task = "" if settings.task == IOI else f"{settings.task}_"
    name = f"{Path(settings.model).name}_{task}{settings.kind}_{settings.texts}.safetensors"
    out = settings.out or FOLDER / "means" / name
    tokenizer = load_tokenizer(settings.model)
    source = settings.abc if settings.texts == "abc" else Path(settings.ordinary)
    texts = None if settings.kind == "zero" else read_texts(settings, tokenizer)
    model = load_model(
        settings.model, device=settings.device, dtype=settings.dtype, offload=settings.offload,
        device_map=settings.device_map or None,
    )  # fmt: skip
    model.ablate_from = settings.ablate_from
    if texts is None:
        means, used = torch.zeros(len(model.graph.sources), model.embedding.shape[1]), 0
    else:
        by_position = settings.kind == "position"
        means, used = compute_means(model, texts, by_position, settings.batch_size, progress=True), len(texts)
    inputs = [path for path in (source, *files_of(settings.model)) if path and path.is_file()]
    save_means(out, model, means, MeansRecord(num_texts=used, provenance=provenance(settings, inputs)))
    what = "zeros" if texts is None else f"{settings.kind} of {used:,} {settings.texts} texts"
    print(f"{what}, shape {list(means.shape)}, written to {out}")


def read_texts(settings: Settings, tokenizer: object) -> TokenBatch:
    """The texts to average over, padded to `length` where means are per position."""
    prefix = prefix_token(tokenizer)
    if settings.texts == "ordinary":
        found = load_texts(settings.ordinary, settings.num_texts, settings.text_column)[0]
        batch = encode(tokenizer, found[: settings.num_texts], prefix, settings.length)
    elif settings.task != IOI:
        batch = prompt_task(settings.task, tokenizer).train[: settings.num_texts].counterfactuals()
        if settings.kind == "position" and batch.lengths.unique().numel() > 1:
            raise UserError(
                f"prompts of the task {settings.task} differ in length, so that a mean per position would mix "
                "different words. Use the kind mean."
            )
    else:
        batch = encode_prompts(tokenizer, read_prompts(settings.abc)[: settings.num_texts], prefix)
        if settings.kind == "position":
            check_layout(read_jsonl(settings.abc, PROMPTS_HINT), settings.abc)
    if settings.kind == "position":
        missing = max(0, settings.length - batch.tokens.shape[1])
        batch = TokenBatch(F.pad(batch.tokens, (0, missing), value=prefix), batch.lengths)
    return batch


if __name__ == "__main__":
    run_script(main, settings)
