"""Rounding error of models with cut edges, by the share of edges that are cut, beside that of the whole model.

A text is read in float64 and in each precision by the Hugging Face model with cut edges and by the engine. The error is
the KL divergence of the next-token distribution from that in float64, in nats, mean over positions. The rounding of the
weights themselves is left out: the model in float64 has the weights of the precision that it is compared with.

The last row has all edges cut that start at one node, that with the largest output at any position. Nothing is harder
for a model that subtracts cut outputs from the residual stream.

Reads   a model. One with trained weights has outputs that grow over layers, as random weights have not.
Writes  data/benchmarks/rounding.json.
Time    two minutes for 135M parameters on two cores.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import DATA, finite, write_json
from circuit_breaking.runs.settings import SeedSettings

TEXT = "The town lies on a river, an hour from the sea. Each spring its people meet to mend the old wooden bridge."


@dataclass
class Settings(SeedSettings):
    MOST_USED: ClassVar = ("model", "shares", "dtypes", "text", "out")

    model: str = "tiny"  # hub name, folder, or folder that holds a .gguf
    shares: tuple[float, ...] = (0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99)  # shares of all edges that are cut, at random
    dtypes: tuple[str, ...] = ("bfloat16", "float16", "float32")  # precisions; the engine has no float16
    text: str = TEXT  # what the models read
    out: Path = DATA / "benchmarks" / "rounding.json"  # file of the numbers

    def check(self) -> None:
        if not all(0 <= share <= 1 for share in self.shares):
            raise UserError("shares are between 0 and 1.")
        if unknown := set(self.dtypes) - {"bfloat16", "float16", "float32"}:
            raise UserError(f"dtypes are bfloat16, float16 and float32, not {', '.join(sorted(unknown))}.")


if __name__ == "__main__":
    settings = read_settings(Settings)

import copy

import torch
from torch import Tensor, nn

from circuit_breaking.ablated import ablate
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.models import load_hf_model, load_model, load_tokenizer
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.runs.provenance import provenance


def divergence(exact: Tensor, logits: Tensor) -> float:
    """KL divergence in nats of the distributions of `logits` from those of `exact`, mean over positions."""
    if not logits.isfinite().all():
        return float("nan")
    exact, found = exact.log_softmax(-1), logits.double().log_softmax(-1)
    return float((exact.exp() * (exact - found)).sum(-1).mean())


@torch.no_grad()
def largest_node(model: EdgeMaskedTransformer, tokens: Tensor) -> str:
    """The node whose output has the largest norm at any position."""
    sizes = model.node_outputs(tokens).norm(dim=-1).flatten(1).amax(1)
    return model.graph.sources[int(sizes.argmax())]


def cut_sets(model: EdgeMaskedTransformer, tokens: Tensor, settings: Settings) -> dict[str, list[str]]:
    """The edges that are cut in each row of the table, by the name of the row."""
    edges = model.graph.edges
    order = torch.randperm(len(edges), generator=torch.manual_seed(settings.seed)).tolist()
    sets = {
        f"{share:.1%}": [edges[number] for number in order[: round(share * len(edges))]] for share in settings.shares
    }
    node = largest_node(model, tokens)
    return sets | {f"all of {node}": [edge for edge in edges if edge.source == node]}


@torch.no_grad()
def errors(hf: nn.Module, tokens: Tensor, sets: dict[str, list[str]], dtype: str) -> dict[str, dict[str, float]]:
    """The errors in one precision: for each set of edges, of the ablated model and, where it has it, of the engine."""
    low = copy.deepcopy(hf).to(getattr(torch, dtype))
    exact = copy.deepcopy(low).double()
    engine = None if dtype == "float16" else load_model(low, device="cpu", dtype=dtype)
    rows = {}
    for name, edges in progress_bar(sets.items(), desc=dtype):
        with ablate(exact, edges):
            right = exact(tokens).logits
        with ablate(low, edges):
            row = {"edges": len(edges), "ablated": divergence(right, low(tokens).logits)}
        if engine is not None:
            engine.mask.weights.fill_(1.0)
            engine.mask.cut_(edges)
            row["engine"] = divergence(right, engine(tokens))
        rows[name] = row
    return rows


def main(settings: Settings) -> None:
    settings.check()
    hf, tokenizer = load_hf_model(settings.model, "cpu"), load_tokenizer(settings.model)
    tokens = tokenizer(settings.text, return_tensors="pt")["input_ids"]
    sets = cut_sets(load_model(hf, device="cpu"), tokens, settings)
    found = {dtype: errors(hf, tokens, sets, dtype) for dtype in settings.dtypes}
    columns = [
        (dtype, name)
        for dtype, rows in found.items()
        for name in ("ablated", "engine")
        if all(name in row for row in rows.values())
    ]
    header = ["edges cut", *(f"{dtype}, {name}" for dtype, name in columns)]
    rows = [[cut, *(f"{found[dtype][cut][name]:.1e}" for dtype, name in columns)] for cut in sets]
    print_table(header, rows, "KL divergence from float64, nats")
    write_json(settings.out, finite({"errors": found, **provenance(settings)}))
    print(f"written to {settings.out}")


if __name__ == "__main__":
    run_script(main, settings)
