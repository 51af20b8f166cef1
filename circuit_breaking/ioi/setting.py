"""What the indirect-object scripts share: where prompts, means and runs are, and how a model is measured."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuit_breaking.engine.ablation_values import load_means, save_means, value_in
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import save_mask
from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.bootstrap import Sums
from circuit_breaking.evaluation.measure import sum_by_text
from circuit_breaking.figures.edge_graph import draw_graph
from circuit_breaking.figures.heat_map import draw_heat_map
from circuit_breaking.figures.indirect_objects import draw_next_tokens
from circuit_breaking.figures.training import draw_training
from circuit_breaking.ioi.settings import default_data
from circuit_breaking.models.load import files_of, load_tokenizer
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.ioi_results import GraphRecord, NextTokens
from circuit_breaking.runs.mask_record import MASK, MEANS, MaskRecord, MeansRecord, data_of, write_edges
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.records import RunSettings
from circuit_breaking.tasks import IOITask, OWTTask, TextTask
from circuit_breaking.tasks.base import EVALUATION_BATCH, prediction_losses
from circuit_breaking.tasks.ioi import end_logits
from circuit_breaking.tasks.losses import logit_difference
from circuit_breaking.training.attribution import eap_ig
from circuit_breaking.training.mask_gradient import MaskFunction

MEASURES = {  # of a model on prompts, as reports name them and as a table shows them
    "logit_difference": "logit difference, IO - S",
    "accuracy": "IO is the first choice",
    "above_subject": "IO above S",
    "probability": "probability of IO",
    "loss": "loss on IO, nats",
}


@dataclass
class Setting:
    """A model with its tokenizer, its two tasks, and the provenance of the run."""

    settings: Any
    model: Any
    tokenizer: Any
    ioi: IOITask
    ordinary: OWTTask
    provenance: dict[str, Any]

    def summary(self) -> dict[str, float]:
        """Means over held-out prompts and texts of the mask in force: the measures, and `ordinary_loss`."""
        measured = self.ioi.measure(self.model, self.settings.num_test)
        found = {key: float(measured[key].mean()) for key in MEASURES}
        return found | {"ordinary_loss": self.ordinary.get_test_loss(self.model, self.settings.num_test)}

    def metrics(self, num_data: int, batch_size: int) -> list[MaskFunction]:
        """The logit difference on batches of the first training prompts, as functions of the mask.

        Where `micro_batch` asks for smaller ones, they divide `batch_size`, so that their mean stays that of the whole.
        """
        most = min(batch_size, self.settings.micro_batch or batch_size)
        size = next(size for size in range(most, 0, -1) if batch_size % size == 0)
        return [difference_on(self.model, batch) for batch in self.ioi.train[:num_data].batches(size)]


def open_setting(settings: Any) -> Setting:
    """Load what settings name: `model`, `prompts` or `train` and `test`, `ordinary`, `means`, and so on.

    Raises:
        UserError: something is missing or does not fit.
    """
    check_counts(settings, "num_test", "batch_size")
    settings = resolve_defaults(settings, default_data(settings.model, settings.prompts))
    torch.manual_seed(settings.seed)
    tokenizer = load_tokenizer(settings.model)
    ioi = IOITask(tokenizer, settings.train, settings.test, seed=settings.seed, objective=settings.objective)
    ordinary = OWTTask(
        tokenizer, settings.ordinary, settings.length, seed=settings.seed, text_column=settings.text_column
    )
    for task in (ioi, ordinary):
        task.evaluation_batch = settings.micro_batch or task.evaluation_batch
    model = load_model(
        settings.model, settings.split_qkv, settings.device, settings.dtype, settings.gradient_checkpointing
    )
    if settings.means is not None:
        load_means(settings.means, model)
    inputs = [settings.train, settings.test, settings.means, Path(settings.ordinary), *files_of(settings.model)]
    run = provenance(settings, [path for path in inputs if path and path.is_file()])
    return Setting(settings, model, tokenizer, ioi, ordinary, run)


def difference_on(model: Any, batch: Any) -> MaskFunction:
    """The mean logit difference on a batch of prompts, as a function of the mask."""

    def metric(mask: Tensor) -> Tensor:
        logits, here = end_logits(model, batch, mask)
        return logit_difference(logits, here.io, here.subject).mean()

    return metric


def write_run(folder: Path, script: str, setting: Setting, results: dict[str, Any], kept: bool = False) -> None:
    """Write the settings of a run, its mask and edges, and the files that its pictures are drawn from.

    With `kept` the edges of interest are those that the mask keeps, not those that it cuts. An edge's importance is its
    share of the logit difference that cutting all of them takes away or, with `kept`, that keeping only them restores.

    Args:
        folder: the run folder.
        script: path of the script in the repository.
        setting: what it was run on; the mask lies in the model.
        results: measurements for the mask's record.
        kept: whether the mask is a sufficient circuit.
    """
    model = setting.model
    mask, ones = model.mask.weights.detach().clone(), torch.ones_like(model.mask.weights)
    metrics = setting.metrics(40, 20)
    line = {"start": torch.zeros_like(mask), "end": mask} if kept else {"start": mask, "end": ones}
    scores = eap_ig(metrics, model, steps=5, **line).tolist()
    chosen = (mask >= 0.5) == kept
    edges = {model.graph.edges[index]: scores[index] for index in chosen.nonzero()[:, 0].tolist()}
    settings, run = setting.settings, setting.provenance
    RunSettings(script=script, provenance=run).write(folder / "settings.json")
    learned = bool(settings.constants_lr) and not kept and model.means is not None
    if learned:
        save_means(folder / MEANS, model, model.means, MeansRecord(provenance=run))
    record = MaskRecord(
        method="pruning" if kept else settings.method, budget=None if kept else settings.max_edges, seed=settings.seed,
        ablation_value=value_in(folder / MEANS if learned else settings.means, learned), results=results,
        data=data_of(asdict(settings)), provenance=run,
    )  # fmt: skip
    save_mask(folder / MASK, model, record)
    write_edges(folder, list(edges), kept)
    GraphRecord.of(model.graph, edges, "kept" if kept else "cut").write(folder / "graph.json")
    tokens = next_tokens(setting, mask, "edges kept alone" if kept else "edges cut")
    tokens.write(folder / "next_tokens.json")


@torch.no_grad()
def next_tokens(setting: Setting, mask: Tensor, label: str, count: int = 8) -> NextTokens:
    """The likeliest tokens after the first held-out prompt, with all edges and with a mask."""
    batch = setting.ioi.test[:1]
    models = {}
    for name, weights in {"original": torch.ones_like(mask), label: mask}.items():
        logits, here = end_logits(setting.model, batch, weights)
        probabilities = logits.float().softmax(-1)[0]
        # the two names are shown whatever their rank
        top = dict.fromkeys([*probabilities.topk(count).indices.tolist(), int(here.io), int(here.subject)])
        models[name] = [
            {"token": setting.tokenizer.decode([token]), "probability": float(probabilities[token])} for token in top
        ]
    return NextTokens(
        prompt=setting.tokenizer.decode(batch.tokens[0, 1 : int(batch.lengths[0])].tolist()),
        IO=setting.tokenizer.decode(batch.io.tolist()),
        S=setting.tokenizer.decode(batch.subject.tolist()),
        models=models,
    )


def draw_run(folder: Path) -> None:
    """Every picture of a run folder, from its files alone."""
    if (folder / "metrics.jsonl").is_file():
        draw_training(folder, broken="indirect object (to rise)")
    draw_graph(folder)
    draw_heat_map(folder)
    draw_next_tokens(folder)


def prompt_measures(task: IOITask, model: Any, num_data: int) -> dict[str, Sums]:
    """Every measure of `MEASURES` on held-out prompts: value and count of each prompt."""
    return {key: (values.numpy(), np.ones(len(values))) for key, values in task.measure(model, num_data).items()}


@torch.no_grad()
def text_measures(task: TextTask, model: Any, num_data: int) -> Sums:
    """Summed next-token loss and number of predictions of each held-out text."""
    texts = task.test[:num_data]
    sums = [sum_by_text(prediction_losses(model, batch), batch.predicted) for batch in texts.batches(EVALUATION_BATCH)]
    return np.concatenate(sums), texts.predicted.sum(1).numpy().astype(float)


def check_layout(rows: list[dict[str, Any]], path: Path) -> None:
    """Raise a `UserError` unless the names and the end of all prompts of a file are at the same positions."""
    layouts: dict[tuple[int, ...], Any] = {}
    for number, row in enumerate(rows, 1):
        positions = row.get("positions")
        if not isinstance(positions, dict) or set(positions) != {"IO", "S1", "S2", "end"}:
            raise UserError(f"{path}, row {number}: there are no 'positions'. Make it with ioi/make_ioi_datasets.py.")
        pair = sorted((positions["IO"], positions["S1"]))  # which of the two comes first is the order's to say
        layouts.setdefault((*pair, positions["S2"], positions["end"]), row.get("template"))
    if len(layouts) > 1:
        (one, first), (two, second) = list(layouts.items())[:2]
        raise UserError(
            f"{path} has names at other positions in template {first} ({list(one)}) than in template {second} "
            f"({list(two)}), so that a mean per position would mix them. Use the set one or two, or the kind mean."
        )
