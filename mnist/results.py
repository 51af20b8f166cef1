"""The run folder of the MNIST scripts: all the files that they write."""

from pathlib import Path
from typing import Any

import torch
from mlp_model import MaskedMLP, save_network
from torch import Tensor

from circuit_breaking.mnist.digits import Images, Split
from circuit_breaking.mnist.report import network_accuracy
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
from circuit_breaking.runs.records import PROVENANCE, RunSettings
from circuit_breaking.runs.tensors import write_tensors


def record_of(settings: Any, images: Images, more_inputs: list[Path] | None = None) -> dict[str, Any]:
    """What every result of a run carries: settings, hashes of the files read, where the images come from."""
    inputs = images.files + (more_inputs or [])
    return {**provenance(settings, inputs), "source": images.source, "side": images.side}


def write_run(
    folder: Path,
    script: str,
    settings: Any,
    images: Images,
    split: Split,
    network: MaskedMLP,
    results: dict[str, Any],
    rows: list[dict[str, Any]],
    masks: dict[str, Tensor],
    edges: dict[str, list[str]],
    seconds: dict[str, float],
    device: torch.device,
    more_inputs: list[Path] | None = None,
) -> MnistReport:
    """Write settings, metrics, network, masks, edges and report; returns the report.

    Args:
        folder: the run's.
        script: path of the script in the repository.
        settings, images, split, network: what the run was made with.
        results: last accuracies of every variant, those of `original` among them.
        rows: metrics along training.
        masks: flat binary mask [n_edges] of each variant.
        edges: names of the edges cut, by variant.
        seconds: time of each part.
        device: where it ran.
        more_inputs: files read besides the images.
    """
    about = record_of(settings, images, more_inputs)
    run = {name: about[name] for name in PROVENANCE if name in about}
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
        seconds=seconds,
        device=str(device),
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
