"""Time and memory of one mask-training step: the engine, plain Hugging Face, and the reference.

A step is a forward pass over the batch and a backward pass from its next-token loss: to the mask for the edge-masked
models, to the embeddings for the plain one. The variants take turns, so that other work on the machine slows all of
them alike; the ratio is of medians. Peak memory is what one step adds to its loaded model, on a CPU in a new process.

Reads   nothing: the model has random weights of the named shape.
Writes  nothing: prints a table.
Time    about two minutes on two cores; less on a GPU, where --rounds 30 costs nothing.
"""

from dataclasses import dataclass
from typing import ClassVar

from step_settings import StepSettings

from circuit_breaking.runs.cli import read_settings, run_script


@dataclass
class Settings(StepSettings):
    MOST_USED: ClassVar = (
        "shape", "batch", "length", "rounds", "split_qkv", "reference", "counterfactual", "cut", "threads", "device",
        "dtype",
    )  # fmt: skip

    shape: str = "gpt2"  # shape of the model: gpt2, gpt2-medium, pythia-160m, smollm2-135m, ..., see steps.SHAPES
    split_qkv: bool = False  # a mask for each head's query, key and value
    gradient_checkpointing: bool = False  # recompute parts of each layer in the engine's backward pass: less memory
    compile: bool = False  # use torch.compile for the plain model and the engine; compiling is not timed
    reference: bool = True  # also time the reference (engine/reference.py), which is slow and takes a lot of memory
    counterfactual: bool = False  # also time steps in which cut edges carry their source's output on other texts
    tf32: bool = False  # let CUDA multiply float32 matrices in TF32, in all variants


if __name__ == "__main__":
    settings = read_settings(Settings)

import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from steps import (
    added_at_peak,
    binary_mask,
    check_shapes,
    dense_mask,
    engine_step,
    in_new_process,
    make_engine,
    make_hf,
    make_tokens,
    plain_step,
    times_of,
)

from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.reference import ReferenceModel
from circuit_breaking.runs.devices import pick_device
from circuit_breaking.runs.plain_table import print_table


def reference_step(settings: Settings) -> Callable[[torch.Tensor], None]:
    hf = make_hf(settings)
    model = ReferenceModel(hf, settings.split_qkv)
    n_edges = len(load_model(hf, settings.split_qkv, settings.device).mask.weights)
    mask = torch.ones(n_edges, device=hf.device, dtype=hf.dtype, requires_grad=True)

    def step(tokens: torch.Tensor) -> None:
        logits = model(tokens, mask)
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()

    return step


def binary_step(settings: Settings, counterfactual: bool = False) -> Callable[[torch.Tensor], None]:
    model = make_engine(settings)
    return engine_step(model, binary_mask(len(model.graph), settings.cut), settings.compile, counterfactual)


def dense_step(settings: Settings, counterfactual: bool = False) -> Callable[[torch.Tensor], None]:
    model = make_engine(settings)
    return engine_step(model, dense_mask(len(model.graph)), settings.compile, counterfactual)


def eap_step(settings: Settings) -> Callable[[torch.Tensor], None]:
    """EAP scores of all edges, with counterfactual texts: a step at the whole model."""
    model = make_engine(settings)
    return engine_step(model, torch.ones(len(model.graph)), settings.compile, counterfactual=True)


REFERENCE, COUNTERFACTUAL = "reference", ", counterfactual"
ENGINE = {"engine, binary mask": binary_step, "engine, any mask": dense_step}
STEPS = {
    "plain Hugging Face": lambda settings: plain_step(make_hf(settings), settings.compile),
    **ENGINE,
    **{name + COUNTERFACTUAL: partial(step, counterfactual=True) for name, step in ENGINE.items()},
    "EAP of all edges" + COUNTERFACTUAL: eap_step,
    REFERENCE: reference_step,
}


def peak_memory(settings: Settings, name: str) -> float:
    """Peak memory that one step adds to the loaded model, GB. On a CPU, call it in a separate process."""
    torch.set_num_threads(settings.threads)
    step, tokens = STEPS[name](settings), make_tokens(settings)
    return added_at_peak(step, tokens)


def peak_memories(settings: Settings, names: list[str]) -> dict[str, float]:
    """`peak_memory` of every variant."""
    if pick_device(settings.device).type == "cuda":  # torch counts the memory of a GPU exactly
        return {name: peak_memory(settings, name) for name in names}
    return {name: in_new_process(peak_memory, settings, name) for name in names}


def main(settings: Settings) -> None:
    settings.check()
    check_shapes(settings.shape)
    torch.set_num_threads(settings.threads)
    torch.backends.cuda.matmul.allow_tf32 = settings.tf32
    tokens = make_tokens(settings)
    left_out = {REFERENCE: not settings.reference, COUNTERFACTUAL: not settings.counterfactual}
    names = [name for name in STEPS if not any(out and name.endswith(end) for end, out in left_out.items())]
    steps = {name: STEPS[name](settings) for name in names}
    times = times_of(steps, tokens, settings.rounds)
    del steps
    middle = {name: statistics.median(values) for name, values in times.items()}
    memory = peak_memories(settings, names)
    device = tokens.device.type if not tokens.is_cuda else torch.cuda.get_device_name()
    title = f"{settings.shape}, {settings.batch} x {settings.length} tokens, {settings.dtype}, {device}"
    rows = [
        [
            name, f"{1e3 * middle[name]:.1f}", f"{middle[name] / middle[names[0]]:.2f}",
            f"{1e3 * min(times[name]):.1f}", f"{memory[name]:.2f}", f"{memory[name] / memory[names[0]]:.2f}",
        ]
        for name in names
    ]  # fmt: skip
    header = ["", "step, ms", "x plain", "fastest, ms", "peak over weights, GB", "x plain"]
    print_table(header, rows, title + ", TF32" * settings.tf32 + ", compiled" * settings.compile)


if __name__ == "__main__":
    run_script(main, settings)
