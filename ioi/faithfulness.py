"""Measure how faithful circuits are at MIB's sizes: CPR and CMD of attribution, random scores, and circuits in files.

Reads   a model; prompts (make_ioi_datasets.py), or those of another --task, which are generated; ablation values
        (compute_means.py), if --means names a file; circuits with scores, if --circuits names files.
Writes  data/ioi/<run>/: faithfulness.json, and for each way to score edges <way>.json, a graph of EAP-IG as it is
        submitted to MIB; prints a table.
Time    half a minute for the shipped model on one core.

The faithfulness of a circuit is its logit difference, as a share of the way from the model with all edges cut (0) to
the whole model (1). CPR is the area under the faithfulness of the best 0.1% to 100% of the edges, CMD the area between
it and 1; circuit_breaking/evaluation/faithfulness.py defines them. MIB has separate queries, keys and values
(--split-qkv), and outputs on counterfactual prompts as ablation values (--resample).

Edges are scored by EAP, by EAP-IG over inputs (if every prompt has a counterfactual), by EAP-IG over activations
(--activations, which takes two passes a layer more), by integrated mask gradients, by a ranking that is learned for
circuits of all sizes, and at random. docs/methods.md defines them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from circuit_breaking.errors import UserError
from circuit_breaking.ioi.settings import IOIMaskSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts
from circuit_breaking.runs.settings import SeedSettings


@dataclass
class Settings(IOIMaskSettings, SeedSettings):
    MOST_USED: ClassVar = (
        "model", "task", "prompts", "circuits", "means", "resample", "split_qkv", "num_attribution", "num_test",
        "eap_ig_steps", "ig_steps", "rank_steps", "run", "seed", "device",
    )  # fmt: skip

    circuits: tuple[Path, ...] = ()  # files of circuits with scores: graphs of EAP-IG (.json) or tables of edges (.csv)
    num_attribution: int = 100  # training prompts that attribution averages over
    num_test: int = 100  # held-out prompts that circuits are measured on
    eap_ig_steps: int = 5  # points of EAP-IG between counterfactual and prompt; 0: no EAP-IG
    points: Literal["gauss", "even"] = "gauss"  # where EAP-IG has its points; even: as in the published code
    activations: bool = False  # also run EAP-IG over activations
    ig_steps: int = 20  # points of integrated mask gradients; 0: leave them out
    rank_steps: int = 100  # steps of a learned ranking, each with two batches of half size; 0: leave it out
    attention_bias: Literal["heads", "stream"] = "heads"  # stream: cuts leave the output bias of attention there
    positions: Literal["embed", "stream"] = "embed"  # stream: cuts leave learned positions there
    prune: bool = True  # cut edges that are on no path from embed to output, as MIB does
    run: str = "faithfulness"

    def check(self) -> None:
        super().check()
        check_counts(self, "num_attribution", "num_test")
        if min(self.eap_ig_steps, self.ig_steps, self.rank_steps) < 0:
            raise UserError("eap_ig_steps, ig_steps and rank_steps are 0 or more.")


if __name__ == "__main__":
    settings = read_settings(Settings)

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from circuit_breaking.engine.conventions import values_left_in_stream
from circuit_breaking.evaluation.faithfulness import Curve, ends_of, faithfulness_curve, mean_of
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.ioi.experiment import Experiment, difference_on, open_experiment, paired_difference
from circuit_breaking.runs.circuit_files import read_circuit, write_circuit
from circuit_breaking.runs.circuits import Circuit
from circuit_breaking.runs.ioi_results import MASK_GRADIENTS, Faithfulness
from circuit_breaking.runs.plain_table import print_table
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.training.attribution import eap, integrated_mask_gradients
from circuit_breaking.training.circuit_ranking import rank_circuit
from circuit_breaking.training.input_attribution import PairedMetric, eap_ig_activations, eap_ig_inputs

BATCH = 20  # prompts of a forward pass
INPUTS, ACTIVATIONS, RANKING = "EAP-IG", "EAP-IG activations", "ranking"


def main(settings: Settings) -> None:
    settings.check()
    experiment = open_experiment(settings)
    model, folder = experiment.model, settings.out / settings.run
    apply_conventions(experiment)
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
    ends = ends_of(metric, model.mask.weights)
    curves: dict[str, dict[str, Curve]] = {}
    for name, circuit in circuits.items():
        curve = partial(faithfulness_curve, metric, circuit, model.mask.weights, prune=settings.prune, ends=ends)
        signed = curve(progress=f"{name}, cpr")
        signs = bool((circuit.scores < 0).any())  # else both orders are the same
        curves[name] = {"cpr": signed, "cmd": curve(absolute=True, progress=f"{name}, cmd") if signs else signed}
        path = folder / f"{name.replace(' ', '-')}.json"
        write_circuit(path, circuit.with_kept(circuit.scores > 0), model.embedding.shape[1])
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


def apply_conventions(experiment: Experiment) -> None:
    """Let cuts leave in the residual stream what the settings say (`engine.conventions`)."""
    settings, model, task = experiment.settings, experiment.model, experiment.task
    bias, positions = settings.attention_bias == "stream", settings.positions == "stream"
    if (bias or positions) and not settings.resample:  # both texts of a pair have the same bias and positions
        longest = max(task.train.tokens.shape[1], task.test.tokens.shape[1])
        model.means = values_left_in_stream(model, bias, positions, longest)


def attributed(experiment: Experiment) -> list[tuple[str, Callable[[], Tensor]]]:
    """Ways to score edges: name, and a function that returns the scores [E]."""
    settings, model = experiment.settings, experiment.model
    size = min(settings.micro_batch or BATCH, BATCH)
    batches = list(experiment.task.train[: settings.num_attribution].batches(size))
    counts = [len(batch) for batch in batches]

    def bar(name: str, items: list) -> Iterable:
        return progress_bar(items, desc=name, unit="batch")

    def paired(name: str) -> Iterable[PairedMetric]:
        return bar(name, [paired_difference(model, batch) for batch in batches])

    def drawn() -> Tensor:
        return torch.rand(len(model.graph), generator=torch.Generator().manual_seed(settings.seed))

    metrics = [difference_on(model, batch) for batch in batches]
    ways = [("EAP", lambda: eap(bar("EAP", metrics), model, counts))]
    if settings.eap_ig_steps and experiment.task.train.counterfactual is not None:
        about = model, settings.eap_ig_steps, settings.points, counts
        ways.append((INPUTS, lambda: eap_ig_inputs(paired(INPUTS), *about)))
        if settings.activations:
            ways.append((ACTIVATIONS, lambda: eap_ig_activations(paired(ACTIVATIONS), *about)))
    if settings.ig_steps:
        along = bar(MASK_GRADIENTS, experiment.metrics(settings.num_attribution, BATCH))
        ways.append((MASK_GRADIENTS, lambda: integrated_mask_gradients(along, model, settings.ig_steps)))
    if settings.rank_steps:
        halves = experiment.metrics(settings.num_attribution, BATCH // 2)
        ways.append((RANKING, lambda: rank_circuit(halves, model, settings.rank_steps, progress=RANKING)))
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
