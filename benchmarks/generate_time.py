"""Time of generation with cut edges, next to that of the plain model: Hugging Face `generate` with its KV cache.

The same prompts are continued greedily with each number of random cut edges in turn, for several rounds, so that other
work on the machine slows all of them alike: a ratio is the median over rounds of the time of a round to the plain time
of that round. On one CPU thread, the time is that which the process computed, without waiting for other processes.
Edges are cut before the clock starts; the time that this takes has its own column.

Reads   nothing: the model has random weights of the named shape.
Writes  data/benchmarks/generate_time_<shape>.png and .json.
Time    about five minutes on two cores.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import DATA, atomic_path, write_json
from circuit_breaking.runs.settings import ComputeSettings, SeedSettings


@dataclass
class Settings(ComputeSettings, SeedSettings):
    MOST_USED: ClassVar = ("shape", "cut", "prompt", "new_tokens", "batch", "rounds", "threads", "device", "out")

    shape: str = "gpt2"  # shape of the model: tiny, gpt2, pythia-160m, smollm2-135m, ..., see steps.SHAPES
    cut: tuple[int, ...] = (0, 1, 12, 50, 200, 1000)  # numbers of cut edges
    prompt: int = 64  # tokens of the prompt
    new_tokens: int = 64  # tokens of the continuation
    batch: int = 1  # prompts that are continued together
    rounds: int = 7  # rounds over all numbers of cut edges; the median counts
    split_qkv: bool = False  # give the query, key and value of a head separate edges
    threads: int = 1  # CPU threads
    seed: int = 0  # seed of weights, prompt and edges
    out: Path = DATA / "benchmarks"  # folder of the plot and its numbers

    def check(self) -> None:
        counts = (self.rounds, self.threads, self.batch, self.prompt, self.new_tokens)
        if min(counts) < 1 or min(self.cut, default=-1) < 0:
            raise UserError("rounds, threads, batch, prompt and new_tokens must be at least 1, cut numbers from 0 on.")


if __name__ == "__main__":
    settings = read_settings(Settings)

import statistics
import time

import matplotlib
import torch
from steps import SHAPES, check_shapes
from torch import nn
from transformers import AutoModelForCausalLM

from circuit_breaking.ablation.ablate import ablate
from circuit_breaking.models.families import graph_of
from circuit_breaking.runs.devices import pick_device, pick_dtype
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.runs.provenance import provenance

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PLAIN = "plain"


def seconds(hf: nn.Module, tokens: torch.Tensor, new_tokens: int) -> float:
    """How long one `generate` takes."""
    waits = tokens.is_cuda or torch.get_num_threads() > 1
    clock = time.perf_counter if waits else time.process_time
    start = clock()
    hf.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return clock() - start


def measure(settings: Settings) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of every round by number of cut edges, and seconds that cutting them took."""
    torch.manual_seed(settings.seed)
    config = SHAPES[settings.shape]
    hf = AutoModelForCausalLM.from_config(config).to(pick_device(settings.device), pick_dtype(settings.dtype)).eval()
    graph = graph_of(config, settings.split_qkv)
    order = torch.randperm(len(graph)).tolist()
    if max(settings.cut, default=0) > len(graph):
        raise UserError(f"{max(settings.cut)} edges cannot be cut in {graph}. Set cut to fewer.")
    edges = {f"{count}": [graph.edges[index] for index in order[:count]] for count in settings.cut}
    tokens = torch.randint(1, config.vocab_size, (settings.batch, settings.prompt), device=hf.device)
    times: dict[str, list[float]] = {PLAIN: [], **{name: [] for name in edges}}
    cutting: dict[str, float] = {}
    seconds(hf, tokens, settings.new_tokens)  # warms up
    for _ in progress_bar(range(settings.rounds), desc="rounds", unit="round"):
        times[PLAIN].append(seconds(hf, tokens, settings.new_tokens))
        for name, cut in edges.items():
            start = time.perf_counter()
            with ablate(hf, cut):
                cutting[name] = time.perf_counter() - start
                times[name].append(seconds(hf, tokens, settings.new_tokens))
    return times, cutting


def ratios(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Each round's time against the same round's plain time."""
    return {
        name: [value / plain for value, plain in zip(values, times[PLAIN], strict=True)]
        for name, values in times.items()
    }


def draw(path: Path, settings: Settings, against: dict[str, list[float]]) -> None:
    """Cost by number of cut edges, median and range over rounds, as PNG."""
    names = [name for name in against if name != PLAIN]
    counts = [int(name) for name in names]
    middle = [statistics.median(against[name]) for name in names]
    low = [value - min(against[name]) for value, name in zip(middle, names, strict=True)]
    high = [max(against[name]) - value for value, name in zip(middle, names, strict=True)]
    figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
    axes.axhline(1, color="0.6", linewidth=1, zorder=0)
    axes.errorbar(counts, middle, yerr=[low, high], fmt="o-", capsize=3, markersize=4, color="C0")
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.set_ylim(bottom=min(0.9, min(m - l for m, l in zip(middle, low, strict=True)) - 0.05))
    axes.set_xlabel("cut edges")
    axes.set_ylabel("time of generate, times plain")
    axes.set_title(
        f"{settings.shape}, {settings.batch} × ({settings.prompt} + {settings.new_tokens}) tokens", fontsize=10
    )
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=200, format="png")
    plt.close(figure)


def main(settings: Settings) -> None:
    settings.check()
    check_shapes(settings.shape)
    torch.set_num_threads(settings.threads)
    times, cutting = measure(settings)
    against = ratios(times)
    title = f"{settings.shape}, {settings.batch} x ({settings.prompt} + {settings.new_tokens}) tokens, {settings.dtype}"
    rows = [
        [
            name, f"{statistics.median(values):.3f}", f"{statistics.median(against[name]):.3f}",
            f"{min(against[name]):.3f}", f"{max(against[name]):.3f}",
            f"{cutting[name]:.3f}" if name in cutting else "",
        ]
        for name, values in times.items()
    ]  # fmt: skip
    header = ["cut edges", "generate, s", "x plain", "lowest", "highest", "cutting, s"]
    print_table(header, rows, f"{title}, {settings.threads} threads, {settings.rounds} rounds")
    path = settings.out / f"generate_time_{settings.shape}.png"
    draw(path, settings, against)
    write_json(path.with_suffix(".json"), provenance(settings, seconds=times, cutting=cutting))
    print(f"written to {path}")


if __name__ == "__main__":
    run_script(main, settings)
