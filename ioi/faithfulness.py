"""Measure how faithful circuits are at MIB's sizes: CPR and CMD of EAP, EAP-IG, random scores, and circuits in files.

Reads   a model; prompts (make_ioi_datasets.py), or those of another --task, which are generated; ablation values
        (compute_means.py), if --means names a file; circuits with scores, if --circuits names files.
Writes  data/ioi/<run>/: faithfulness.json, and for each way to score edges <way>.json, a graph of EAP-IG as it is
        submitted to MIB; prints a table.
Time    half a minute for the shipped model on one core.

The faithfulness of a circuit is its logit difference, as a share of the way from the model with all edges cut (0) to
the whole model (1). CPR is the area under the faithfulness of the best 0.1% to 100% of the edges, CMD the area between
it and 1; circuit_breaking/evaluation/faithfulness.py defines them. MIB has separate queries, keys and values
(--split-qkv), and counterfactual inputs in place of means.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.ioi.settings import IOIMaskSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts
from circuit_breaking.runs.settings import SeedSettings


@dataclass
class Settings(IOIMaskSettings, SeedSettings):
    MOST_USED: ClassVar = (
        "model", "task", "prompts", "circuits", "means", "split_qkv", "num_attribution", "num_test", "ig_steps", "run",
        "seed", "device",
    )  # fmt: skip

    circuits: tuple[Path, ...] = ()  # files of circuits with scores: graphs of EAP-IG (.json) or tables of edges (.csv)
    num_attribution: int = 100  # training prompts that attribution averages over
    num_test: int = 100  # held-out prompts that circuits are measured on
    ig_steps: int = 20  # points on the line of integrated gradients; 0: no EAP-IG
    prune: bool = True  # cut edges that are on no path from embed to output, as MIB does
    run: str = "faithfulness"

    def check(self) -> None:
        super().check()
        check_counts(self, "num_attribution", "num_test")


if __name__ == "__main__":
    settings = read_settings(Settings)

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict

import torch
from torch import Tensor

from circuit_breaking.evaluation.faithfulness import Curve, faithfulness_curve, mean_of
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.ioi.experiment import Experiment, difference_on, open_experiment
from circuit_breaking.runs.circuit_files import read_circuit, write_circuit
from circuit_breaking.runs.circuits import Circuit
from circuit_breaking.runs.ioi_results import Faithfulness
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.training.attribution import eap, eap_ig
from circuit_breaking.training.mask_gradient import MaskFunction

BATCH = 20  # prompts of a forward pass


def main(settings: Settings) -> None:
    settings.check()
    experiment = open_experiment(settings)
    model, folder = experiment.model, settings.out / settings.run
    ways = attributed(experiment)
    names = [*(path.stem for path in settings.circuits), *(name for name, _ in ways)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two circuits are called {twice[0]}. Give their files other names.")
    circuits = {path.stem: read_circuit(path, model.graph) for path in settings.circuits}
    seconds = {}
    for name, scores in ways:
        start = time.perf_counter()
        circuits[name] = Circuit(model.graph, torch.ones(len(model.graph)), scores())
        seconds[name] = time.perf_counter() - start
    count = min(settings.num_test, len(experiment.task.test))
    size = next(size for size in range(min(BATCH, count), 0, -1) if count % size == 0)  # equal batches
    metric = mean_of([difference_on(model, batch) for batch in experiment.task.test[:count].batches(size)])
    curves: dict[str, dict[str, Curve]] = {}
    for name, circuit in circuits.items():
        curves[name] = {
            kind: faithfulness_curve(
                metric, circuit, model.mask.weights, absolute=absolute, prune=settings.prune, progress=f"{name}, {kind}"
            )
            for kind, absolute in (("cpr", False), ("cmd", True))
        }
        write_circuit(folder / f"{name}.json", circuit.with_kept(circuit.scores > 0), model.embedding.shape[1])
    result = Faithfulness(
        task=settings.task,
        n_edges=len(model.graph),
        num_prompts=count,
        circuits={
            name: {
                "cpr": found["cpr"].cpr,
                "cmd": found["cmd"].cmd,
                "seconds": seconds.get(name),
                "curves": {kind: {**asdict(one), "faithfulness": one.faithfulness} for kind, one in found.items()},
            }
            for name, found in curves.items()
        },
        provenance=experiment.provenance,
    )
    result.write(folder / "faithfulness.json")
    end_with_page(folder)
    show(result)
    print(f"written to {folder}")


def attributed(experiment: Experiment) -> list[tuple[str, Callable[[], Tensor]]]:
    """Ways to score edges: name, and a function that returns the scores [E]."""
    settings, model = experiment.settings, experiment.model

    def over(name: str) -> Iterable[MaskFunction]:
        return progress_bar(experiment.metrics(settings.num_attribution, BATCH), desc=name, unit="batch")

    def drawn() -> Tensor:
        return torch.rand(len(model.graph), generator=torch.Generator().manual_seed(settings.seed))

    ways = [("EAP", lambda: eap(over("EAP"), model))]
    if settings.ig_steps:
        ways.append(("EAP-IG", lambda: eap_ig(over("EAP-IG"), model, settings.ig_steps)))
    return [*ways, ("random", drawn)]


def show(result: Faithfulness) -> None:
    """Print a column for each circuit: CPR, CMD, the seconds that scoring took, and the faithfulness at each size."""
    circuits = list(result.circuits.values())
    rows = [[key.upper(), *(f"{one[key]:.3f}" for one in circuits)] for key in ("cpr", "cmd")]
    rows.append(["seconds", *("–" if one["seconds"] is None else f"{one['seconds']:.1f}" for one in circuits)])
    for at, fraction in enumerate(circuits[0]["curves"]["cpr"]["fractions"]):
        values = (one["curves"]["cpr"]["faithfulness"][at] for one in circuits)
        rows.append([f"{fraction:.1%} of the edges", *(f"{value:.2f}" for value in values)])
    print_table(["", *result.circuits], rows, f"faithfulness, {result.task}, {result.n_edges:,} edges")


if __name__ == "__main__":
    run_script(main, settings)
