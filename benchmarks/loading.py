"""Peak memory of loading a model from sharded files, and of one mask-training step after it.

A model with random weights is written in bfloat16, in several files, to a temporary folder, and is then loaded from
there by `load_model` in a new process. Three figures are of its memory: `peak` is the highest resident memory of the
process, less that before loading; of it, `private` belongs to the process alone, and the rest are pages of the weight
files, which the system reads when they are needed and drops when memory runs short. `weights` are all weights of the
loaded model, for comparison.

Reads   nothing.
Writes  data/benchmarks/loading.json.
Time    two minutes per shape and type on two cores, and as much disk space as the model takes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import DATA, write_json
from circuit_breaking.runs.settings import DeviceSettings


@dataclass
class Settings(DeviceSettings):
    MOST_USED: ClassVar = ("shapes", "dtypes", "batch", "length", "threads", "out")

    shapes: tuple[str, ...] = ("gpt2-xl",)  # shapes of models, see steps.SHAPES
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # types in which the model is loaded
    batch: int = 1  # texts in the step
    length: int = 50  # tokens in each
    shard: str = "500MB"  # largest file of weights
    threads: int = 2  # CPU threads
    device: str = "cpu"  # where it is loaded
    out: Path = DATA / "benchmarks" / "loading.json"  # file to write


if __name__ == "__main__":
    settings = read_settings(Settings)

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from steps import SHAPES, check_shapes, dense_mask, engine_step, in_new_process, make_tokens
from transformers import AutoModelForCausalLM

from circuit_breaking.engine.load import load_model
from circuit_breaking.errors import UserError
from circuit_breaking.runs.config import check_counts
from circuit_breaking.runs.cost import reset_peak, resident
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.provenance import provenance

EVERY = 0.005  # seconds between two looks at the private memory, whose peak Linux does not record


def write_model(shape: str, folder: str, shard: str) -> None:
    """Write a model in bfloat16. Run in a process of its own. Its weights repeat a million random numbers."""
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)
    hf = hf.to_empty(device="cpu")
    hf.tie_weights()
    numbers = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in hf.parameters():
            for part in parameter.view(-1).split(len(numbers)):
                part.copy_(numbers[: len(part)])
    hf.save_pretrained(folder, max_shard_size=shard)


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """Peaks of resident memory in the block, GB above what there is before it: {"peak", "private"}."""
    base, private = (resident(field) for field in ("VmRSS", "RssAnon")) if reset_peak() else (None, None)
    if base is None:
        raise UserError("peak memory is measured on Linux only.")
    most, done = [private], threading.Event()

    def watch() -> None:
        while not done.wait(EVERY):
            most.append(max(most.pop(), resident("RssAnon")))

    watcher, found = threading.Thread(target=watch), {}
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found |= {"peak": (resident() - base) / 1e9, "private": (most[0] - private) / 1e9}


def measure(settings: SimpleNamespace, folder: str) -> dict[str, float]:
    """Load the model and take a step. Run in a process of its own."""
    torch.set_num_threads(settings.threads)
    load_model("tiny", device="cpu")  # libraries are loaded before anything is measured
    begin = time.perf_counter()
    with peaks() as loading:
        model = load_model(folder, device=settings.device, dtype=settings.dtype)
    seconds = time.perf_counter() - begin
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.buffers(), *model.parameters())}
    with peaks() as step:
        engine_step(model, dense_mask(len(model.graph)))(make_tokens(settings))
    row = {"shape": settings.shape, "dtype": settings.dtype, "tokens": f"{settings.batch} x {settings.length}"}
    row |= {"weights": sum(weights.values()) / 1e9, "seconds": seconds}
    row |= {f"load_{name}": value for name, value in loading.items()}
    return row | {f"step_{name}": value for name, value in step.items()}


def main(settings: Settings) -> None:
    check_counts(settings, "batch", "length", "threads")
    check_shapes(*settings.shapes)
    rows = []
    for shape in settings.shapes:
        with tempfile.TemporaryDirectory() as folder:
            in_new_process(write_model, shape, folder, settings.shard)
            for dtype in settings.dtypes:
                one = SimpleNamespace(
                    shape=shape, dtype=dtype, batch=settings.batch, length=settings.length, threads=settings.threads,
                    device=settings.device,
                )  # fmt: skip
                rows.append(in_new_process(measure, one, folder))
                print({k: round(v, 2) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    write_json(settings.out, {"settings": replace(settings), "provenance": provenance(settings), "rows": rows})
    names = list(rows[0])
    cells = [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in rows]
    print_table([name.replace("_", " ") for name in names], cells, "GB that loading, and a step after it, add at most")


if __name__ == "__main__":
    run_script(main, settings)
