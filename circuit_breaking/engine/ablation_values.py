"""What a cut edge carries: zero, a node's mean output, or its mean at each position (layer 2)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from circuit_breaking.errors import UserError
from circuit_breaking.graph import describe
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.runs.tensors import is_real, read_tensors, write_tensors

HINT = "Make one with toxicity/compute_means.py, or leave means unset (zero ablation)."
KINDS = ("zero", "mean", "position")


@torch.no_grad()
def compute_means(
    model: Any, texts: TokenBatch, by_position: bool = False, batch_size: int = 8, progress: bool = False
) -> Tensor:
    """Mean output of every node over texts, streamed: sums are kept in float64, one batch of outputs at a time.

    The mask in force applies, so call it with all edges whole for the means of the original model. Padding is left
    out. In the per-position kind, a position that no text reaches takes the mean over all positions.

    Returns:
        float32 [P, D], or [T, P, D] when `by_position`.
    """
    device, length = model.device, texts.tokens.shape[1]
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    sums, counts = None, torch.zeros(length, dtype=wide, device=device)
    rows = range(0, len(texts), batch_size)
    for start in tqdm(rows, desc="means", unit="batch", disable=None if progress else True):
        batch = texts[start : start + batch_size].to(device)
        outputs = model.node_outputs(batch.tokens)  # [P, B, T', D]
        real = batch.real
        sums = torch.zeros(length, *outputs.shape[::3], dtype=wide, device=device) if sums is None else sums
        for position in range(outputs.shape[2]):  # T' small slices, so that float64 is never held for a whole batch
            here = outputs[:, real[:, position], position]
            sums[position] += here.to(wide).sum(1)
        counts[: outputs.shape[2]] += real.sum(0)
    overall = sums.sum(0) / counts.sum()
    if not by_position:
        return overall.float()
    means = sums / counts[:, None, None].clamp(min=1)
    means[counts == 0] = overall
    return means.float()


def save_means(path: Path | str, model: Any, means: Tensor, about: dict[str, Any] | None = None) -> None:
    """Write means with the graph and name of their model to a safetensors file."""
    write_tensors(path, {"means": means}, {"model": model.name, "graph": describe(model.graph), **(about or {})})


def read_means(path: Path | str, hint: str = HINT) -> tuple[Tensor, dict[str, Any]]:
    """Means and the record of a file. A file that is missing, damaged or without means is a `UserError`."""
    tensors, about = read_tensors(path, hint)
    if "means" not in tensors:
        raise UserError(f"{path} holds no means. {hint}")
    if not is_real(tensors["means"]) or not tensors["means"].numel():
        raise UserError(f"{path} holds means that are not finite floating-point numbers. {hint}")
    return tensors["means"], about


def load_means(path: Path | str, model: Any) -> dict[str, Any]:
    """Read means from a file into `model.means` and return the file's record.

    Query, key and value read from the same nodes as a whole head, so means serve a model with and without
    `split_qkv`.

    Raises:
        UserError: the file is missing, damaged, holds no means, or means of another model's shape.
    """
    means, about = read_means(path)
    try:
        model.means = means
    except UserError as error:
        raise UserError(f"{path} (made with {about.get('model')}): {error}") from None
    return about
