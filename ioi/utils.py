"""What the indirect-object scripts share: where prompts, means and runs are, and how a model is measured."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuit_breaking.cli import UserError
from circuit_breaking.evaluation import Sums
from circuit_breaking.files import DATA, read_json, read_tensors
from circuit_breaking.graph import EdgeGraph
from circuit_breaking.losses import logit_difference
from circuit_breaking.masks import describe
from circuit_breaking.tasks import IOITask, TextTask
from circuit_breaking.tasks.base import EVALUATION_BATCH, prediction_losses
from circuit_breaking.tasks.ioi import end_logits
from circuit_breaking.tasks.owt import SHIPPED

FOLDER = DATA / "ioi"  # run folders, prompts and means
SETS = {"one": 1, "two": 2, "all": None}  # sets of prompts, and how many templates each is made from
MEASURES = {  # of a model on prompts, as reports name them and as a table shows them
    "logit_difference": "logit difference, IO - S",
    "accuracy": "IO is the first choice",
    "above_subject": "IO above S",
    "probability": "probability of IO",
    "loss": "loss on IO, nats",
}


def prompts_of(model: str, name: str, part: str, abc: bool = False) -> Path:
    """The file of a set ("one", "two", "all") and part ("train", "test") of a model's prompts."""
    return FOLDER / "prompts" / Path(model).name / f"{name}{'_abc' * abc}_{part}.jsonl"


def default_data(model: str, prompts: str) -> dict[str, Any]:
    """Data settings for a model and a set of prompts, where settings leave them None."""
    return {
        "train": prompts_of(model, prompts, "train"),
        "test": prompts_of(model, prompts, "test"),
        "ordinary": SHIPPED if model == SHIPPED else "NeelNanda/pile-10k",
    }


def objective(ioi: IOITask, batch: Any, model: Any) -> Any:
    """The mean logit difference on a batch of prompts, as a function of the mask."""

    def difference(mask: Tensor) -> Tensor:
        logits, here = end_logits(model, batch, mask)
        return logit_difference(logits, here.io, here.subject).mean()

    return difference


def prompt_measures(task: IOITask, model: Any, num_data: int) -> dict[str, Sums]:
    """Every measure of `MEASURES` on held-out prompts: value and count of each prompt."""
    return {key: (values.numpy(), np.ones(len(values))) for key, values in task.measure(model, num_data).items()}


@torch.no_grad()
def text_measures(task: TextTask, model: Any, num_data: int) -> Sums:
    """Summed next-token loss and number of predictions of each held-out text."""
    texts, sums = task.test[:num_data], []
    for batch in texts.batches(EVALUATION_BATCH):
        of = batch.predicted.nonzero()[:, 0]
        losses = prediction_losses(model, batch).cpu().double()
        sums.append(torch.zeros(len(batch), dtype=torch.float64).index_add_(0, of, losses))
    return torch.cat(sums).numpy(), texts.predicted.sum(1).numpy().astype(float)
