"""Time and memory of one mask-training step: the engine, plain Hugging Face, and the naive formulation.

A step is a forward over the batch and a backward from its next-token loss: to the mask for the edge-masked models, to
the embeddings for the plain one. The variants take turns, so that whatever else the machine does falls on all alike;
the ratio is of medians. Peak memory is what a fresh process adds to its loaded model in one step.
Random weights of the named shape; reads and writes nothing. About two minutes on two cores.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from circuit_breaking.cli import UserError, run_script
from circuit_breaking.devices import pick_device, pick_dtype
from circuit_breaking.losses import cross_entropy_of_hidden
from circuit_breaking.models import load_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from oracle import NaiveEdgeMasked

SHAPES = {
    "gpt2": GPT2Config(),
    "gpt2-medium": GPT2Config(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPT2Config(n_layer=36, n_head=20, n_embd=1280),
    "smollm2-135m": LlamaConfig(
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576, intermediate_size=1536,
        vocab_size=49152, tie_word_embeddings=True,
    ),
}  # fmt: skip


@dataclass
class Settings:
    shape: str = "gpt2"  # gpt2, gpt2-medium, gpt2-large or smollm2-135m
    batch: int = 10  # texts a step
    length: int = 50  # tokens a text
    rounds: int = 5  # steps of each variant; the median counts
    split_qkv: bool = False  # masks for query, key and value apart
    cut: int = 50  # edges that the binary mask cuts
    naive: bool = True  # time the naive formulation too (slow, and a lot of memory)
    threads: int = 2  # CPU threads
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "float32"  # float32 or bfloat16


def plain_step(settings: Settings) -> Callable[[torch.Tensor], None]:
    hf = make_hf(settings).requires_grad_(False)

    def step(tokens: torch.Tensor) -> None:
        embeddings = hf.get_input_embeddings()(tokens).requires_grad_()
        logits = hf(inputs_embeds=embeddings).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()

    return step


def binary_step(settings: Settings) -> Callable[[torch.Tensor], None]:
    """With the kind of mask that can be saved: `cut` edges cut, all others whole."""
    model = load_model(make_hf(settings), settings.split_qkv, settings.device, settings.dtype)
    model.mask.weights.data[torch.randperm(len(model.graph))[: settings.cut]] = 0.0
    return loss_step(model)


def dense_step(settings: Settings) -> Callable[[torch.Tensor], None]:
    """With the kind of mask that training begins with: every weight between 0 and 1."""
    model = load_model(make_hf(settings), settings.split_qkv, settings.device, settings.dtype)
    model.mask.weights.data.uniform_(0.9, 0.999)
    return loss_step(model)


def loss_step(model: torch.nn.Module) -> Callable[[torch.Tensor], None]:
    def step(tokens: torch.Tensor) -> None:
        hidden = model.hidden(tokens)[:, :-1].flatten(0, 1)
        targets = tokens[:, 1:].flatten()
        cross_entropy_of_hidden(hidden, model.unembedding, model.unembedding_bias, targets).mean().backward()

    return step


def naive_step(settings: Settings) -> Callable[[torch.Tensor], None]:
    hf = make_hf(settings)
    model = NaiveEdgeMasked(hf, settings.split_qkv)
    n_edges = len(load_model(hf, settings.split_qkv, settings.device).mask.weights)
    mask = torch.ones(n_edges, device=hf.device, dtype=hf.dtype, requires_grad=True)

    def step(tokens: torch.Tensor) -> None:
        logits = model(tokens, mask)
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()

    return step


STEPS = {
    "plain Hugging Face": plain_step,
    "engine, binary mask": binary_step,
    "engine, any mask": dense_step,
    "naive formulation": naive_step,
}


def make_hf(settings: Settings) -> torch.nn.Module:
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(SHAPES[settings.shape])
    return hf.to(pick_device(settings.device), pick_dtype(settings.dtype)).eval()


def make_tokens(settings: Settings) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, SHAPES[settings.shape].vocab_size, (settings.batch, settings.length), generator=generator)
    return tokens.to(pick_device(settings.device))


def seconds(step: Callable[[torch.Tensor], None], tokens: torch.Tensor) -> float:
    start = time.perf_counter()
    step(tokens)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resident_peak() -> int:
    """Highest resident memory of this process since the last reset, bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise UserError("peak memory is measured on Linux only")


def peak_memory(settings: Settings, name: str) -> float:
    """What one step adds to the loaded model at its peak, GB; run in a process of its own."""
    torch.set_num_threads(settings.threads)
    step, tokens = STEPS[name](settings), make_tokens(settings)
    if tokens.is_cuda:
        base = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(tokens)
        return (torch.cuda.max_memory_allocated() - base) / 1e9
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to what is resident now
    base = resident_peak()
    step(tokens)
    return (resident_peak() - base) / 1e9


def main(settings: Settings) -> None:
    if settings.shape not in SHAPES:
        raise UserError(f"shape {settings.shape!r} is not one of {', '.join(SHAPES)}.")
    torch.set_num_threads(settings.threads)
    tokens = make_tokens(settings)
    names = [name for name in STEPS if settings.naive or name != "naive formulation"]
    steps = {name: STEPS[name](settings) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(settings.rounds + 1):
        for name, step in steps.items():
            times[name].append(seconds(step, tokens))
    del steps
    middle = {name: statistics.median(values[1:]) for name, values in times.items()}  # the first warms up
    context = multiprocessing.get_context("spawn")
    table = Table(title=f"{settings.shape}, {settings.batch} x {settings.length} tokens, {settings.dtype}")
    for column in ("", "step, s", "x plain", "fastest, s", "peak over weights, GB", "x plain"):
        table.add_column(column, justify="left" if not column else "right")
    plain_memory = None
    for name in names:
        with context.Pool(1) as pool:
            memory = pool.apply(peak_memory, (settings, name))
        plain_memory = plain_memory or memory
        table.add_row(
            name, f"{middle[name]:.3f}", f"{middle[name] / middle[names[0]]:.2f}", f"{min(times[name][1:]):.3f}",
            f"{memory:.2f}", f"{memory / plain_memory:.2f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    run_script(main, Settings)
