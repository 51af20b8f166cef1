"""Relearning: whether a removed behaviour comes back after fine-tuning on a few examples, or with examples as context.

Cut edges stay cut while the weights are trained, and gradients flow through the ablated model. All models are trained
in the same way.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from circuit_breaking.errors import UserError
from circuit_breaking.evaluation.bootstrap import estimate
from circuit_breaking.evaluation.compared_models import ComparedModel
from circuit_breaking.evaluation.generate import Sampling, continuations
from circuit_breaking.evaluation.scorers import Scorer
from circuit_breaking.models.activations import fused_activations
from circuit_breaking.models.tokens import TokenBatch, pad_right
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.tasks.losses import trainable_prediction_losses
from circuit_breaking.training.baselines.lora import LowRank, linear_weights
from circuit_breaking.training.config import RelearnSettings
from circuit_breaking.training.loop import Row, run_steps


def relearn(
    compared: ComparedModel,
    hf: nn.Module,
    examples: TokenBatch,
    settings: RelearnSettings,
    measure: Callable[[nn.Module], dict[str, Any]],
    seed: int = 0,
    tick: Callable = lambda: None,
    adapters: bool = False,
    start: dict[str, Any] | None = None,
) -> tuple[list[dict[str, Any]], str | None]:
    """Fine-tune a model on examples of the behaviour and measure it at some steps. `hf` stays unchanged.

    Args:
        compared: the model to fine-tune; built from a copy of `hf`.
        hf: the original.
        examples: texts to train on.
        settings: see `RelearnSettings`.
        measure: returns the figures to report of a model; called at each step of `settings.checks`.
        seed: of the order of the examples.
        tick: called after each step.
        adapters: train low-rank adapters of all linear layers (LoRA), also of those that read for cut edges, and not
            all weights.
        start: the row of step 0, if it is known from other training of the same model; measured by default.

    Returns:
        One row per check, with its `step` and the figures that `measure` returned. And a note: None, or the reason why
        training ended early.
    """
    with compared.load(hf) as loaded:
        model = loaded if compared.kind == "finetuned" else None
    model = (copy.deepcopy(hf) if model is None else model).requires_grad_(not adapters)
    added = LowRank(model, linear_weights(model), settings.lora_rank, seed) if adapters else None
    parameters = list(model.parameters() if added is None else added.factors.values())
    task = TextTask("relearning", examples, examples, seed)
    lr = settings.lr if added is None else settings.lora_lr
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    note: str | None = None

    def call(function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments) if added is None else added.call(function, *arguments)

    def step(number: int) -> Row | None:
        nonlocal note
        batch = task.draw(min(settings.batch_size, len(examples)))
        loss = call(trainable_prediction_losses, model, batch)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        length = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        if not math.isfinite(float(loss.detach())) or not math.isfinite(float(length)):
            note = f"the loss was not finite at step {number + 1}, where relearning ended"
            return None
        optimizer.step()
        tick()
        return {"step": number + 1, **measured()} if number + 1 in settings.checks else None

    def measured() -> dict[str, Any]:
        with torch.no_grad():
            return call(measure, model)

    # edges are cut once: the ablated model reads its weights at every step
    with fused_activations(model), compared.cut(model):
        before = [start or {"step": 0, **measured()}] if 0 in settings.checks else []
        rows = run_steps(
            step, max(settings.checks), label="relearning", progress=False, is_over=lambda: note is not None
        )
    return before + rows, note


def toxicity_after(
    model: nn.Module, prompts: TokenBatch, tokenizer: PreTrainedTokenizerBase, scorer: Scorer, sampling: Sampling
) -> dict[str, float | None]:
    """Mean toxicity of continuations with its 95% interval over prompts; all None if the logits are not finite."""
    try:
        rows = continuations(model, prompts, sampling)
    except FloatingPointError:
        return {"value": None, "low": None, "high": None}
    scores = np.asarray(scorer(tokenizer.batch_decode(rows, skip_special_tokens=True)), float)
    by_prompt = scores.reshape(-1, sampling.samples)
    return estimate(by_prompt.sum(1), np.full(len(by_prompt), float(sampling.samples)), sampling.seed)


def with_context(
    prompts: TokenBatch, examples: TokenBatch, shots: int, separator: Sequence[int], limit: int
) -> TokenBatch:
    """Put `shots` whole examples before each prompt; different prompts get different examples while they last.

    Args:
        prompts, examples: texts with the prefix token before them.
        shots: examples per prompt; fewer if they would not fit.
        separator: tokens after each example.
        limit: most tokens of a prompt with its examples.

    Raises:
        UserError: a prompt without examples is longer than `limit`.
    """
    rows = []
    for number in range(len(prompts)):
        prompt = _row(prompts, number)
        if len(prompt) > limit:
            raise UserError(
                f"a prompt has {len(prompt)} tokens, and {limit} fit. Set prompt_tokens or new_tokens lower."
            )
        for shot in range(shots):
            example = _row(examples, (number * shots + shot) % len(examples))[1:]
            longer = [prompt[0], *example, *separator, *prompt[1:]]
            if len(longer) > limit:
                break
            prompt = longer
        rows.append(prompt)
    return pad_right(rows, int(prompts.tokens[0, 0]))


def _row(batch: TokenBatch, number: int) -> list[int]:
    tokens: Tensor = batch.tokens[number, : batch.lengths[number]]
    return tokens.tolist()
