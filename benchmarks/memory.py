"""Memory that one mask-training step needs, for models of several sizes: computed, and measured if it fits.

The number of texts in a size is that of both batches together, 5 + 5 by default; with `micro_batch`, that many texts.

Computed from the shape alone: the weights; the engine's memory of node outputs and reader inputs; what autograd keeps
of one layer, counted on a model of that one layer, times the number of layers (once, with gradient checkpointing); and
the largest temporary tensor. So one knows before a job is queued whether it fits, and with which settings. Measured in
a new process, on random weights, if the computed sum is below `limit_gb`.

Reads   nothing.
Writes  data/benchmarks/memory.json.
Time    minutes per size on two cores.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import DATA, write_json
from circuit_breaking.runs.settings import DeviceSettings


@dataclass
class Settings(DeviceSettings):
    MOST_USED: ClassVar = (
        "shapes", "dtypes", "sizes", "gradient_checkpointing", "split_qkv", "limit_gb", "threads", "device", "out",
    )  # fmt: skip

    shapes: tuple[str, ...] = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # shapes of models, see steps.SHAPES
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # types of weights and activations
    sizes: tuple[str, ...] = ("10 x 50", "32 x 64")  # texts x tokens that are computed at a time
    gradient_checkpointing: tuple[bool, ...] = (False, True)  # without or with recomputing parts of each layer
    split_qkv: bool = False  # a mask for each head's query, key and value
    limit_gb: float = 12.0  # largest computed sum of weights and step that is measured; 0: nothing is measured
    threads: int = 2  # CPU threads
    device: str = "cpu"  # where it is measured: cpu or cuda
    out: Path = DATA / "benchmarks" / "memory.json"  # file to write


if __name__ == "__main__":
    settings = read_settings(Settings)

import copy
import multiprocessing
import re
from types import SimpleNamespace

import torch
from steps import SHAPES, added_at_peak, engine_step, make_engine, make_tokens
from torch import nn
from transformers import AutoModelForCausalLM

from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.network import layer_groups
from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.runs.devices import pick_dtype
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.tasks.losses import PREDICTIONS_AT_ONCE, WORDS_AT_ONCE

SIZE = re.compile(r"([1-9]\d*) x ([1-9]\d*)")  # texts x tokens


def size_of(module: nn.Module, item: int) -> int:
    """Bytes of a module's buffers and parameters, once each, at `item` bytes a number."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() for tensor in tensors.values()) * item


def kept_by_layer(block: nn.Module, rows: int, width: int, length: int, rotary) -> float:
    """Bytes a token that a layer keeps for its backward, but for what its readers read, in float32."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in block.buffers()}
    read = torch.randn(rows, length, width)
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | {read.untyped_storage().data_ptr()}:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    qkv, inverse = block.qkv(read[:-1])
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        z = block.attention(qkv.requires_grad_(), 1, rotary)
        hidden = block.mlp(read[-1].requires_grad_())
    for tensor in (qkv, inverse, z, hidden):
        note(tensor)
    return sum(seen.values()) / length


def computed(
    shape: str, dtype: str, batch: int, length: int, gradient_checkpointing: bool, split_qkv: bool
) -> dict[str, float]:
    """GB that weights and step need: {"weights", "step"}."""
    config = copy.deepcopy(SHAPES[shape])
    layers, config.num_hidden_layers = config.num_hidden_layers, 1
    engine = load_model(AutoModelForCausalLM.from_config(config).eval(), split_qkv, device="cpu")
    block, item = engine.blocks[0], torch.empty(0, dtype=pick_dtype(dtype)).element_size()
    graph = EdgeGraph(layers, engine.graph.n_heads, split_qkv, engine.graph.parallel)
    width, tokens, at_once = engine.embedding.shape[1], batch * length, len(layer_groups(graph)[0])
    per_layer = graph.head_readers + 1
    rows = len(graph.sources) + len(graph.readers) + at_once * (graph.n_heads + 1)
    kept = kept_by_layer(block, per_layer, width, length, engine.rotary_tables(length, torch.device("cpu")))
    kept *= tokens * item / 4  # counted in float32
    tied = engine.unembedding.data_ptr() == engine.embedding.data_ptr()
    outer = size_of(engine, item) - size_of(block, item) - (engine.unembedding.numel() * item if tied else 0)
    # for a moment: chunks of logits beside the states and their gradients, or the gradients within a layer
    chunk = min(tokens, PREDICTIONS_AT_ONCE) * WORDS_AT_ONCE * 4 * 3 + 4 * tokens * width * 4
    moment = max(chunk, kept)
    step = (rows + 4) * tokens * width * item + (1 if gradient_checkpointing else layers) * kept + moment
    return {"weights": (outer + layers * size_of(block, item)) / 1e9, "step": step / 1e9}


def measured(settings: SimpleNamespace) -> float:
    """GB that a step adds to the loaded model; run in a separate process."""
    torch.set_num_threads(settings.threads)
    engine = make_engine(settings)
    mask = torch.full((len(engine.graph),), 0.9)
    return added_at_peak(engine_step(engine, mask), make_tokens(settings))


def main(settings: Settings) -> None:
    for name in settings.shapes:
        if name not in SHAPES:
            raise UserError(f"{name!r} is not one of {', '.join(SHAPES)}.")
    for size in settings.sizes:
        if not SIZE.fullmatch(size):
            raise UserError(f"{size!r} is not a number of texts and of tokens in each, such as '10 x 50'.")
    context, rows = multiprocessing.get_context("spawn"), []
    for shape in settings.shapes:
        for size in settings.sizes:
            batch, length = map(int, SIZE.fullmatch(size).groups())
            for dtype in settings.dtypes:
                for gradient_checkpointing in settings.gradient_checkpointing:
                    row = {
                        "shape": shape,
                        "size": size,
                        "dtype": dtype,
                        "gradient_checkpointing": gradient_checkpointing,
                    }
                    row |= computed(shape, dtype, batch, length, gradient_checkpointing, settings.split_qkv)
                    row["measured"] = None
                    if row["weights"] * 2 + row["step"] < settings.limit_gb:
                        one = SimpleNamespace(
                            shape=shape, dtype=dtype, batch=batch, length=length, split_qkv=settings.split_qkv,
                            gradient_checkpointing=gradient_checkpointing, threads=settings.threads,
                            device=settings.device,
                        )  # fmt: skip
                        with context.Pool(1) as pool:
                            row["measured"] = pool.apply(measured, (one,))
                    rows.append(row)
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    write_json(settings.out, {"settings": replace(settings), "rows": rows})
    show(rows)


def show(rows: list[dict]) -> None:
    """Print a row for each shape, type and size, with one column for a step and one for a step that recomputes."""
    cells: dict[tuple, dict[bool, str]] = {}
    for row in rows:
        key = (row["shape"], row["size"], row["dtype"], f"{row['weights']:.2f}")
        found = "" if row["measured"] is None else f" ({row['measured']:.2f})"
        cells.setdefault(key, {})[row["gradient_checkpointing"]] = f"{row['step']:.2f}{found}"
    lines = [[*key, pair.get(False, "–"), pair.get(True, "–")] for key, pair in cells.items()]
    header = ["", "tokens", "type", "weights", "step", "recomputing"]
    print_table(header, lines, "GB, weights + step (measured step)")


if __name__ == "__main__":
    run_script(main, settings)
