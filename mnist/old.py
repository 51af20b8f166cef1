"""The earlier version of the experiment: greedy ablation, one edge a step.

At each step every edge's cut is scored and the one that helps most is made. Naive: helping means a higher loss on the
bad examples. Less naive: a term that keeps the ordinary loss low is added. All candidates of a step are scored in one
batched computation (greedy.py), over all edges of both layers.

Reads the same images as mnist/main.py, and --network if given: a network.safetensors that main.py wrote with the same
--seed, --target_class and data; without it the same network is trained anew.
Writes data/mnist/<run>/: settings.json, metrics.jsonl, network.safetensors, mask.safetensors, edges.json (in the order
of cutting), report.json and pictures (*.png). While it runs, checkpoints/, from which a run that was interrupted goes
on when it is started again.
Takes about a minute on 2 CPU cores for 100 steps of both kinds with MNIST, seconds with the small digits.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from breaking import steps_left, train_network
from greedy import Objective, make_objective, score_cuts
from mlp_model import MaskedMLP, load_network
from results import record_of, write_run
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.figures.mnist import draw_run
from circuit_breaking.mnist.digits import DEFAULT_FOLDER, Images, Source, Split, load_images, split_images
from circuit_breaking.mnist.report import check_settings, describe, print_table
from circuit_breaking.runs.checkpoints import Checkpoints, Saved
from circuit_breaking.runs.cli import run_script
from circuit_breaking.runs.devices import cpu_threads, pick_device
from circuit_breaking.runs.run_folder import CheckpointedParts, locked
from circuit_breaking.runs.signals import stop_signals

TOLERANCE = 1e-6  # relative; an objective is a float32 sum


@dataclass
class Settings:
    run: str = "old"  # name of the results' folder
    out: Path = DEFAULT_FOLDER  # the results' folder lies in this one
    data: Path = DEFAULT_FOLDER  # folder of the four IDX files, .gz or not
    source: Source = "auto"  # auto: IDX files if there are any, else the hub, else scikit-learn's small digits
    network: Path | None = None  # network.safetensors of main.py; default: train the same one
    target_class: int = 3  # class whose grouping is the bad behaviour
    n_bad: int = 30  # examples of it to learn from, taken from the test images
    seed: int = 0  # pairs of classes, initial weights, choice of the examples
    device: str = "auto"  # auto, cpu, cuda, mps
    threads: int = 1  # of the CPU; more gain little here and lose much where cores are shared; 0: torch's choice

    resume: bool = True  # go on from the run folder's checkpoints, if they are of the same settings, data and code
    checkpoint_every: int = 200  # steps between checkpoints; 0: only at ends and when told to stop (SIGTERM, SIGUSR1)

    width: int = 50  # hidden units
    train_steps: int = 1800  # of the network's training
    train_batch_size: int = 512  # images a step of it
    train_lr: float = 8e-3  # highest learning rate of its one cycle

    steps: int = 100  # cuts
    n_keep: int = 256  # ordinary training images of the less naive kind's keep term
    keep_target: bool = False  # whether they include the target class
    ratio: float = 1.0  # weight of the bad examples' loss against theirs
    cap: float = 6.0  # nats of a bad example's loss that count
    evaluate_every: int = 5  # steps between the points of the figure


def main(settings: Settings) -> None:
    check_settings(settings)
    with cpu_threads(settings.threads):
        run(settings)


def run(settings: Settings) -> None:
    started = time.perf_counter()
    device = pick_device(settings.device)
    folder = settings.out / settings.run
    images = load_images(settings.data, settings.source, device)
    split = split_images(images, settings.target_class, settings.n_bad, settings.seed)
    print(describe(images, split))
    inputs = [settings.network] if settings.network else []
    record = record_of(settings, images, inputs)
    parts = CheckpointedParts(folder / "checkpoints", record, settings.resume, settings.checkpoint_every)
    with locked(folder), stop_signals():
        cut(settings, images, split, parts, folder, started, inputs)


def cut(
    settings: Settings,
    images: Images,
    split: Split,
    parts: CheckpointedParts,
    folder: Path,
    started: float,
    inputs: list[Path],
) -> None:
    """Cut edges in both ways, and write what came of it."""
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

    timed = seconds | {"all": time.perf_counter() - started}
    report = write_run(
        folder, "mnist/old.py", settings, images, split, network, results, rows, masks, edges, timed, device, inputs
    )
    parts.remove()
    pictures = draw_run(folder)
    print_table(report)
    times = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"greedy steps: {times}; {folder} holds the results and {len(pictures)} pictures")


def get_network(settings: Settings, split: Split, source: str, parts: CheckpointedParts) -> MaskedMLP:
    """The network of `settings.network` if it fits this task, else one trained as main.py trains it."""
    if settings.network is None:
        network = train_network(
            split.x["train"],
            split.y["train"],
            settings.width,
            len(split.groups),
            settings.train_steps,
            settings.train_batch_size,
            settings.train_lr,
            settings.seed,
            "network",
            **parts.open("network"),
        )
        network.set_means(split.x["train"])
        return network
    network, about = load_network(settings.network)
    made_with = about.get("settings", {})
    for name in ("seed", "target_class", "n_bad"):
        if made_with.get(name) != getattr(settings, name):
            raise UserError(
                f"{settings.network} was made with {name} {made_with.get(name)}, not {getattr(settings, name)}."
                f" Give the same --{name}, or leave --network out."
            )
    if network.first.in_features != split.x["train"].shape[1] or about.get("source") != source:
        raise UserError(
            f"{settings.network} was trained on other images ({about.get('source')}). Give those, or leave --network"
            f" out."
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
    with steps_left(done, steps, label, checkpoints, "cut") as (bar, signals):
        for step in bar if helps else ():
            now, scores = score_cuts(network, mask, objective)
            best = int(scores.argmin())
            # by more than rounding: once every bad example is at its cap, all candidates are equal but for that
            helps = bool(scores[best] < now - TOLERANCE * now.abs().clamp(min=1))
            if helps:
                mask[best] = 0
                order.append(best)
            if step % evaluate_every == 0 or step == steps or not helps:
                row = {"objective": float(min(now, scores[best])), "edges cut": len(order)}
                rows.append({"step": len(order), **row, **split.accuracies(lambda x: network(x, mask).argmax(1))})
                bar.set_postfix(loss=f"{row['objective']:.3f}", cut=len(order))
            if checkpoints is not None:
                values = {"order": order, "rows": rows, "helps": helps}
                checkpoints.after(step, lambda: {"mask": mask}, values, signals, step == steps or not helps)
            if not helps:
                print(f"{label}: no further cut helps after {len(order)}")
                break
    return mask, order, rows


if __name__ == "__main__":
    run_script(main, Settings)
