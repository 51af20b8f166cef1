"""Break a small network's grouping of 3s by cutting edges, learned from 30 examples.

Trains a network that sorts the ten digits into five pairs and, for reference, one that never sees a 3. Then learns a
mask over the first network's edges so that it no longer puts 3s into their pair but still sorts everything else: once
without 3s among the ordinary images of the keep term, once with them. Fine-tunes on the same objectives to compare.

Reads   the four IDX files in --data, else MNIST from the Hugging Face hub, else scikit-learn's small digits.
Writes  data/mnist/<run>/: settings.json; metrics.jsonl, accuracies along training; network.safetensors;
        masks.safetensors; edges_by_mask.json; mnist_report.json; pictures (*.png), which mnist/redraw.py draws again.
        During the run also checkpoints/, from which the same command continues an interrupted run.
Time    about a minute on two CPU cores with MNIST, seconds with the small digits.
"""

from dataclasses import asdict, dataclass, replace
from typing import ClassVar

from circuit_breaking.mnist.settings import ExperimentSettings
from circuit_breaking.runs.cli import read_settings, run_script


@dataclass
class Settings(ExperimentSettings):
    MOST_USED: ClassVar = (
        "run", "source", "data", "target_class", "n_bad", "max_edges", "steps", "lr", "sparsity", "ratio", "seed",
        "device",
    )  # fmt: skip

    run: str = "main"
    steps: int = 400  # steps of mask learning, and of fine-tuning
    batch_size: int = 512  # ordinary images per step
    lr: float = 0.05  # learning rate of the mask's weights, which start at 1
    ratio: float = 1.0  # weight of the bad examples' loss relative to that of the ordinary images
    ratio_kept: float = 3.0  # ratio of the mask whose ordinary images include the target class, which opposes it
    cap: float = 2.0  # cap on the loss of one bad example, nats
    cap_kept: float = 5.0  # cap of the mask whose ordinary images include the target class
    shift: int = 1  # most pixels by which the bad examples are moved at random in each step; 0: they are not moved
    sparsity: float = 3e-4  # approximate penalty for each cut edge, nats
    ramp_steps: int = 200  # steps over which the penalty grows to its full weight
    round_every: int = 100  # steps between roundings of the mask to 0 and 1 after the ramp; 0: only at the end
    max_edges: int = 1000  # most edges that the saved mask cuts
    finetune_lr: float = 5e-4  # learning rate of fine-tuning
    evaluate_every: int = 10  # steps between the points of the figure


if __name__ == "__main__":
    settings = read_settings(Settings)

import torch
from mlp_model import MaskedMLP

from circuit_breaking.figures.browser.page import end_with_page
from circuit_breaking.figures.mnist import draw_run
from circuit_breaking.mnist.breaking import BreakingSettings, finetune, learn_mask, train_network
from circuit_breaking.mnist.experiment import Experiment, open_experiment, write_run
from circuit_breaking.mnist.report import show


def main(settings: Settings) -> None:
    with open_experiment(settings) as experiment:
        learn(settings, experiment)


def learn(settings: Settings, experiment: Experiment) -> None:
    """Train the networks, learn the masks, fine-tune, and write the results."""
    split, parts = experiment.split, experiment.parts

    def train(rows: slice | torch.Tensor, label: str) -> MaskedMLP:
        x, y = split.x["train"][rows], split.y["train"][rows]
        return train_network(
            lambda: MaskedMLP(x.shape[1], settings.width, len(split.groups)), x, y, settings.train_steps,
            settings.train_batch_size, settings.train_lr, settings.seed, label, **parts.open(label),
        )  # fmt: skip

    network = train(slice(None), "network")
    network.set_means(split.x["train"])
    reference = train(~split.train_is_target, f"network without {settings.target_class}s")
    with torch.no_grad():
        split.reference = {part: reference(x).argmax(1) for part, x in split.x.items()}

    learning = BreakingSettings(
        **{name: value for name, value in asdict(settings).items() if name in BreakingSettings.__dataclass_fields__}
    )
    learning_kept = replace(learning, ratio=settings.ratio_kept, cap=settings.cap_kept)
    kept = f"{settings.target_class}s kept"
    rows, masks, seconds = [], {}, {}
    for suffix, with_target, how in (("", False, learning), (f", {kept}", True, learning_kept)):
        name, tuned = f"mask{suffix}", f"fine-tuning{suffix}"
        part = parts.open(name)
        masks[name], metrics = learn_mask(network, split, with_target, how, settings.seed, name, **part)
        rows += [{"variant": name, **row} for row in metrics]
        seconds[name] = part["checkpoints"].seconds()
        part = parts.open(tuned)
        _, metrics = finetune(network, split, with_target, how, settings.finetune_lr, settings.seed, tuned, **part)
        rows += [{"variant": tuned, **row} for row in metrics]
        seconds[tuned] = part["checkpoints"].seconds()

    results = {"original": {"edges cut": 0, **split.accuracies(lambda x: network(x).argmax(1))}}
    results |= {row["variant"]: {key: row[key] for key in results["original"]} for row in rows}  # last row of each
    results["never saw the target"] = {"edges cut": 0, **split.accuracies(lambda x: reference(x).argmax(1))}
    for name, mask in masks.items():
        results[name]["first-layer edges cut"] = int((mask[: network.n_first] == 0).sum())

    edges = {name: list(network.cut_edges(mask, experiment.images.side)) for name, mask in masks.items()}
    report = write_run(experiment, "mnist/main.py", settings, network, results, rows, masks, edges, seconds)
    parts.remove()
    pictures = draw_run(experiment.folder)
    end_with_page(experiment.folder)
    show(report)
    print(f"{experiment.seconds():.0f} s; {experiment.folder} holds the results and {len(pictures)} pictures")


if __name__ == "__main__":
    run_script(main, settings)
