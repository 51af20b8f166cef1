"""Break a small network's grouping of 3s by cutting edges learnt from 30 examples.

Trains an MLP that sorts the ten digits into five pairs, and one that never saw a 3, for reference. Then learns a mask
over the first network's edges so that 3s are no longer classified as their pair while all else is, once with 3s left
out of the ordinary images of the keep term and once with them left in, and fine-tunes on the same objectives.

Reads the four IDX files of --data (else the Hugging Face hub, else scikit-learn's small digits; it says which).
Writes data/mnist/<run>/: settings.json, metrics.jsonl (accuracies along training), network.safetensors,
mask.safetensors, edges.json, report.json and pictures (*.png), which mnist/redraw.py draws again. While it
runs, checkpoints/, from which a run that was interrupted goes on when it is started again.
Takes about a minute on 2 CPU cores with MNIST, seconds with the small digits.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from breaking import BreakingSettings, finetune, learn_mask, train_network
from mlp_model import MaskedMLP
from results import record_of, write_run

from circuit_breaking.figures.mnist import draw_run
from circuit_breaking.mnist.digits import DEFAULT_FOLDER, Images, Source, Split, load_images, split_images
from circuit_breaking.mnist.report import check_settings, describe, print_table
from circuit_breaking.runs.cli import run_script
from circuit_breaking.runs.devices import cpu_threads, pick_device
from circuit_breaking.runs.run_folder import CheckpointedParts, locked
from circuit_breaking.runs.signals import stop_signals


@dataclass
class Settings:
    run: str = "main"  # name of the results' folder
    out: Path = DEFAULT_FOLDER  # the results' folder lies in this one
    data: Path = DEFAULT_FOLDER  # folder of the four IDX files, .gz or not
    source: Source = "auto"  # auto: IDX files if there are any, else the hub, else scikit-learn's small digits
    target_class: int = 3  # class whose grouping is the bad behaviour
    n_bad: int = 30  # examples of it to learn from, taken from the test images
    seed: int = 0  # pairs of classes, initial weights, batches, choice of the examples
    device: str = "auto"  # auto, cpu, cuda, mps
    threads: int = 1  # of the CPU; more gain little here and lose much where cores are shared; 0: torch's choice

    resume: bool = True  # go on from the run folder's checkpoints, if they are of the same settings, data and code
    checkpoint_every: int = 200  # steps between checkpoints; 0: only at ends and when told to stop (SIGTERM, SIGUSR1)

    width: int = 50  # hidden units
    train_steps: int = 1800  # of the networks' training
    train_batch_size: int = 512  # images a step of it
    train_lr: float = 8e-3  # highest learning rate of its one cycle

    steps: int = 400  # of mask learning, and of fine-tuning
    batch_size: int = 512  # ordinary images a step
    lr: float = 0.05  # of the mask's weights, which start at 1
    ratio: float = 1.0  # weight of the bad examples' loss against the ordinary images'
    ratio_kept: float = 3.0  # the same where the ordinary images include the target class and pull against it
    cap: float = 2.0  # nats of a bad example's loss that count; breaking it further gains nothing
    cap_kept: float = 5.0  # the same where the ordinary images include the target class
    shift: int = 1  # pixels, at most, by which the bad examples are moved at random each step; 0: not at all
    sparsity: float = 3e-4  # what a cut edge costs, about
    ramp_steps: int = 200  # steps over which the sparsity term grows to its full weight
    round_every: int = 100  # steps between roundings of the mask to 0 and 1 after the ramp; 0: only at the end
    max_edges: int = 1000  # the saved mask never cuts more
    finetune_lr: float = 5e-4  # learning rate of fine-tuning
    evaluate_every: int = 10  # steps between the points of the figure


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
    record = record_of(settings, images)
    parts = CheckpointedParts(folder / "checkpoints", record, settings.resume, settings.checkpoint_every)
    with locked(folder), stop_signals():
        learn(settings, images, split, parts, folder, started)


def learn(
    settings: Settings, images: Images, split: Split, parts: CheckpointedParts, folder: Path, started: float
) -> None:
    """Train, learn, fine-tune, and write what came of it."""

    def train(rows: slice | torch.Tensor, label: str) -> MaskedMLP:
        return train_network(
            split.x["train"][rows],
            split.y["train"][rows],
            settings.width,
            len(split.groups),
            settings.train_steps,
            settings.train_batch_size,
            settings.train_lr,
            settings.seed,
            label,
            **parts.open(label),
        )

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

    edges = {name: list(network.cut_edges(mask, images.side)) for name, mask in masks.items()}
    seconds["all"] = time.perf_counter() - started
    report = write_run(
        folder, "mnist/main.py", settings, images, split, network, results, rows, masks, edges, seconds,
        split.train_is_target.device,
    )  # fmt: skip
    parts.remove()
    pictures = draw_run(folder)
    print_table(report)
    print(f"{time.perf_counter() - started:.0f} s; {folder} holds the results and {len(pictures)} pictures")


if __name__ == "__main__":
    run_script(main, Settings)
