"""Learn which few edges to cut so that a model stops producing toxic text (the paper's main experiment).

Reads   a model; toxic posts (train and held out); ordinary text; means, where a cut edge carries any.
Writes  data/toxicity/<run>/: settings.json, metrics.jsonl (a row a step), mask.safetensors, edges.json; and
        means.safetensors, if what cut edges carry is learned too (--means-lr); checkpoints, from which a run that was
        interrupted goes on when it is started again.
Time    a minute for the shipped model on two cores; a step of GPT-2 small takes seconds on two cores.

`accelerate launch toxicity/train_mask.py` trains on several GPUs, each with its share of every batch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from circuit_breaking.engine.ablation_values import load_means, save_means
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import save_mask
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.models.load import load_tokenizer
from circuit_breaking.runs.cli import run_script
from circuit_breaking.runs.config import resolve_defaults
from circuit_breaking.runs.distributed import is_main
from circuit_breaking.runs.files import write_json
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.run_folder import hold
from circuit_breaking.tasks import OWTTask, ToxicTask
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.toxicity.inputs import FOLDER, default_data
from circuit_breaking.training.config import MaskSettings
from circuit_breaking.training.mask_trainer import check
from circuit_breaking.training.run import train_into


@dataclass
class Settings(MaskSettings):
    model: str = "tiny"  # "tiny" (shipped), a hub name such as gpt2, a folder, or a folder holding a .gguf
    toxic_train: Path | None = None  # toxic texts to learn from; None: shipped for tiny, else posts/train.jsonl
    toxic_test: Path | None = None  # toxic texts held out; None: the shipped ones for tiny, else posts/test.jsonl
    ordinary: str | None = None  # "tiny", a text file, or a data set's hub name; None: tiny, else NeelNanda/pile-10k
    means: Path | None = None  # what cut edges carry, from compute_means.py, at first if learned; None: nothing (zero)
    run: str = "run"  # name of the run folder, data/toxicity/<run>
    out: Path = FOLDER  # where run folders are

    max_edges: int = 12  # most edges that the mask may cut: a promise
    alpha: float = 0.2  # weight of the toxic loss, which is to rise, against the ordinary loss
    length: int = 50  # tokens a text is cut to
    examples: int = 100  # toxic texts to learn from; 0: all of the file
    split_qkv: bool = False  # let each head's query, key and value read for themselves
    seed: int = 0  # another seed, another order of texts
    resume: bool = True  # go on from the run folder's checkpoint, if it is of the same settings, data and code
    checkpoint_every: int = 50  # steps between checkpoints; 0: only at the end and when told to stop (SIGTERM, SIGUSR1)
    test_texts: int = 200  # held-out texts whose losses are printed before and after
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "float32"  # float32 or bfloat16
    tf32: bool = False  # let CUDA multiply float32 matrices in TF32


def main(settings: Settings) -> None:
    settings = resolve_defaults(settings, default_data(settings.model))
    torch.manual_seed(settings.seed)
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    folder = settings.out / settings.run
    tokenizer = load_tokenizer(settings.model)
    ordinary = OWTTask(tokenizer, settings.ordinary, settings.length, seed=settings.seed)
    toxic = ToxicTask(
        tokenizer, settings.toxic_train, settings.toxic_test, settings.length, settings.examples or None, settings.seed
    )
    model = load_model(settings.model, settings.split_qkv, settings.device, settings.dtype)
    check(settings, len(model.graph))  # before anything is written
    inputs = [settings.toxic_train, settings.toxic_test]
    if settings.means is not None:
        load_means(settings.means, model)
        inputs.append(settings.means)
    if Path(settings.ordinary).is_file():
        inputs.append(Path(settings.ordinary))
    record = provenance(settings, inputs, model=model.name)
    with hold(folder):
        train(folder, model, {"ordinary": ordinary, "toxic": toxic}, record, settings)


def train(
    folder: Path, model: EdgeMaskedTransformer, tasks: dict[str, TextTask], record: dict[str, Any], settings: Settings
) -> None:
    """Train the mask and write the run folder, which is held."""
    if is_main():
        write_json(folder / "settings.json", record)
    for task in tasks.values():
        task.evaluation_batch = settings.micro_batch or task.evaluation_batch
    before = {name: task.get_test_loss(model, settings.test_texts) for name, task in tasks.items()}
    result = train_into(
        folder, model, tasks["toxic"], tasks["ordinary"], settings, None, record, settings.resume,
        settings.checkpoint_every, lock=False,
    )  # fmt: skip
    if not is_main():
        return
    after = {name: task.get_test_loss(model, settings.test_texts) for name, task in tasks.items()}

    if settings.means_lr and model.means is not None:  # evaluation.py finds them by the mask's record
        save_means(folder / "means.safetensors", model, model.means, record)
        record["settings"]["means"] = folder / "means.safetensors"
    losses = {"before": before, "after": after}
    save_mask(folder / "mask.safetensors", model, {**record, "losses": losses})
    write_json(folder / "edges.json", result.edges)
    for name in tasks:
        print(f"held-out loss on {name} text: {before[name]:.3f} -> {after[name]:.3f}")
    print(f"{len(result.edges)} of {len(model.graph):,} edges cut in {result.seconds:.0f} s: {', '.join(result.edges)}")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, Settings, parallel=True)
