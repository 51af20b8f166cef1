"""Masks for other questions than how to break: necessary and sufficient edges, other ways to break, a whole circuit.

    necessary    edges whose cutting breaks the behaviour most; ordinary text does not count (no keep term)
    sufficient   as few edges as possible that show the behaviour by themselves: keep it and cut the rest
    outside      edges outside a known circuit (`frozen`), which stays whole, that break the behaviour
    inside       edges of a known circuit (`frozen`), and no others, that break the behaviour
    covering     masks that break, one after another, each without the edges of those before, until none breaks or there
                 are enough; their union covers the circuit

Reads   a model; prompts (make_ioi_datasets.py); ordinary text; ablation values (compute_means.py), if --means names a
        file; for `outside` and `inside`, the list of edges of a run, or the published circuit of GPT-2 small.
Writes  data/ioi/<run>/: what train_mask.py writes; for `sufficient` kept_edges.json in place of edges.json, stages.json
        and stages.png in place of the log of training; for `covering` the files of each mask in mask1/, mask2/, ...,
        those of their union in the folder itself, and covering.json. During training also checkpoints, from which the
        same command continues an interrupted mask (`sufficient` trains nothing and starts again).
Time    half a minute per mask for the shipped model on one core.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from circuit_breaking.errors import UserError
from circuit_breaking.ioi.settings import IOIMaskSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts
from circuit_breaking.runs.settings import ResumeSettings, TrackingSettings


@dataclass
class Settings(IOIMaskSettings, ResumeSettings, TrackingSettings):
    MOST_USED: ClassVar = (
        "kind", "model", "task", "prompts", "max_edges", "means", "frozen", "masks", "faithful", "run", "seed",
        "device",
    )  # fmt: skip

    kind: Literal["necessary", "sufficient", "outside", "inside", "covering"] = "necessary"  # the question, see above
    run: str | None = None  # name of the run folder, in the folder out; None: the kind
    frozen: str = "run"  # edges that stay (outside) or alone are cut (inside): a run, a file, or published (GPT-2)
    masks: int = 4  # covering: most masks
    broken: float = 0.5  # covering: largest share of the logit difference that a mask that breaks may leave
    faithful: float = 0.9  # sufficient: share of the logit difference that must stay
    shrink: float = 0.8  # sufficient: edges kept after a stage of pruning, as a share of those before it
    prune_rounds: int = 20  # sufficient: rounds of a stage, each with one gradient
    prune_batch_size: int = 20  # sufficient: prompts of a round
    num_measured: int = 100  # sufficient: training prompts on which the share that stays is measured
    max_edges: int = 10  # most edges that a mask cuts; not used for sufficient

    def check(self) -> None:
        super().check()
        check_counts(self, "masks", "num_measured")


if __name__ == "__main__":
    settings = read_settings(Settings)

import torch
from torch import Tensor

from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.indirect_objects import draw_run, draw_stages
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.ioi.experiment import Experiment, open_experiment, open_task, write_run
from circuit_breaking.ioi.known_circuits import circuit_edges
from circuit_breaking.runs.ioi_results import Covering, Stages
from circuit_breaking.runs.mask_record import KEPT_EDGES, CutEdges, KeptEdges, read_edges_of_interest
from circuit_breaking.runs.signals import stop_signals
from circuit_breaking.training.config import PruneSettings
from circuit_breaking.training.prune import prune, smallest
from circuit_breaking.training.run import train_into

PUBLISHED = "published"  # value of `frozen`: the circuit of GPT-2 small in circuit_breaking/ioi/known_circuits.py


def main(settings: Settings) -> None:
    settings.check()
    experiment = open_experiment(settings)
    folder = settings.out / (settings.run or settings.kind)
    before = experiment.summary()
    KINDS[settings.kind](folder, experiment, before)
    print(f"written to {folder}")


def necessary(folder: Path, experiment: Experiment, before: dict[str, float]) -> None:
    """Break without a keep term."""
    alone = replace(experiment.settings, keep_weight=0.0, alpha=1.0)
    train(folder, replace(experiment, settings=alone))
    finish(folder, experiment, before)


def sufficient(folder: Path, experiment: Experiment, before: dict[str, float]) -> None:
    """Prune as long as the rest keeps its share of the logit difference on training prompts."""
    given, model = experiment.settings, experiment.model
    task = open_task(given, experiment.tokenizer)  # by cross entropy
    metrics = experiment.metrics(given.num_measured, 20)

    def share(mask: Tensor) -> float:
        with torch.no_grad():
            differences = [[float(metric(weights)) for metric in metrics] for weights in (mask, torch.ones_like(mask))]
        return sum(differences[0]) / sum(differences[1])

    pruning = PruneSettings(given.prune_rounds, given.shrink, batch_size=given.prune_batch_size)
    found, stages = smallest(prune(model, task, pruning), share, given.faithful)
    if found is None:
        raise UserError(
            f"no stage of pruning keeps {given.faithful:.0%} of the logit difference: the first, {stages[0]['kept']:,} "
            f"edges, {stages[0]['share']:.0%}. Give more prune_rounds, a larger shrink, or means."
        )
    with torch.no_grad():
        model.mask.weights.copy_(found.mask)
    Stages(faithful=given.faithful, n_edges=len(model.graph), stages=stages).write(folder / "stages.json")
    draw_stages(folder)
    after = finish(folder, experiment, before, kept=True)
    part = after["logit_difference"] / before["logit_difference"]
    print(f"{found.kept:,} edges, {found.kept / len(model.graph):.0%} of all, keep {part:.0%} of the logit difference")


def outside(folder: Path, experiment: Experiment, before: dict[str, float]) -> None:
    """Break by edges that are not frozen."""
    frozen = read_frozen(experiment.settings, experiment.model.graph)
    train(folder, experiment, without(experiment, frozen))
    finish(folder, experiment, before, more={"frozen": frozen})


def inside(folder: Path, experiment: Experiment, before: dict[str, float]) -> None:
    """Break by edges of a known circuit alone."""
    circuit = read_frozen(experiment.settings, experiment.model.graph)
    train(folder, experiment, ~without(experiment, circuit))
    finish(folder, experiment, before, more={"circuit": circuit})


def covering(folder: Path, experiment: Experiment, before: dict[str, float]) -> None:
    """Masks one after another, each without the edges of those before."""
    model, union, found = experiment.model, [], []
    enough = experiment.settings.broken * before["logit_difference"]
    with stop_signals():
        for number in range(1, experiment.settings.masks + 1):
            if not bool((allowed := without(experiment, union)).any()):
                break
            one = folder / f"mask{number}"
            train(one, experiment, allowed)
            after = finish(one, experiment, before)
            breaks = after["logit_difference"] <= enough
            found.append({"edges": model.mask.cut_edges(), "breaks": breaks, **after})
            if not breaks:
                print(f"mask {number} leaves too much: without the {len(union)} edges before it nothing breaks")
                break
            union += model.mask.cut_edges()
    model.mask.reset_()
    model.mask.cut_(union)
    after = finish(folder, experiment, before)
    covered = Covering(before=before, masks=found, union={"edges": union, **after}, provenance=experiment.provenance)
    covered.write(folder / "covering.json")
    end_with_page(folder)
    print(f"the union of {sum(one['breaks'] for one in found)} masks that break: {len(union)} edges")


def train(folder: Path, experiment: Experiment, allowed: Tensor | None = None) -> None:
    """Train a mask, or continue an interrupted training. The mask is left in the model."""
    given = experiment.settings
    train_into(
        folder, experiment.model, experiment.task, experiment.ordinary, given, allowed, experiment.provenance,
        given.resume, given.checkpoint_every, log_with=given.log_with,
    )  # fmt: skip


KINDS = {
    "necessary": necessary, "sufficient": sufficient, "outside": outside, "inside": inside, "covering": covering,
}  # fmt: skip


def without(experiment: Experiment, edges: list[str]) -> Tensor:
    """The edges that may be cut, bool [E]: all but those named."""
    allowed = torch.ones(len(experiment.model.graph), dtype=torch.bool)
    allowed[[experiment.model.graph.index(edge) for edge in edges]] = False
    return allowed.to(experiment.model.device)


def read_frozen(settings: Settings, graph: EdgeGraph) -> list[str]:
    """Names of the edges of the known circuit."""
    if settings.frozen == PUBLISHED:
        return sorted(circuit_edges(graph), key=graph.index)
    hint = "Train a mask with ioi/train_mask.py, or set frozen to a run, its list of edges, or 'published'."
    path = Path(settings.frozen)
    if path.suffix != ".json":
        return read_edges_of_interest(settings.out / settings.frozen, hint)
    return (KeptEdges if path.name == KEPT_EDGES else CutEdges).read(path, hint).edges


def finish(
    folder: Path,
    experiment: Experiment,
    before: dict[str, float],
    kept: bool = False,
    more: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Write and draw the model's mask, print what it does, and return its measures."""
    after = experiment.summary()
    results = {"kind": experiment.settings.kind, "before": before, "after": after, **(more or {})}
    write_run(folder, "ioi/alternative_masks.py", experiment, results, kept)
    draw_run(folder)
    end_with_page(folder)
    cut = experiment.model.mask.n_cut()
    print(f"{experiment.settings.kind}: {cut:,} of {len(experiment.model.graph):,} edges cut")
    for name in ("logit_difference", "accuracy", "ordinary_loss"):
        print(f"  {name.replace('_', ' ')}: {before[name]:.3f} -> {after[name]:.3f}")
    return after


if __name__ == "__main__":
    run_script(main, settings)
