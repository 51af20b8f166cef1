"""An experiment on a task of prompts: what the scripts load for one, and the files that a run with a mask writes."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuit_breaking.engine.ablation_values import load_means, save_means, value_in
from circuit_breaking.engine.load import load_model
from circuit_breaking.engine.mask import save_mask
from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.evaluation.edge_importance import graph_of_mask
from circuit_breaking.ioi.measures import MEASURES, next_tokens
from circuit_breaking.ioi.settings import IOIMaskSettings, default_data
from circuit_breaking.models.load import files_of, load_tokenizer
from circuit_breaking.runs.config import check_counts, resolve_defaults
from circuit_breaking.runs.mask_record import MASK, MEANS, MaskRecord, MeansRecord, data_of, write_edges
from circuit_breaking.runs.provenance import provenance
from circuit_breaking.runs.records import RunSettings
from circuit_breaking.tasks import IOITask, OWTTask, PromptTask, prompt_task
from circuit_breaking.tasks.prompts import Objective, PromptBatch, answer_difference, end_logits
from circuit_breaking.tasks.registry import IOI
from circuit_breaking.training.input_attribution import PairedMetric
from circuit_breaking.training.mask_gradient import MaskFunction


@dataclass
class Experiment:
    """A model with its tokenizer, its two tasks, and the provenance of the run.

    Attributes:
        settings: the settings of the script, with all defaults filled in.
        model: the model; its mask is learned and measured.
        tokenizer: the model's tokenizer.
        task: the task whose behaviour is broken.
        ordinary: the task whose behaviour is kept.
        provenance: settings, versions and hashes of the files that were read.
    """

    settings: IOIMaskSettings
    model: EdgeMaskedTransformer
    tokenizer: Any
    task: PromptTask
    ordinary: OWTTask
    provenance: dict[str, Any]

    def summary(self) -> dict[str, float]:
        """Measure the model with its present mask: the means of `MEASURES` on held-out prompts, and `ordinary_loss`."""
        measured = self.task.measure(self.model, self.settings.num_test)
        found = {key: float(measured[key].mean()) for key in MEASURES}
        return found | {"ordinary_loss": self.ordinary.get_test_loss(self.model, self.settings.num_test)}

    def metrics(self, num_data: int, batch_size: int) -> list[MaskFunction]:
        """The logit difference on batches of the first training prompts, as functions of the mask.

        If the setting `micro_batch` is smaller than `batch_size`, the largest divisor of `batch_size` up to it is used.
        All batches then have equal weight in a mean, as with `batch_size`.
        """
        most = min(batch_size, self.settings.micro_batch or batch_size)
        size = next(size for size in range(most, 0, -1) if batch_size % size == 0)
        return [difference_on(self.model, batch) for batch in self.task.train[:num_data].batches(size)]


def open_experiment(settings: IOIMaskSettings) -> Experiment:
    """Load the model, the tasks and the ablation values that the settings name.

    Raises:
        UserError: a file is missing, or does not fit the model.
    """
    check_counts(settings, "num_test", "batch_size")
    settings = resolve_defaults(settings, default_data(settings.model, settings.prompts, settings.task))
    torch.manual_seed(settings.seed)
    tokenizer = load_tokenizer(settings.model)
    task = open_task(settings, tokenizer, settings.objective)
    ordinary = OWTTask(
        tokenizer, settings.ordinary, settings.length, seed=settings.seed, text_column=settings.text_column
    )
    for each in (task, ordinary):
        each.evaluation_batch = settings.micro_batch or each.evaluation_batch
    model = load_model(
        settings.model,
        settings.split_qkv,
        settings.device,
        settings.dtype,
        settings.gradient_checkpointing,
        offload=settings.offload,
        device_map=settings.device_map or None,
    )
    model.ablate_from = settings.ablate_from
    if settings.means is not None:
        load_means(settings.means, model)
    if settings.resample:
        model.resample = True
        for prompts in (task.train, task.test):
            prompts.counterfactuals()  # refuses prompts without
    inputs = [settings.train, settings.test, settings.means, Path(settings.ordinary), *files_of(settings.model)]
    run = provenance(settings, [path for path in inputs if path and path.is_file()])
    return Experiment(settings, model, tokenizer, task, ordinary, run)


def open_task(settings: Any, tokenizer: Any, objective: Objective = "cross_entropy") -> PromptTask:
    """The task that settings name, with all defaults filled in; held-out prompts do not depend on `seed`.

    Args:
        settings: a dataclass with `task`, `train` and `test`, and perhaps `seed`.
        tokenizer: the model's tokenizer.
        objective: as for `PromptTask`.
    """
    seed = getattr(settings, "seed", 0)
    if settings.task == IOI:
        return IOITask(tokenizer, settings.train, settings.test, seed=seed, objective=objective)
    return prompt_task(settings.task, tokenizer, seed=seed, objective=objective)


def difference_on(model: EdgeMaskedTransformer, batch: PromptBatch) -> MaskFunction:
    """The mean logit difference on a batch of prompts, as a function of the mask."""

    def metric(mask: Tensor) -> Tensor:
        logits, here = end_logits(model, batch, mask)
        return answer_difference(logits, here).mean()

    return metric


def paired_difference(model: EdgeMaskedTransformer, batch: PromptBatch) -> PairedMetric:
    """`difference_on` with the prompts and their counterfactuals, for attribution over inputs or activations.

    Raises a `UserError` if a prompt has no counterfactual.
    """
    here = batch.to(model.device)
    return PairedMetric(difference_on(model, here), here.tokens, here.counterfactuals().tokens)


def write_run(folder: Path, script: str, experiment: Experiment, results: dict[str, Any], kept: bool = False) -> None:
    """Write the settings of a run, its mask and edges, and the files that its pictures are drawn from.

    The edges written are those that the mask cuts or, with `kept`, those that it keeps. The importance of an edge is
    its share of the change in logit difference (integrated mask gradients) between the mask and the whole model or,
    with `kept`, between the mask and the model with all edges cut.

    Args:
        folder: the run folder.
        script: path of the script in the repository.
        experiment: what was run; its model holds the mask.
        results: measurements for the mask's record.
        kept: whether the mask is a sufficient circuit.
    """
    model = experiment.model
    graph = graph_of_mask(model, experiment.metrics(40, 20), "share of the logit difference", kept)
    settings, run = experiment.settings, experiment.provenance
    RunSettings(script=script, provenance=run).write(folder / "settings.json")
    learned = bool(settings.constants_lr) and not kept and model.means is not None
    if learned:
        save_means(folder / MEANS, model, model.means, MeansRecord(provenance=run))
    record = MaskRecord(
        method="pruning" if kept else settings.method, budget=None if kept else settings.max_edges, seed=settings.seed,
        ablation_value=value_in(folder / MEANS if learned else settings.means, learned, settings.resample),
        results=results,
        data=data_of(asdict(settings)), provenance=run,
    )  # fmt: skip
    save_mask(folder / MASK, model, record)
    write_edges(folder, list(graph.edges), kept)
    graph.write(folder / "graph.json")
    mask = model.mask.weights.detach().clone()
    masks = {"original": torch.ones_like(mask), "edges kept alone" if kept else "edges cut": mask}
    next_tokens(model, experiment.tokenizer, experiment.task.test[:1], masks).write(folder / "next_tokens.json")
