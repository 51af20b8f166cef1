"""The measures of experiments on tasks of prompts: on prompts, on ordinary texts, and the most probable next tokens."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuit_breaking.engine.transformer import EdgeMaskedTransformer
from circuit_breaking.evaluation.bootstrap import Sums
from circuit_breaking.evaluation.measure import sum_by_text
from circuit_breaking.models.causal_model import CausalModel
from circuit_breaking.runs.ioi_results import NextTokens
from circuit_breaking.tasks import PromptTask, TextTask
from circuit_breaking.tasks.base import EVALUATION_BATCH, prediction_losses
from circuit_breaking.tasks.prompts import PromptBatch, end_logits
from circuit_breaking.tasks.registry import IOI

MEASURES = {  # measures of indirect-object prompts: their names in reports, and in tables
    "logit_difference": "logit difference, IO - S",
    "accuracy": "IO is the first choice",
    "above_subject": "IO above S",
    "probability": "probability of IO",
    "loss": "loss on IO, nats",
}


ANSWERS = {  # the same of other tasks
    "logit_difference": "logit difference, right - wrong",
    "accuracy": "a right answer is the first choice",
    "above_subject": "right answers above wrong ones",
    "probability": "probability of right answers",
    "loss": "loss on right answers, nats",
}


def labels_of(task: str) -> dict[str, str]:
    """The measures of a task, by name, and how tables call them."""
    return MEASURES if task == IOI else ANSWERS


def prompt_measures(task: PromptTask, model: CausalModel, num_data: int) -> dict[str, Sums]:
    """Every measure of `MEASURES` on held-out prompts: the values of the prompts [N], and ones [N] as their counts."""
    return {key: (values.numpy(), np.ones(len(values))) for key, values in task.measure(model, num_data).items()}


@torch.no_grad()
def text_measures(task: TextTask, model: CausalModel, num_data: int) -> Sums:
    """The summed next-token loss of each held-out text [N], and its number of predictions [N]."""
    texts = task.test[:num_data]
    sums = [sum_by_text(prediction_losses(model, batch), batch.predicted) for batch in texts.batches(EVALUATION_BATCH)]
    return np.concatenate(sums), texts.predicted.sum(1).numpy().astype(float)


@torch.no_grad()
def next_tokens(
    model: EdgeMaskedTransformer, tokenizer: Any, prompt: PromptBatch, masks: dict[str, Tensor], count: int = 8
) -> NextTokens:
    """The most probable tokens after one prompt.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        prompt: a batch of one prompt.
        masks: mask weights [E], by the name under which the picture shows the model with them.
        count: number of tokens for each mask. The first right and the first wrong
            answer are added if they are not among them.
    """
    models = {}
    for name, weights in masks.items():
        logits, here = end_logits(model, prompt, weights)
        probabilities = logits.float().softmax(-1)[0]
        top = dict.fromkeys([*probabilities.topk(count).indices.tolist(), int(here.right[0, 0]), int(here.wrong[0, 0])])
        models[name] = [
            {"token": tokenizer.decode([token]), "probability": float(probabilities[token])} for token in top
        ]
    return NextTokens(
        prompt=tokenizer.decode(prompt.tokens[0, 1 : int(prompt.lengths[0])].tolist()),
        IO=tokenizer.decode(prompt.right[0, :1].tolist()),
        S=tokenizer.decode(prompt.wrong[0, :1].tolist()),
        models=models,
    )
