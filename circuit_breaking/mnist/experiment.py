"""An experiment on a small network: what both scripts open for one, and the files that they write."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from circuit_breaking.mnist.digits import Images, Split, load_images, split_images
from circuit_breaking.mnist.network import MaskableNetwork, save_network
from circuit_breaking.mnist.report import describe, network_accuracy
from circuit_breaking.mnist.settings import ExperimentSettings
from circuit_breaking.runs.devices import cpu_threads
from circuit_breaking.runs.files import write_jsonl
from circuit_breaking.runs.mnist_results import (
    EDGES_BY_MASK,
    MASKS,
    MNIST_REPORT,
    EdgesByMask,
    MnistMasks,
    MnistReport,
    NetworkRecord,
)
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.records import RunSettings
from circuit_breaking.runs.run_folder import CheckpointedParts, locked
from circuit_breaking.runs.signals import stop_signals
from circuit_breaking.runs.tensors import write_tensors


@dataclass
class Experiment:
    """An open experiment.

    Attributes:
        folder: the run folder.
        images: the images that were read.
        split: the same images, divided into sets for this task.
        parts: checkpoints of the trainings.
        provenance: settings, versions and hashes of the files that were read.
        started: when the experiment was opened, by `time.perf_counter`.
    """

    folder: Path
    images: Images
    split: Split
    parts: CheckpointedParts
    provenance: dict[str, Any]
    started: float

    def seconds(self) -> float:
        """Seconds since the experiment was opened."""
        return time.perf_counter() - self.started


@contextmanager
def open_experiment(settings: ExperimentSettings, inputs: Sequence[Path] = ()) -> Iterator[Experiment]:
    """Load and describe the images, and lock the run folder while the block lasts.

    Args:
        settings: the settings of the script.
        inputs: files that the script reads in addition to the images.
    """
    started = time.perf_counter()
    settings.check()
    with cpu_threads(settings.threads):
        folder = settings.out / settings.run
        images = load_images(settings.data, settings.source, settings.device, settings.transpose)
        split = split_images(images, settings.target_class, settings.n_bad, settings.seed)
        print(describe(images, split))
        run = provenance(settings, [*images.files, *inputs])
        key = {**run, "source": images.source, "side": images.side}
        parts = CheckpointedParts(folder / "checkpoints", key, settings.resume, settings.checkpoint_every)
        with locked(folder), stop_signals():
            yield Experiment(folder, images, split, parts, run, started)


def write_run(
    experiment: Experiment,
    script: str,
    settings: ExperimentSettings,
    network: MaskableNetwork,
    results: dict[str, Any],
    rows: list[dict[str, Any]],
    masks: dict[str, Tensor],
    edges: dict[str, list[str]],
    seconds: dict[str, float],
) -> MnistReport:
    """Write settings, metrics, network, masks, edges and report, and return the report.

    Args:
        experiment: the open experiment.
        script: path of the script in the repository.
        settings: the settings of the script.
        network: the network whose edges were cut.
        results: final accuracies of every variant; the one without cuts is `original`.
        rows: metrics along training.
        masks: flat binary mask [n_edges] of each variant.
        edges: names of the edges cut, by variant.
        seconds: time of each training.
    """
    folder, images, split, run = experiment.folder, experiment.images, experiment.split, experiment.provenance
    report = MnistReport(
        script=script,
        source=images.source,
        side=images.side,
        groups=split.groups,
        target_class=split.target_class,
        target_group=split.target_group,
        mates=split.mates,
        edges={"first layer": network.n_first, "last layer": network.n_edges - network.n_first},
        images={name: len(labels) for name, (_, labels) in split.sets.items()},
        test_accuracy=network_accuracy(results["original"], split),
        results=results,
        seconds={**seconds, "all": experiment.seconds()},
        device=str(split.train_is_target.device),
        provenance=run,
    )
    mean_target = split.x["train"][split.train_is_target].mean(0)
    RunSettings(script=script, provenance=run).write(folder / "settings.json")
    write_jsonl(folder / "metrics.jsonl", rows)
    made = NetworkRecord(
        source=images.source, side=images.side, seed=settings.seed, target_class=settings.target_class,
        n_bad=settings.n_bad, provenance=run,
    )  # fmt: skip
    save_network(folder / "network.safetensors", network, made)
    write_tensors(folder / MASKS, masks | {"mean target image": mean_target}, MnistMasks(provenance=run).to_json())
    EdgesByMask(masks=edges).write(folder / EDGES_BY_MASK)
    report.write(folder / MNIST_REPORT)
    return report
