"""Inference with toxic and ordinary data: which texts the scripts here measure models on, and the loss by toxicity."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from circuit_breaking.evaluation.compared_models import ComparedModel
from circuit_breaking.evaluation.measure import text_losses
from circuit_breaking.evaluation.scorers import Scorer
from circuit_breaking.models.shipped import SHIPPED
from circuit_breaking.models.tokens import TokenBatch, encode, prefix_token
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.tasks import OWTTask, ToxicTask
from circuit_breaking.tasks.owt import load_texts
from circuit_breaking.tasks.toxic import read_examples
from circuit_breaking.toxicity.splits import check_disjoint
from circuit_breaking.toxicity.uniform import read_uniform, spread


def held_out_texts(settings: Any, tokenizer: Any) -> dict[str, TokenBatch]:
    """The first `num_texts` held-out toxic and ordinary texts.

    Raises:
        UserError: a file is missing or damaged, or a toxic text is in both the training and the held-out file.
    """
    check_disjoint(settings.toxic_train, settings.toxic_test)
    ordinary = OWTTask(tokenizer, settings.ordinary, settings.length, text_column=settings.text_column)
    toxic = ToxicTask(tokenizer, settings.toxic_train, settings.toxic_test, settings.length, examples=None)
    return {"toxic": toxic.test[: settings.num_texts], "ordinary": ordinary.test[: settings.num_texts]}


def uniform_texts(settings: Any, tokenizer: Any, scorer: Scorer) -> tuple[TokenBatch, np.ndarray] | None:
    """Texts uniform over toxicity, and the toxicity of each; None if there are none.

    They are read from a file; for the shipped model, which has none, held-out texts are scored.
    """
    path = settings.uniform
    if path is None and (beside := settings.toxic_test.parent / "uniform.jsonl").is_file():
        path = beside
    if settings.num_uniform == 0 or (path is None and settings.model != SHIPPED):
        return None
    if path is not None:
        check_disjoint(settings.toxic_train, path)
        texts, toxicity = read_uniform(path)
    else:
        toxic = read_examples(settings.toxic_test)
        # what is said before an insult fills the middle of the scale
        texts = [
            *load_texts(settings.ordinary, 10_000, settings.text_column)[1],
            *(part for both in toxic for part in both if part),
        ]
        toxicity = scorer(texts)
    some = [at for at in spread(toxicity, settings.num_uniform).tolist() if tokenizer(texts[at])["input_ids"]]
    batch = encode(tokenizer, [texts[at] for at in some], prefix_token(tokenizer), settings.length)
    return batch, toxicity[some]


def measure_uniform(
    models: Mapping[str, ComparedModel], hf: Any, uniform: tuple[TokenBatch, np.ndarray], size: int
) -> list[dict[str, float | None]]:
    """The loss of each model by toxicity.

    Args:
        models: by name.
        hf: the original model, which the others change.
        uniform: texts and their toxicity, of `uniform_texts`.
        size: texts per forward pass.

    Returns:
        A row for each text: its toxicity, and under each model's name the loss per token, None if it is not finite.
    """
    batch, toxicity = uniform
    columns: dict[str, list[float | None]] = {"toxicity": toxicity.tolist()}
    for name, one in progress_bar(models.items(), desc="loss by toxicity", unit="model"):
        with one.load(hf) as model:
            sums, counts = text_losses(model, batch, size)
        columns[name] = [value if np.isfinite(value) else None for value in (sums / counts).tolist()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
