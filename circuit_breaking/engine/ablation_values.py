"""Ablation values: what a cut edge carries. Zero, a node's mean output, its mean by position, or learned constants.
`counterfactual` has those that differ from text to text.

Shapes: B batch, T position, N = B * T tokens, P nodes that write, R readers, D width.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from circuit_breaking.errors import UserError
from circuit_breaking.graph import describe
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.runs.files import require_file
from circuit_breaking.runs.mask_record import AblationValueRecord, MeansRecord
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.runs.tensors import digest_of, is_real, read_tensors, write_tensors

HINT = "Make one with toxicity/compute_means.py, or leave means unset (zero ablation)."


class Values(Protocol):
    """What a pass asks of ablation values: the same for all texts (`AblationValues`), or `CounterfactualValues`."""

    def start(self, rows: Tensor, nodes: slice, batch: int, length: int) -> None:
        """Set the rows [k, N, D] of some nodes to their bias less their ablation value."""
        ...

    def sums(self, batch: int, length: int) -> "Sums | None":
        """The sums of values for the readers of one pass over a batch [B, T]; None if they are zero."""
        ...


class Sums(Protocol):
    """Sums of ablation values over the nodes that each reader reads, Σ_i μ_i. Readers ask in their order."""

    def write(self, out: Tensor, first_reader: int, plus: Tensor | None = None) -> None:
        """Set `out` [k, N * D] to the sums of k readers from `first_reader` on, `plus` [N * D] if it is given."""
        ...

    def add_early(self, early: Tensor, first_reader: int) -> None:
        """Add the sums to reads [k, B, T', D] at the first T' positions, at which no cut acts."""
        ...


@dataclass(frozen=True)
class AblationValues:
    """The ablation values μ of all nodes, in the form in which a pass uses them.

    Attributes:
        bias_minus_mean: what a node writes whatever it reads, less its ablation value: [P, 1, D], or [P, T, D] where
            values differ by position.
        mean_prefix_sums: entry p is the sum of the values of the first p nodes: [P + 1, 1 or T, D]; None for zero.
        n_read: how many nodes each reader reads, int64 [R].
    """

    bias_minus_mean: Tensor
    mean_prefix_sums: Tensor | None
    n_read: Tensor

    @classmethod
    def of(cls, biases: Tensor, means: Tensor | None, n_read: Tensor) -> Self:
        """Prepare ablation values for a pass.

        Args:
            biases: what a node writes whatever it reads, [P, 1, D].
            means: None (zero ablation), [P, D], or [T, P, D] by position.
            n_read: how many nodes each reader reads, int64 [R].
        """
        if means is None:
            return cls(biases, None, n_read)
        exact = means.detach().to(biases.device, torch.float64)
        by_node = exact[:, None] if means.dim() == 2 else exact.transpose(0, 1)  # [P, 1 or T, D]
        sums = F.pad(by_node.cumsum(0), (0, 0, 0, 0, 1, 0))
        return cls((biases - by_node).to(biases.dtype), sums.to(biases.dtype), n_read)

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        sums = self.mean_prefix_sums
        return type(self)(
            self.bias_minus_mean.to(device), None if sums is None else sums.to(device), self.n_read.to(device)
        )

    def start(self, rows: Tensor, nodes: slice, batch: int, length: int) -> None:
        """As `Values`."""
        fill_rows(rows, self.bias_minus_mean[nodes], batch, length)

    def sums(self, batch: int, length: int) -> "TabledSums | None":
        """As `Values`."""
        sums = self.mean_prefix_sums
        return None if sums is None else TabledSums(sums, self.n_read, batch, length)


class TabledSums:
    """The `Sums` of values that are the same for all texts: a table of all of them is small."""

    def __init__(self, prefix_sums: Tensor, n_read: Tensor, batch: int, length: int) -> None:
        self.prefix_sums, self.n_read, self.batch, self.length = prefix_sums, n_read, batch, length

    def write(self, out: Tensor, first_reader: int, plus: Tensor | None = None) -> None:
        """As `Sums`."""
        fill_rows(out, self._sums(out, first_reader), self.batch, self.length)
        if plus is not None:
            out += plus

    def add_early(self, early: Tensor, first_reader: int) -> None:
        """As `Sums`."""
        early += self._sums(early, first_reader)[:, None, : early.shape[2]]

    def _sums(self, out: Tensor, first_reader: int) -> Tensor:
        return self.prefix_sums[self.n_read[first_reader : first_reader + len(out)]]


def add_means(outputs: Tensor, means: Tensor) -> None:
    """Add means [P, D] or [T, P, D] to the outputs of all nodes [P, B, T, D]."""
    if means.dim() == 2:
        outputs += means[:, None, None]
    else:
        outputs += means[: outputs.shape[2]].transpose(0, 1)[:, None]


def fill_rows(rows: Tensor, constants: Tensor, batch: int, length: int) -> None:
    """Set `rows` [k, N, D] or [k, N * D] to `constants` [k, 1 or max T, D], which may differ by position."""
    rows = rows.view(rows.shape[0], batch, length, constants.shape[-1])
    rows.copy_(constants[:, None, :length])


def check_means(means: Tensor, nodes: int, width: int) -> None:
    """Raise a `UserError` for means that are neither [nodes, width] nor [T, nodes, width], or not finite."""
    if means.dim() not in (2, 3) or means.shape[-2:] != (nodes, width):
        raise UserError(
            f"means of shape {list(means.shape)} do not fit this model, which needs [{nodes}, {width}] or "
            f"[positions, {nodes}, {width}]. Compute them with this model."
        )
    if not means.isfinite().all():
        raise UserError("the means hold a value that is not finite. Compute them again.")


@torch.no_grad()
def compute_means(
    model: Any, texts: TokenBatch, by_position: bool = False, batch_size: int = 8, progress: bool = False
) -> Tensor:
    """Mean output of every node over texts, streamed: sums are kept in float64, one batch of outputs at a time.

    The mask in force applies, so call it with all edges whole for the means of the original model. Padding and
    positions before `model.ablate_from` are left out. By position, these, and positions that no text reaches, take the
    mean over all others.

    Returns:
        float32 [P, D], or [T, P, D] when `by_position`.

    Raises:
        UserError: no text reaches position `model.ablate_from`.
    """
    device, length = model.device, texts.tokens.shape[1]
    wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    sums, counts = None, torch.zeros(length, dtype=wide, device=device)
    rows = range(0, len(texts), batch_size)
    for start in progress_bar(rows, shown=progress, desc="means", unit="batch"):
        batch = texts[start : start + batch_size].to(device)
        outputs = model.node_outputs(batch.tokens)  # [P, B, T', D]
        real = batch.real.clone()
        real[:, : model.ablate_from] = False
        sums = torch.zeros(length, *outputs.shape[::3], dtype=wide, device=device) if sums is None else sums
        for position in range(outputs.shape[2]):  # T' small slices, so that float64 is never held for a whole batch
            here = outputs[:, real[:, position], position]
            sums[position] += here.to(wide).sum(1)
        counts[: outputs.shape[2]] += real.sum(0)
    if not counts.any():
        raise UserError(
            f"no text has a token at position {model.ablate_from} or later. Give longer texts or a lower ablate_from."
        )
    overall = sums.sum(0) / counts.sum()
    if not by_position:
        return overall.float()
    means = sums / counts[:, None, None].clamp(min=1)
    means[counts == 0] = overall
    return means.float()


def save_means(path: Path | str, model: Any, means: Tensor, record: MeansRecord | None = None) -> None:
    """Write means to a safetensors file. The name, graph and `ablate_from` of their model go into the record."""
    record = record or MeansRecord()
    record = replace(record, model=model.name, graph=describe(model.graph), ablate_from=model.ablate_from)
    write_tensors(path, {"means": means}, record.to_json())


def save_mean_outputs(
    path: Path | str,
    model: Any,
    texts: TokenBatch,
    provenance: dict[str, Any],
    made_from: str | None = None,
    write: bool = True,
) -> Tensor:
    """Compute the mean output of every node over texts [P, D], write it with the number of texts, and return it.

    Several processes that train together all need it, and only the main one writes it (`write`).
    """
    means = compute_means(model, texts)
    if write:
        record = MeansRecord(num_texts=len(texts), made_from=made_from, provenance=provenance)
        save_means(path, model, means, record)
    return means


def read_means(path: Path | str, hint: str = HINT) -> tuple[Tensor, MeansRecord]:
    """Means [P, D] or [T, P, D] and the record of a file. One that is missing, damaged or without means is a
    `UserError`."""
    tensors, header = read_tensors(path, hint)
    if "means" not in tensors:
        raise UserError(f"{path} holds no means. {hint}")
    if not is_real(tensors["means"]) or not tensors["means"].numel():
        raise UserError(f"{path} holds means that are not finite floating-point numbers. {hint}")
    return tensors["means"], MeansRecord.from_json(header, path, hint)


def load_means(path: Path | str, model: Any) -> MeansRecord:
    """Read means from a file into `model.means` and return the file's record.

    Query, key and value read from the same nodes as a whole head, so means serve a model with and without
    `split_qkv`.

    Raises:
        UserError: the file is missing, damaged, holds no means, or means of another model's shape, or they were made
            for another `ablate_from` than the model has.
    """
    means, record = read_means(path)
    check_made_for(record, path, model.ablate_from)
    try:
        model.means = means
    except UserError as error:
        raise UserError(f"{path} (made with {record.model}): {error}") from None
    return record


def check_made_for(record: MeansRecord, path: Path | str, ablate_from: int) -> None:
    """Raise a `UserError` if the means in a file were made for another first position than `ablate_from`."""
    if record.ablate_from != ablate_from:
        raise UserError(
            f"the means in {path} were made with ablate_from {record.ablate_from}, and are needed for {ablate_from}. "
            f"Compute them with ablate_from {ablate_from}, or set ablate_from to {record.ablate_from}."
        )


def value_in(path: Path | str | None, learned: bool = False, resample: bool = False) -> AblationValueRecord:
    """The record of the ablation value in a file of means, zero without a file.

    `learned` is for ablation constants, `resample` for outputs on counterfactual prompts, beside which the means are
    those of other texts.
    """
    if path is None:
        return AblationValueRecord("counterfactual" if resample else "zero")
    means = read_means(path)[0]
    kind = "counterfactual" if resample else "optimal" if learned else "mean" if means.dim() == 2 else "position"
    return AblationValueRecord(kind, str(path), digest_of(means))


def read_value(value: AblationValueRecord, mask: Path | str, ablate_from: int, resample: bool = False) -> Tensor | None:
    """The means that a mask's record names, None for zero.

    Args:
        value: what the record says.
        mask: the file of the mask, for error messages.
        ablate_from: first position at which the mask's cuts act.
        resample: whether the caller gives prompts their counterfactuals where the record says so; the means are then
            those of other texts.

    Raises:
        UserError: the file of the means is missing or damaged, or holds other means than those of the training, or
            means that were made for another `ablate_from`; or the ablation values are outputs on counterfactual
            prompts, and there is no `resample`.
    """
    if value.kind == "counterfactual" and not resample:
        raise UserError(
            f"the cut edges of {mask} carry their sources' outputs on counterfactual prompts, which only prompts that "
            "have a counterfactual can use. Measure it with ioi/evaluation.py, or give means in their place."
        )
    if value.kind == "zero" or (value.kind == "counterfactual" and value.path is None):
        return None
    if value.path is None:
        raise UserError(f"{mask} does not say which file holds the {value.kind} values of its cut edges. Give means.")
    means, record = read_means(require_file(value.path, "It was used in training and is needed here."))
    check_made_for(record, value.path, ablate_from)
    if value.sha256 is not None and digest_of(means) != value.sha256:
        raise UserError(
            f"{value.path} holds other means than those that {mask} was trained with. Restore that file, train the "
            "mask again, or give means that are meant to replace them."
        )
    return means
