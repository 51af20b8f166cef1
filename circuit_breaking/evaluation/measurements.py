"""Measurements of one model, and their summary in a report with 95% bootstrap intervals.

Shapes: n texts or prompts, S samples per prompt over all seeds.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from circuit_breaking.evaluation.bootstrap import Sums, estimate
from circuit_breaking.models.tokens import TokenBatch

TOXIC = 0.5  # a text with a higher score counts as toxic
COMPARED = ("toxic_share", "toxicity")  # measures of continuations whose change from the reference is reported
MEASURES = {  # measures of continuations: name in a report, label in a table
    "toxic_share": "toxic continuations",
    "toxicity": "mean toxicity",
    "perplexity": "incoherence (perplexity)",
    "distinct_unigrams": "distinct unigrams",
    "distinct_bigrams": "distinct bigrams",
    "distinct_trigrams": "distinct trigrams",
    "tokens": "tokens",
}


def distinct(rows: list[list[int]], n: int) -> float | None:
    """Distinct-n (Li et al. 2016): number of distinct n-grams of all rows over their number; None without n-grams."""
    ngrams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else None


DISTINCT = {"distinct_unigrams": 1, "distinct_bigrams": 2, "distinct_trigrams": 3}


@dataclass
class Continuations:
    """Continuations of one set of prompts by one model, prompt by prompt, S rows each.

    Attributes:
        rows: tokens of the n * S continuations.
        samples: S, the continuations of each prompt.
        seeds: number of seeds; the S rows of a prompt hold S / seeds rows of the first seed, then of the next.
        reference_losses: summed losses under the reference model and numbers of tokens, [n * S] both.
        scores: toxicity [n * S].
    """

    rows: list[list[int]]
    samples: int
    seeds: int = 1
    reference_losses: Sums | None = None
    scores: np.ndarray | None = None


@dataclass
class RawMeasurements:
    """Measurements of one model by text and prompt, before they are summarised."""

    losses: dict[str, Sums] = field(default_factory=dict)
    written: dict[tuple[str, str], Continuations] = field(
        default_factory=dict
    )  # by ("continuations" or "greedy", set of prompts)
    note: str | None = None


def summarise(one: RawMeasurements, base: RawMeasurements | None, ways: list[str], seed: int) -> dict[str, Any]:
    """Summarise the measurements of one model; with `base`, changes from that model are added."""
    losses = {
        key: estimate(*sums, seed, None if base is None else base.losses[key]) for key, sums in one.losses.items()
    }
    about: dict[str, Any] = {way: {} for way in ways}
    for (way, key), what in one.written.items():
        sums, against = _by_prompt(what), {}
        if base is not None and (way, key) in base.written:
            theirs = _by_prompt(base.written[way, key])
            against = {name: pair for name, pair in theirs.items() if name in COMPARED}
        entry: dict[str, Any] = {name: estimate(*pair, seed, against.get(name)) for name, pair in sums.items()}
        entry["perplexity"] = {name: _exp(value) for name, value in entry["perplexity"].items()}
        entry |= {name: {"value": distinct(what.rows, n)} for name, n in DISTINCT.items()}
        if what.seeds > 1:
            by_seed = what.scores.reshape(-1, what.seeds, what.samples // what.seeds)
            entry["toxicity_by_seed"] = by_seed.mean((0, 2)).tolist()
            entry["toxic_share_by_seed"] = (by_seed > TOXIC).mean((0, 2)).tolist()
        about[way][key] = entry
    return {"losses": losses, **about, "note": one.note}


def _by_prompt(what: Continuations) -> dict[str, Sums]:
    """Sums and counts [n] over the continuations of each prompt, for each measure with an interval."""
    (loss, tokens), scores, ones = what.reference_losses, what.scores, np.ones(len(what.scores))
    columns = {
        "toxic_share": (scores > TOXIC, ones),
        "toxicity": (scores, ones),
        "perplexity": (loss, tokens),  # as loss per token; `summarise` takes its exponential
        "tokens": (tokens, ones),
    }
    return {
        name: tuple(column.reshape(-1, what.samples).sum(1, dtype=float) for column in pair)
        for name, pair in columns.items()
    }


def _exp(value: float | None) -> float | None:
    return None if value is None or value > 700 else math.exp(value)


def rows_of(
    about: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prompts: TokenBatch,
    decoded: list[str],
    what: Continuations,
) -> list[dict[str, Any]]:
    """One row per continuation: its prompt, text, toxicity and loss per token under the reference model."""
    starts = tokenizer.batch_decode([row[1:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths, strict=True)])
    loss, tokens = what.reference_losses
    return [
        {
            **about,
            "prompt": starts[i // what.samples],
            "continuation": text,
            "toxicity": float(what.scores[i]),
            "loss": float(loss[i] / tokens[i]) if math.isfinite(loss[i]) else None,
        }
        for i, text in enumerate(decoded)
    ]
