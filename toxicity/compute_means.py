"""Compute the ablation values of mean ablation: the mean output of every node over training texts.

Reads   a model and the training part of the ordinary text, or toxic training posts.
Writes  data/toxicity/means/<model>_<kind>_<texts>.safetensors, for the setting `means` of train_mask.py.
Time    seconds for the shipped model; 0.2 s per text of 40 tokens for a model of 135M parameters on one core.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_ablate_from, check_counts, resolve_defaults
from circuit_breaking.runs.files import require_file
from circuit_breaking.runs.settings import AblateFromSettings, ModelSettings, OffloadSettings
from circuit_breaking.tasks.data import TOXIC_HINT
from circuit_breaking.toxicity.settings import FOLDER, TrainingTextSettings, default_data


@dataclass
class Settings(TrainingTextSettings, ModelSettings, OffloadSettings, AblateFromSettings):
    MOST_USED: ClassVar = ("model", "kind", "texts", "num_texts", "length", "out", "device")

    kind: Literal["zero", "mean", "position"] = "mean"  # zeros, one mean per node, or one per node and position
    texts: Literal["ordinary", "toxic"] = "ordinary"  # training texts that the mean is over
    num_texts: int = 1000  # most texts that the mean is over
    length: int = 50  # tokens of a text that are used; for kind position also the longest text that the file serves
    batch_size: int = 8  # texts per forward pass
    out: Path | None = None  # file to write; None: in data/toxicity/means, named by model, kind and texts

    def check(self) -> None:
        check_counts(self, "num_texts", "length", "batch_size")
        check_ablate_from(self)
        if self.kind != "zero" and self.texts == "toxic":
            require_file(resolve_defaults(self, default_data(self.model)).toxic_train, TOXIC_HINT)


if __name__ == "__main__":
    settings = read_settings(Settings)

import torch

from circuit_breaking.engine.ablation_values import compute_means, save_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.models.load import files_of, load_tokenizer
from circuit_breaking.models.tokens import encode, prefix_token
from circuit_breaking.runs.mask_record import MeansRecord
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.tasks.owt import load_texts
from circuit_breaking.tasks.toxic import read_examples


def main(settings: Settings) -> None:
    settings.check()
    settings = resolve_defaults(settings, default_data(settings.model))
    out = settings.out or FOLDER / "means" / f"{Path(settings.model).name}_{settings.kind}_{settings.texts}.safetensors"
    model = load_model(
        settings.model, device=settings.device, dtype=settings.dtype, offload=settings.offload,
        device_map=settings.device_map or None,
    )  # fmt: skip
    model.ablate_from = settings.ablate_from
    if settings.kind == "zero":
        means, used, inputs = torch.zeros(len(model.graph.sources), model.embedding.shape[1]), 0, []
    else:
        source = settings.ordinary if settings.texts == "ordinary" else settings.toxic_train
        texts = (
            load_texts(source, settings.num_texts, settings.text_column)[0]
            if settings.texts == "ordinary"
            else [text for text, _ in read_examples(source)]
        )
        tokenizer = load_tokenizer(settings.model)
        batch = encode(tokenizer, texts[: settings.num_texts], prefix_token(tokenizer), settings.length)
        means = compute_means(model, batch, settings.kind == "position", settings.batch_size, progress=True)
        used, inputs = len(batch), [Path(source)]
    inputs = [path for path in (*inputs, *files_of(settings.model)) if path.is_file()]
    save_means(out, model, means, MeansRecord(num_texts=used, provenance=provenance(settings, inputs)))
    what = "zeros" if settings.kind == "zero" else f"{settings.kind} of {used:,} {settings.texts} texts"
    print(f"{what}, shape {list(means.shape)}, written to {out}")


if __name__ == "__main__":
    run_script(main, settings)
