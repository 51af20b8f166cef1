"""The earlier version of the experiment: greedy ablation, one edge per step.

Each step scores the cut of every edge and makes the one that helps most. Naive: a cut helps if it raises the loss on
the bad examples. Less naive: a term that keeps the ordinary loss low is added. All cuts of a step are scored in one
batched computation (circuit_breaking/mnist/greedy.py), over all edges of both layers.

Reads   the same images as mnist/main.py; with --network a network.safetensors that main.py wrote with the same --seed,
        --target-class and data. Without it the same network is trained again.
Writes  data/mnist/<run>/: settings.json, metrics.jsonl, network.safetensors, masks.safetensors, edges_by_mask.json (in
        the order of cutting), mnist_report.json and pictures (*.png). During the run also checkpoints/, from which the
        same command continues an interrupted run.
Time    about a minute on two CPU cores for 100 steps of both kinds with MNIST, seconds with the small digits.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from circuit_breaking.mnist.settings import ExperimentSettings
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.files import require_file


@dataclass
class Settings(ExperimentSettings):
    MOST_USED: ClassVar = (
        "run", "source", "data", "network", "target_class", "n_bad", "steps", "n_keep", "keep_target", "seed", "device",
    )  # fmt: skip

    run: str = "old"
    network: Path | None = None  # network.safetensors of main.py; None: train the same network
    steps: int = 100  # edges to cut, one per step
    n_keep: int = 256  # ordinary training images in the keep term of the less naive kind
    keep_target: bool = False  # include the target class in them
    ratio: float = 1.0  # weight of the bad examples' loss relative to theirs
    cap: float = 6.0  # most that the loss of a bad example counts, nats
    evaluate_every: int = 5  # steps between the points of the figure

    def check(self) -> None:
        super().check()
        if self.network is not None:
            require_file(self.network, "Give a network.safetensors that mnist/main.py wrote.")


if __name__ == "__main__":
    settings = read_settings(Settings)

import torch
from mlp_model import MaskedMLP, load_network
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.mnist import draw_run
from circuit_breaking.mnist.breaking import train_network
from circuit_breaking.mnist.digits import Split
from circuit_breaking.mnist.experiment import Experiment, open_experiment, write_run
from circuit_breaking.mnist.greedy import Objective, make_objective, score_cuts
from circuit_breaking.mnist.report import show
from circuit_breaking.runs.checkpoints import Checkpoints, Saved
from circuit_breaking.runs.config import option
from circuit_breaking.runs.run_folder import CheckpointedParts
from circuit_breaking.training.loop import run_steps

TOLERANCE = 1e-6  # relative; an objective is a float32 sum


def main(settings: Settings) -> None:
    with open_experiment(settings, [settings.network] if settings.network else []) as experiment:
        cut(settings, experiment)


def cut(settings: Settings, experiment: Experiment) -> None:
    """Cut edges in both ways, and write the results."""
    images, split, parts = experiment.images, experiment.split, experiment.parts
    network, device = get_network(settings, split, images.source, parts), split.train_is_target.device
    bad = split.pick("bad examples")
    kept = torch.ones_like(split.train_is_target) if settings.keep_target else ~split.train_is_target
    kept = kept.nonzero().flatten()
    generator = torch.Generator().manual_seed(settings.seed)
    kept = kept[torch.randperm(len(kept), generator=generator)[: settings.n_keep].to(device)]
    keep = (split.x["train"][kept], split.y["train"][kept])
    objectives = {
        "naive": make_objective(bad, None, settings.ratio, settings.cap),
        "less naive": make_objective(bad, keep, settings.ratio, settings.cap),
    }
    rows, masks, edges, seconds = [], {}, {}, {}
    results: dict[str, Any] = {"original": {"edges cut": 0, **split.accuracies(lambda x: network(x).argmax(1))}}
    for name, objective in objectives.items():
        part = parts.open(name)
        masks[name], order, metrics = cut_greedily(
            network, objective, split, settings.steps, settings.evaluate_every, name, **part
        )
        seconds[name] = part["checkpoints"].seconds()
        edges[name] = [network.edge_name(edge, images.side) for edge in order]
        rows += [{"variant": name, **row} for row in metrics]
        results[name] = {key: metrics[-1][key] for key in results["original"]}
        results[name]["first-layer edges cut"] = int((masks[name][: network.n_first] == 0).sum())

    report = write_run(experiment, "mnist/old.py", settings, network, results, rows, masks, edges, seconds)
    parts.remove()
    pictures = draw_run(experiment.folder)
    end_with_page(experiment.folder)
    show(report)
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"greedy steps: {times}; {experiment.folder} holds the results and {len(pictures)} pictures")


def get_network(settings: Settings, split: Split, source: str, parts: CheckpointedParts) -> MaskedMLP:
    """The network of `settings.network` if it fits this task, else one trained as main.py trains it."""
    if settings.network is None:
        x, y = split.x["train"], split.y["train"]
        network = train_network(
            lambda: MaskedMLP(x.shape[1], settings.width, len(split.groups)), x, y, settings.train_steps,
            settings.train_batch_size, settings.train_lr, settings.seed, "network", **parts.open("network"),
        )  # fmt: skip
        network.set_means(x)
        return network
    network, record = load_network(settings.network)
    for name in ("seed", "target_class", "n_bad"):
        if getattr(record, name) != getattr(settings, name):
            raise UserError(
                f"{settings.network} was made with {name} {getattr(record, name)}, not {getattr(settings, name)}."
                f" Give the same {option(name)}, or leave --network out."
            )
    if network.first.in_features != split.x["train"].shape[1] or record.source != source:
        raise UserError(
            f"{settings.network} was trained on other images ({record.source}). Give those, or leave --network out."
        )
    return network.to(split.train_is_target.device).requires_grad_(False)


def cut_greedily(
    network: MaskedMLP,
    objective: Objective,
    split: Split,
    steps: int,
    evaluate_every: int,
    label: str,
    checkpoints: Checkpoints | None = None,
    resume_from: Saved | None = None,
) -> tuple[Tensor, list[int], list[dict[str, Any]]]:
    """Cut one edge a step, the one whose cut makes the objective smallest; stop early where no cut helps.

    Returns the binary mask [n_edges], the edges in the order of cutting, and rows of metrics.
    """
    mask = network.full_mask()
    done, helps, order = 0, True, []
    if resume_from is None:
        rows = [{"step": 0, "edges cut": 0, **split.accuracies(lambda x: network(x).argmax(1))}]
    else:
        done, values = resume_from.step, resume_from.values
        order, rows, helps = values["order"], values["rows"], values["helps"]
        mask[order] = 0

    def step(number: int) -> None:
        nonlocal helps
        now, scores = score_cuts(network, mask, objective)
        best = int(scores.argmin())
        # by more than rounding: once every bad example is at its cap, all candidates are equal but for that
        helps = bool(scores[best] < now - TOLERANCE * now.abs().clamp(min=1))
        if helps:
            mask[best] = 0
            order.append(best)
        if (number + 1) % evaluate_every == 0 or number + 1 == steps or not helps:
            row = {"objective": float(min(now, scores[best])), "edges cut": len(order)}
            rows.append({"step": len(order), **row, **split.accuracies(lambda x: network(x, mask).argmax(1))})

    def describe() -> str | None:
        return f"loss={rows[-1]['objective']:.3f}, cut={len(order)}" if "objective" in rows[-1] else None

    if helps:
        run_steps(
            step,
            steps,
            label=label,
            unit="cut",
            done=done,
            describe=describe,
            checkpoints=checkpoints,
            state=lambda: {"mask": mask},
            values=lambda: {"order": order, "rows": rows, "helps": helps},
            is_over=lambda: not helps,
        )
        if not helps:
            print(f"{label}: no further cut helps after {len(order)}")
    return mask, order, rows


if __name__ == "__main__":
    run_script(main, settings)
