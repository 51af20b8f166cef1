"""What cuts at the first position do: the rise of ordinary loss with and without them, by zero and by mean ablation.

The first token is an attention sink in many models, with outputs far larger than elsewhere. Edges from the node with
the largest output are cut in five ways: by zero ablation, by mean ablation with means over all positions, by mean
ablation with means that leave position 0 out, and by zero and mean ablation where position 0 is left alone
(`ablate_from` 1).

Reads   a model with trained weights; ordinary text, training texts for means and held-out texts for losses.
Writes  data/benchmarks/first_position.json; prints a table.
Time    two minutes for 135M parameters on one core.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts
from circuit_breaking.runs.files import DATA, write_json
from circuit_breaking.runs.settings import ModelSettings, SeedSettings


@dataclass
class Settings(ModelSettings, SeedSettings):
    MOST_USED: ClassVar = ("model", "cuts", "ordinary", "num_means", "num_test", "length", "device", "out")

    cuts: tuple[str, ...] = ()  # what to cut: edges such as m11->m29, or nodes such as m11; none: of the largest output
    ordinary: str = "tiny"  # ordinary text: tiny, a text, JSONL or CSV file, or a hub name
    num_means: int = 100  # training texts that means are taken over
    num_test: int = 60  # held-out texts that losses are measured on
    length: int = 40  # tokens of a text, the prefix included
    out: Path = DATA / "benchmarks" / "first_position.json"  # file of the numbers

    def check(self) -> None:
        check_counts(self, "num_means", "num_test", "length")


if __name__ == "__main__":
    settings = read_settings(Settings)

import torch
from torch import Tensor

from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.models.load import load_tokenizer
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.tasks import OWTTask

WAYS = {  # heading -> whether to cut by means, from which position on they are taken, from which position cuts act
    "zero": (False, 0, 0),
    "mean": (True, 0, 0),
    "mean without position 0": (True, 1, 0),
    "zero, ablate_from 1": (False, 1, 1),
    "mean, ablate_from 1": (True, 1, 1),
}


def sizes(model: EdgeMaskedTransformer, task: OWTTask, num: int) -> tuple[Tensor, Tensor]:
    """Mean norm of each node's output at position 0, and at the later ones of held-out texts: [P] each."""
    at_first, later, count = 0.0, 0.0, 0
    for batch in task.test[:num].batches(task.evaluation_batch):
        norms = model.node_outputs(batch.tokens.to(model.device)).norm(dim=-1)  # [P, B, T]
        real = batch.real[:, 1:].to(norms)
        at_first = at_first + norms[:, :, 0].sum(1)
        later = later + (norms[:, :, 1:] * real).sum((1, 2))
        count += int(real.sum())
    return at_first / min(num, len(task.test)), later / count


def edges_of(model: EdgeMaskedTransformer, cut: str) -> list[str]:
    """The edge of that name, or all edges that start at the node of that name."""
    return [cut] if "->" in cut else [edge for edge in model.graph.edges if edge.source == cut]


@torch.no_grad()
def main(settings: Settings) -> None:
    settings.check()
    model = load_model(settings.model, device=settings.device, dtype=settings.dtype)
    task = OWTTask(load_tokenizer(settings.model), settings.ordinary, settings.length, seed=settings.seed)
    first, later = sizes(model, task, settings.num_test)
    largest = int(first.argmax())
    node = model.graph.sources[largest]
    means: dict[int, Tensor] = {}
    for model.ablate_from in (0, 1):
        means[model.ablate_from] = task.compute_means(model, settings.num_means)
    whole = task.get_test_loss(model, settings.num_test)
    rises: dict[str, dict[str, float]] = {}
    for cut in progress_bar(settings.cuts or (f"{node}->output", node), desc="cuts", unit="cut"):
        model.mask.reset_()
        model.mask.cut_(edges_of(model, cut))
        rises[cut] = {}
        for way, (by_means, means_from, model.ablate_from) in WAYS.items():
            model.means = means[means_from] if by_means else None
            rises[cut][way] = task.get_test_loss(model, settings.num_test) - whole
    about = {
        "largest": node, "norm_at_first": float(first[largest]), "norm_later": float(later[largest]),
        "norm_of_mean": float(means[0][largest].norm()), "norm_of_mean_without_first": float(means[1][largest].norm()),
        "loss": whole,
    }  # fmt: skip
    print(
        f"{node} has the largest output: norm {about['norm_at_first']:,.0f} at position 0 and "
        f"{about['norm_later']:,.0f} later; its mean has norm {about['norm_of_mean']:,.1f}, without position 0 "
        f"{about['norm_of_mean_without_first']:,.1f}. Ordinary loss: {whole:.3f} nats."
    )
    rows = [[cut, *(f"{rise:.3f}" for rise in row.values())] for cut, row in rises.items()]
    print_table(["cut", *WAYS], rows, "rise of the ordinary loss, nats")
    write_json(settings.out, {**about, "rises": rises, **provenance(settings)})
    print(f"written to {settings.out}")


if __name__ == "__main__":
    run_script(main, settings)
