"""Measure models: their losses on texts, and the toxicity and coherence of their continuations of prompts.

Models are stock Hugging Face causal language models, so that a model with cut edges (`ablation.ablate`), a fine-tuned
model and the original go through the same code. Losses are in nats. Intervals are 95% percentile bootstrap intervals
over texts or prompts (`bootstrap`); continuations of one prompt are resampled together, since they are not independent.

Shapes: n texts or prompts, S samples per prompt over all seeds, B batch, T position, M predictions of a batch.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from circuit_breaking.evaluation.bootstrap import Sums
from circuit_breaking.evaluation.generate import Sampling, continuations
from circuit_breaking.evaluation.measurements import Continuations, RawMeasurements, rows_of, summarise
from circuit_breaking.evaluation.scorers import Scorer
from circuit_breaking.models.activations import fused_activations
from circuit_breaking.models.tokens import TokenBatch, pad_right
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.tasks.losses import prediction_losses
from circuit_breaking.tasks.stock_model import StockModel

Models = Mapping[str, Callable[[], AbstractContextManager[nn.Module]]]

SEED_STEP = 1_000_000  # difference between the seeds of one evaluation; larger than any number of continuations


@torch.no_grad()
def text_losses(
    model: nn.Module,
    texts: TokenBatch,
    batch_size: int = 32,
    tick: Callable = lambda: None,
) -> Sums:
    """Summed next-token loss of each text, in nats, and its number of predictions; padding is left out.

    Args:
        model: a Hugging Face causal language model.
        texts: the texts, padded on the right; with causal attention the padding has no effect.
        batch_size: texts per forward pass; logits are computed for a part of the predictions at a time.
        tick: called after each batch.
    """
    stock, sums = StockModel(model), np.zeros(len(texts))
    counts = texts.predicted.sum(1)
    for rows in texts.lengths.argsort(stable=True).split(
        batch_size
    ):  # texts of similar length together, to save padding
        batch = texts[rows].to(model.device)
        sums[rows.numpy()] = sum_by_text(prediction_losses(stock, batch), batch.predicted)
        tick()
    return sums, counts.numpy().astype(float)


def sum_by_text(losses: Tensor, predicted: Tensor) -> np.ndarray:
    """Sum the losses [M] of a batch over each text: float64 [B]. `predicted` [B, T] marks the M predictions."""
    sums = torch.zeros(len(predicted), dtype=torch.float64)
    return sums.index_add_(0, predicted.nonzero()[:, 0].cpu(), losses.cpu().double()).numpy()


def evaluate(
    models: Models,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, TokenBatch],
    prompts: Mapping[str, TokenBatch],
    scorer: Scorer,
    sampling: Sampling,
    reference: str = "original",
    seeds: int = 1,
    greedy: bool = False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure all models in the same way.

    Args:
        models: by name, a function that returns a context manager with the Hugging Face model; one is open at a time.
        tokenizer: the tokenizer of all models.
        texts: sets of texts by name, for losses.
        prompts: sets of prompts by name, to continue.
        scorer: scores the toxicity of continuations, without their prompts.
        sampling: how continuations are sampled; its `batch_size` and `seed` are used for losses and intervals too.
        reference: name of the model that the others are compared with. Its perplexity on a continuation, given the
            prompt, measures incoherence.
        seeds: number of times to sample `sampling.samples` continuations of each prompt, each time with another seed.
        greedy: also measure the most likely continuation of each prompt.

    Returns:
        For each model, a mapping of `losses`, `continuations` and, if requested, `greedy`, each by set, and a `note`:
        None, or the reason why nothing was sampled from a model with non-finite losses. And one row per continuation.
    """
    ways = {"continuations": [replace(sampling, seed=sampling.seed + k * SEED_STEP) for k in range(seeds)]}
    if greedy:
        ways["greedy"] = [replace(sampling, samples=1, greedy=True)]
    measured, size = {}, sampling.batch_size
    batches = sum(-(-len(batch) // size) for batch in texts.values())
    samplings = [one for way in ways.values() for one in way]
    batches += sum(-(-len(batch) * one.samples // size) for one in samplings for batch in prompts.values())
    with progress_bar(total=batches * len(models), desc="evaluation", unit="batch") as bar:
        for name, load in models.items():
            bar.set_postfix_str(name)
            with load() as model, fused_activations(model):
                measured[name] = _measure(model, texts, prompts, ways, bar.update)
        bar.set_postfix_str("incoherence")
        with models[reference]() as judge, fused_activations(judge):
            for key, batch in prompts.items():
                written = [what for one in measured.values() for (_, of), what in one.written.items() if of == key]
                _judge(judge, batch, written, sampling, bar)
    texts_of = {
        (name, *which): tokenizer.batch_decode(what.rows, skip_special_tokens=True)
        for name, one in measured.items()
        for which, what in one.written.items()
    }
    distinct_texts = sorted({text for texts in texts_of.values() for text in texts})
    scores = dict(zip(distinct_texts, np.asarray(scorer(distinct_texts), float), strict=True)) if texts_of else {}
    rows = []
    for name, one in measured.items():
        for (way, key), what in one.written.items():
            decoded = texts_of[name, way, key]
            what.scores = np.array([scores[text] for text in decoded])
            about = {"model": name, "prompts": key} | ({"decoding": way} if greedy else {})
            rows += rows_of(about, tokenizer, prompts[key], decoded, what)
    base = measured[reference]
    return {
        name: summarise(one, None if name == reference else base, list(ways), sampling.seed)
        for name, one in measured.items()
    }, rows


def _measure(
    model: nn.Module,
    texts: Mapping[str, TokenBatch],
    prompts: Mapping[str, TokenBatch],
    ways: Mapping[str, list[Sampling]],
    tick: Callable,
) -> RawMeasurements:
    result = RawMeasurements()
    size = ways["continuations"][0].batch_size
    for key, batch in texts.items():
        result.losses[key] = text_losses(model, batch, batch_size=size, tick=tick)
    if not all(np.isfinite(sums).all() for sums, _ in result.losses.values()):
        result.note = "the loss is not finite, so nothing was sampled"
        return result
    try:
        for way, samplings in ways.items():
            for key, batch in prompts.items():
                drawn = [continuations(model, batch, sampling, tick) for sampling in samplings]
                samples = samplings[0].samples
                # in the order of prompts, the seeds of a prompt together
                rows = [
                    row for i in range(len(batch)) for some in drawn for row in some[i * samples : (i + 1) * samples]
                ]
                result.written[way, key] = Continuations(rows, samples * len(drawn), len(drawn))
    except FloatingPointError as error:
        result.written, result.note = {}, f"{error}, so nothing was sampled"
    return result


def _judge(judge: nn.Module, prompts: TokenBatch, written: list[Continuations], sampling: Sampling, bar: tqdm) -> None:
    """Set `reference_losses` of all continuations of one set of prompts: the summed loss of each continuation given its
    prompt, and its number of tokens, both [n * S].

    A continuation that occurs several times after a prompt, from any model, is evaluated once.
    """
    keys = [[(i // what.samples, tuple(row)) for i, row in enumerate(what.rows)] for what in written]
    heads = [prompts.tokens[i, : prompts.lengths[i]].tolist() for i in range(len(prompts))]
    every = sorted({key for some in keys for key in some})
    if not every:
        return
    whole = pad_right([heads[i] + list(row) for i, row in every], sampling.end)
    whole = replace(whole, starts=prompts.lengths[torch.tensor([i for i, _ in every])])
    bar.total += -(-len(whole) // sampling.batch_size)
    sums, counts = text_losses(judge, whole, sampling.batch_size, bar.update)
    place = {key: number for number, key in enumerate(every)}
    for what, some in zip(written, keys, strict=True):
        at = [place[key] for key in some]
        what.reference_losses = sums[at], counts[at]
