"""Learn which few edges to cut so that a model no longer knows the indirect object, ordinary text aside.

Reads   a model; prompts (make_ioi_datasets.py); ordinary text; means (compute_means.py), where a cut edge carries any.
Writes  data/ioi/<run>/: settings.json, metrics.jsonl (a row a step), mask.safetensors, edges.json, graph.json,
        next_tokens.json, and, drawn from these, training.png, graph.png, heat_map.png, next_tokens.png.
Time    half a minute for the shipped model on one core.

`accelerate launch ioi/train_mask.py` trains on several GPUs, each with its share of every batch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from circuit_breaking.ioi.setting import Setting, draw_run, open_setting, write_run
from circuit_breaking.ioi.settings import FOLDER
from circuit_breaking.runs.cli import run_script
from circuit_breaking.runs.distributed import is_main
from circuit_breaking.runs.run_folder import hold
from circuit_breaking.training.config import MaskConfig, check_mask
from circuit_breaking.training.run import train_into


@dataclass
class Settings(MaskConfig):
    model: str = "tiny"  # "tiny" (shipped), a hub name such as gpt2, a folder, or a folder holding a .gguf
    prompts: Literal["one", "two", "all"] = "all"  # set of prompts that make_ioi_datasets.py wrote for this model
    train: Path | None = None  # training prompts; None: those of the set
    test: Path | None = None  # held-out prompts; None: those of the set
    ordinary: str | None = None  # "tiny", a text file, or a data set's hub name; None: "tiny" or NeelNanda/pile-10k
    means: Path | None = None  # what cut edges carry, from compute_means.py; None: nothing (zero ablation)
    run: str = "run"  # name of the run folder, data/ioi/<run>
    out: Path = FOLDER  # where run folders are

    max_edges: int = 10  # most edges that the mask may cut: a promise
    objective: Literal["logit_difference", "cross_entropy"] = "logit_difference"  # what breaking is to take away
    break_cap: float = 1.0  # most that one prompt counts towards the broken loss; more for cross_entropy
    alpha: float = 0.2  # weight of the indirect-object loss, which is to rise, against the ordinary loss
    length: int = 50  # tokens an ordinary text is cut to
    split_qkv: bool = False  # let each head's query, key and value read for themselves
    seed: int = 0  # another seed, another order of texts
    resume: bool = True  # go on from the run folder's checkpoint, if it is of the same settings, data and code
    checkpoint_every: int = 50  # steps between checkpoints; 0: only at the end and when told to stop (SIGTERM, SIGUSR1)
    num_test: int = 400  # held-out prompts and texts that are measured
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "float32"  # float32 or bfloat16


def main(settings: Settings) -> None:
    setting: Setting = open_setting(settings)
    check_mask(settings, len(setting.model.graph))  # before anything is written
    folder = settings.out / settings.run
    with hold(folder):
        before = setting.summary()
        result = train_into(
            folder, setting.model, setting.ioi, setting.ordinary, settings, None, setting.record, settings.resume,
            settings.checkpoint_every, lock=False,
        )  # fmt: skip
        if not is_main():
            return
        after = setting.summary()
        write_run(folder, setting, {"before": before, "after": after})
    draw_run(folder)
    for name, value in before.items():
        print(f"{name.replace('_', ' ')}: {value:.3f} -> {after[name]:.3f}")
    edges = ", ".join(result.edges)
    print(f"{len(result.edges)} of {len(setting.model.graph):,} edges cut in {result.seconds:.0f} s: {edges}")
    print(f"written to {folder}")


if __name__ == "__main__":
    run_script(main, Settings, parallel=True)
