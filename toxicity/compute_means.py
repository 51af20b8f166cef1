"""Compute what cut edges carry under mean ablation: every node's mean output over training texts.

Reads   a model and the training part of ordinary text, or toxic training posts.
Writes  data/toxicity/means/<model>_<kind>_<texts>.safetensors, for the setting `means` of train_mask.py.
Time    seconds for the shipped model; 0.2 s a text of 40 tokens for a model of 135M parameters on one core.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from circuit_breaking.engine.ablation_values import compute_means, save_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.models.load import files_of, load_tokenizer
from circuit_breaking.models.tokens import encode, prefix_token
from circuit_breaking.runs.cli import run_script
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.tasks.owt import load_texts
from circuit_breaking.tasks.toxic import read_examples
from circuit_breaking.toxicity.inputs import FOLDER, default_data


@dataclass
class Settings:
    model: str = "tiny"  # "tiny" (shipped), a hub name such as gpt2, a folder, or a folder holding a .gguf
    kind: Literal["zero", "mean", "position"] = "mean"  # zeros, a mean a node, or a mean a node and position
    texts: Literal["ordinary", "toxic"] = "ordinary"  # which training texts to average over
    ordinary: str | None = None  # "tiny", a text file, or a data set's hub name; None: "tiny" or NeelNanda/pile-10k
    toxic_train: Path | None = None  # toxic posts; None: the shipped ones or data/toxicity/posts/train.jsonl
    num_texts: int = 1000  # most texts to average over
    length: int = 50  # tokens a text is cut to; per position, the longest text that the means will serve
    batch_size: int = 8  # texts at a time
    out: Path | None = None  # file to write; None: in data/toxicity/means, named by model, kind and texts
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "float32"  # float32 or bfloat16, of the model; sums are kept in float64


def main(settings: Settings) -> None:
    check_counts(settings, "num_texts", "length", "batch_size")
    settings = resolve_defaults(settings, default_data(settings.model))
    out = settings.out or FOLDER / "means" / f"{Path(settings.model).name}_{settings.kind}_{settings.texts}.safetensors"
    model = load_model(settings.model, device=settings.device, dtype=settings.dtype)
    if settings.kind == "zero":
        means, used, inputs = torch.zeros(len(model.graph.sources), model.embedding.shape[1]), 0, []
    else:
        source = settings.ordinary if settings.texts == "ordinary" else settings.toxic_train
        texts = (
            load_texts(source, settings.num_texts)[0]
            if settings.texts == "ordinary"
            else [text for text, _ in read_examples(source)]
        )
        tokenizer = load_tokenizer(settings.model)
        batch = encode(tokenizer, texts[: settings.num_texts], prefix_token(tokenizer), settings.length)
        means = compute_means(model, batch, settings.kind == "position", settings.batch_size, progress=True)
        used, inputs = len(batch), [Path(source)]
    inputs = [path for path in (*inputs, *files_of(settings.model)) if path.is_file()]
    save_means(out, model, means, provenance(settings, inputs, num_texts=used))
    what = "zeros" if settings.kind == "zero" else f"{settings.kind} of {used:,} {settings.texts} texts"
    print(f"{what}, shape {list(means.shape)}, written to {out}")


if __name__ == "__main__":
    run_script(main, Settings)
