"""Operations of one mask-training step, and how long they would take: computed from shapes, not measured.

A step multiplies every layer's weights with all tokens, once forward and once backward, and once more in the backward
pass with gradient checkpointing; mask and node outputs three times (reads, gradients of node outputs, gradient of the
mask), for a mask that is not binary; and the unembedding twice. Each product of an [a, b] and a [b, c] matrix counts as
2abc operations. Attention scores, norms and sums are left out, so a step takes longer than these operations alone.

`tflops` is the rate at which they are divided into a time. By default it is the rate that a measured step reached:
--measured-ms for one step of `measured_shape`. With `offload`, every step copies all layers to the GPU twice, at
`copy_gbps`, and takes at least as long as that. With `device_map`, every GPU after the first gets the outputs of all
nodes before its layers, and gives back the gradients of all reads from its first layer on; the second table says how
much that is, and how large the largest share of weights is.

Reads   nothing.
Writes  data/benchmarks/operations.json.
Time    seconds.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import DATA, write_json


@dataclass
class Settings:
    MOST_USED: ClassVar = ("shapes", "batch", "length", "dtype", "tflops", "copy_gbps", "out")

    shapes: tuple[str, ...] = ("gpt2-xl", "gemma-2-2b", "pythia-6.9b", "llama-3.1-8b")  # see steps.SHAPES and LARGE
    batch: int = 10  # texts in a step
    length: int = 50  # tokens in each
    dtype: str = "bfloat16"  # type of the weights that are copied
    split_qkv: bool = False  # a mask for each head's query, key and value
    tflops: float = 0.0  # operations a second, in 10^12; 0: the rate that the measured step reached
    measured_shape: str = "gpt2"  # shape of the measured step
    measured_batch: int = 32  # its texts
    measured_length: int = 64  # tokens in each
    measured_ms: float = 19.3  # its duration; docs/performance.md, H100, bfloat16, any mask: 18.9 ms x 1.02
    gpus: tuple[int, ...] = (2, 4)  # numbers of GPUs over which layers are spread, in the second table
    copy_gbps: float = 25.0  # GB a second from CPU memory to the GPU; about half of what PCIe 5.0 x16 allows
    out: Path = DATA / "benchmarks" / "operations.json"  # file to write


if __name__ == "__main__":
    settings = read_settings(Settings)

from types import SimpleNamespace

import torch
from memory import one_layer
from steps import check_shapes, config_of

from circuit_breaking.engine.device_map import balanced
from circuit_breaking.errors import UserError
from circuit_breaking.runs.config import check_counts
from circuit_breaking.runs.devices import pick_dtype
from circuit_breaking.runs.plain_table import print_table

COLUMNS = {
    "shape": "{}", "layers": "{:.1f}", "mask": "{:.2f}", "logits": "{:.2f}", "seconds": "{:.2f}",
    "recomputing": "{:.2f}", "copied_gb": "{:.1f}", "offloaded": "{:.2f}",
}  # fmt: skip
SPREAD_COLUMNS = {
    "shape": "{}",
    "gpus": "{}",
    "layers": "{}",
    "weights": "{:.1f}",
    "moved": "{:.1f}",
    "seconds": "{:.2f}",
}


def operations(shape: str, tokens: int, length: int, split_qkv: bool) -> dict[str, float]:
    """10^12 operations of one pass over the layers' weights, of the mask's products, and of the logits."""
    one, vocabulary = one_layer(shape, 0, length, split_qkv), config_of(SimpleNamespace(shape=shape)).vocab_size
    pairs = {  # of numbers that are multiplied and added for each token
        "layers": 2 * one.graph.n_layers * one.block,  # forward and backward
        "mask": 3 * len(one.graph) * one.width,
        "logits": 2 * vocabulary * one.width,
    }
    return {name: 2 * count * tokens / 1e12 for name, count in pairs.items()}


def spread(shape: str, gpus: int, tokens: int, length: int, item: int, split_qkv: bool) -> dict[str, Any]:
    """Layers on each of some GPUs, GB of the largest share of the weights, and GB that a step moves between them."""
    one = one_layer(shape, 0, length, split_qkv)
    counts = balanced(one.outer, one.block, one.graph.n_layers, gpus)
    firsts = [one.graph.layers[sum(counts[:number])] for number in range(1, len(counts))]  # of all GPUs but the first
    rows = sum(first.n_earlier_nodes + len(one.graph.readers) - first.first_reader for first in firsts)
    largest = max(one.outer + counts[0] * one.block, *(count * one.block for count in counts))
    moved = rows * tokens * one.width * item / 1e9
    return {"gpus": gpus, "layers": counts, "weights": largest * item / 1e9, "moved": moved}


def main(settings: Settings) -> None:
    check_counts(settings, "batch", "length", "measured_batch", "measured_length")
    check_shapes(*settings.shapes, settings.measured_shape, large=True)
    if min(settings.measured_ms, settings.copy_gbps) <= 0:
        raise UserError("measured_ms and copy_gbps are above 0.")
    item, length = torch.empty(0, dtype=pick_dtype(settings.dtype)).element_size(), settings.measured_length
    measured = operations(settings.measured_shape, settings.measured_batch * length, length, False)
    rate = settings.tflops or sum(measured.values()) / settings.measured_ms * 1000
    rows = []
    for shape in settings.shapes:
        row = {"shape": shape}
        row |= operations(shape, settings.batch * settings.length, settings.length, settings.split_qkv)
        row["seconds"] = (row["layers"] + row["mask"] + row["logits"]) / rate
        row["recomputing"] = row["seconds"] + row["layers"] / 2 / rate
        one = one_layer(shape, 0, settings.length, settings.split_qkv)
        row["copied_gb"] = 2 * one.graph.n_layers * one.block * item / 1e9
        row["offloaded"] = max(row["recomputing"], row["copied_gb"] / settings.copy_gbps)
        rows.append(row)
    about = settings.batch * settings.length, settings.length, item, settings.split_qkv
    several = [{"shape": name, **spread(name, gpus, *about)} for name in settings.shapes for gpus in settings.gpus]
    for row in several:
        row["seconds"] = row["moved"] / settings.copy_gbps
    write_json(settings.out, {"settings": replace(settings), "tflops": rate, "rows": rows, "spread": several})
    cells = [[form.format(row[name]) for name, form in COLUMNS.items()] for row in rows]
    title = f"Computed: 10^12 operations of a step, and seconds at {rate:.1f} of them a second"
    print_table([name.replace("_", " ") for name in COLUMNS], cells, title)
    cells = [[form.format(row[name]) for name, form in SPREAD_COLUMNS.items()] for row in several]
    title = (
        f"Layers on several GPUs: GB of the largest share of weights, GB moved by a step, at {settings.copy_gbps} GB/s"
    )
    print_table([*SPREAD_COLUMNS], cells, title)


if __name__ == "__main__":
    run_script(main, settings)
