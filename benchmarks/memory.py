"""Memory that one mask-training step needs, for models of several sizes: computed, and measured if it fits.

The number of texts in a size is that of both batches together, 5 + 5 by default; with `micro_batch`, that many texts.

Computed from the shape alone, with P nodes, R readers, N tokens and width D:

    step = (P + R + nodes of a group of layers + 4) N D    node outputs, reader inputs, and gradients of a group
           + L kept                                        what autograd keeps of each of L layers
           + max(kept, logits, sums)                       the largest temporary tensors

`kept` is counted on a model of one layer; with gradient checkpointing it counts once in place of L times. `logits` are
a chunk of logits in float32 with its gradients. `sums` are those of a layer's readers and nodes in float32, for a type
less precise than that. So one knows before a job is queued whether it fits, and with which settings; the second table
says how many texts of 50 tokens fit at a time, with a tenth of the GPU's memory left free. Measured in a new process,
on random weights, if the computed sum is below `limit_gb`; `layers` makes a large model small enough for that.

Reads   nothing.
Writes  data/benchmarks/memory.json.
Time    minutes per size on two cores; --limit-gb 0 computes only.
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
        "shapes", "dtypes", "sizes", "layers", "gradient_checkpointing", "split_qkv", "limit_gb", "threads", "device",
        "out",
    )  # fmt: skip

    shapes: tuple[str, ...] = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # shapes, see steps.SHAPES and LARGE
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # types of weights and activations
    sizes: tuple[str, ...] = ("10 x 50", "32 x 64")  # texts x tokens that are computed at a time
    layers: int = 0  # layers of each model; 0: all that it has
    gradient_checkpointing: tuple[bool, ...] = (False, True)  # without or with recomputing parts of each layer
    split_qkv: bool = False  # a mask for each head's query, key and value
    limit_gb: float = 12.0  # largest computed sum of weights and step that is measured; 0: nothing is measured
    threads: int = 2  # CPU threads
    gpus: tuple[float, ...] = (24, 40, 80, 141)  # GB of the GPUs of the second table
    device: str = "cpu"  # where it is measured: cpu or cuda
    out: Path = DATA / "benchmarks" / "memory.json"  # file to write


if __name__ == "__main__":
    settings = read_settings(Settings)

import copy
import re
from bisect import bisect_left
from functools import cache
from types import SimpleNamespace

import torch
from steps import added_at_peak, check_shapes, config_of, engine_step, in_new_process, make_engine, make_tokens
from torch import nn
from transformers import AutoModelForCausalLM

from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.network import layer_groups
from circuit_breaking.errors import UserError
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.runs.devices import pick_dtype
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.tasks.losses import PREDICTIONS_AT_ONCE, WORDS_AT_ONCE

TEXT = 50  # tokens of a text in the second table
FREE = 0.1  # of a GPU's memory, for the CUDA context and for gaps
MOST_TEXTS = 4096
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


@dataclass(frozen=True)
class OneLayer:
    """What memory is computed from: the graph of the whole model, its width, and counts of numbers.

    `kept` is for one token: what a layer keeps for its backward pass. `block` are the weights of a layer, `outer` all
    others.
    """

    graph: EdgeGraph
    width: int
    kept: float
    block: int
    outer: int


@cache
def one_layer(shape: str, layers: int, length: int, split_qkv: bool) -> OneLayer:
    """Count what one layer needs, on a model with that layer alone and few tokens in its vocabulary."""
    config = copy.deepcopy(config_of(SimpleNamespace(shape=shape, layers=1)))
    full = config_of(SimpleNamespace(shape=shape, layers=layers))
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = 8, 0, 0, None
    engine = load_model(AutoModelForCausalLM.from_config(config).eval(), split_qkv, device="cpu", share_weights=True)
    graph = EdgeGraph(full.num_hidden_layers, engine.graph.n_heads, split_qkv, engine.graph.parallel)
    tables = engine.rotary_tables(length, torch.device("cpu"))
    width, per_layer = engine.embedding.shape[1], graph.head_readers + 1
    kept = kept_by_layer(engine.blocks[0], per_layer, width, length, tables)
    tied = engine.unembedding is engine.embedding
    positions = 0 if engine.positions is None else engine.positions.numel()
    outer = full.vocab_size * width * (1 if tied else 2) + positions
    return OneLayer(graph, width, kept / 4, size_of(engine.blocks[0], 1), outer)


def computed(
    shape: str, dtype: str, batch: int, length: int, gradient_checkpointing: bool, split_qkv: bool, layers: int = 0
) -> dict[str, float]:
    """GB that weights and step need: {"weights", "offloaded", "step"}; `offloaded` are the weights with `offload`."""
    one, item = one_layer(shape, layers, length, split_qkv), torch.empty(0, dtype=pick_dtype(dtype)).element_size()
    graph, tokens, depth = one.graph, batch * length, one.graph.n_layers
    in_group, per_layer = len(layer_groups(graph)[0].parts) * (graph.n_heads + 1), graph.head_readers + 1
    rows = len(graph.sources) + len(graph.readers) + in_group
    kept = one.kept * tokens * item
    chunk = min(tokens, PREDICTIONS_AT_ONCE) * WORDS_AT_ONCE * 4 * 3 + 4 * tokens * one.width * 4
    sums = 0 if item >= 4 else (per_layer + graph.n_heads + 1) * tokens * one.width * 4
    step = (rows + 4) * tokens * one.width * item + (1 if gradient_checkpointing else depth) * kept
    weights = {"weights": one.outer + depth * one.block, "offloaded": one.outer + min(depth, 2) * one.block}
    return {name: n * item / 1e9 for name, n in weights.items()} | {"step": (step + max(chunk, kept, sums)) / 1e9}


def texts_that_fit(shape: str, dtype: str, gb: float, recompute: bool, offload: bool, settings: Settings) -> int:
    """Most texts of `TEXT` tokens in a micro-batch for which weights and step fit on a GPU; 0: not one does."""

    def fits(texts: int) -> bool:
        need = computed(shape, dtype, texts, TEXT, recompute, settings.split_qkv, settings.layers)
        return need["offloaded" if offload else "weights"] + need["step"] <= (1 - FREE) * gb

    return bisect_left(range(1, MOST_TEXTS), True, key=lambda texts: not fits(texts))


def measured(settings: SimpleNamespace) -> float:
    """GB that a step adds to the loaded model; run in a separate process."""
    torch.set_num_threads(settings.threads)
    engine = make_engine(settings)
    mask = torch.full((len(engine.graph),), 0.9)
    return added_at_peak(engine_step(engine, mask), make_tokens(settings))


def main(settings: Settings) -> None:
    check_shapes(*settings.shapes, large=True)
    for size in settings.sizes:
        if not SIZE.fullmatch(size):
            raise UserError(f"{size!r} is not a number of texts and of tokens in each, such as '10 x 50'.")
    rows = []
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
                    row |= computed(
                        shape, dtype, batch, length, gradient_checkpointing, settings.split_qkv, settings.layers
                    )
                    row["measured"] = None
                    if row["weights"] * 2 + row["step"] < settings.limit_gb:
                        one = SimpleNamespace(
                            shape=shape, dtype=dtype, batch=batch, length=length, split_qkv=settings.split_qkv,
                            gradient_checkpointing=gradient_checkpointing, threads=settings.threads,
                            device=settings.device, layers=settings.layers,
                        )  # fmt: skip
                        row["measured"] = in_new_process(measured, one)
                    rows.append(row)
                    print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    fits = [
        {"shape": shape, "dtype": dtype, "gb": gb, **{
            name: texts_that_fit(shape, dtype, gb, recompute, offload, settings)
            for name, (recompute, offload) in WAYS.items()
        }}
        for shape in settings.shapes for dtype in settings.dtypes for gb in settings.gpus
    ]  # fmt: skip
    write_json(settings.out, {"settings": replace(settings), "rows": rows, "fits": fits})
    show(rows)
    show_fits(fits, settings.gpus)


WAYS = {"plain": (False, False), "recomputing": (True, False), "offloaded": (True, True)}


def show_fits(fits: list[dict], gpus: tuple[float, ...]) -> None:
    """Print a row for each shape and type, and in the column of each GPU how many texts fit in each of three ways."""
    cells: dict[tuple, list[str]] = {}
    for row in fits:
        cells.setdefault((row["shape"], row["dtype"]), []).append(" / ".join(str(row[name] or "–") for name in WAYS))
    title = f"Texts of {TEXT} tokens that fit at a time: {' / '.join(WAYS)}"
    print_table(["", "type", *(f"{gb:g} GB" for gb in gpus)], [[*key, *row] for key, row in cells.items()], title)


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
