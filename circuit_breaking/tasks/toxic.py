"""Toxic text, the behaviour that the paper's main experiment removes (layer 2)."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuit_breaking.cli import UserError
from circuit_breaking.files import read_jsonl
from circuit_breaking.models import TINY, prefix_token
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.text import encode

HINT = "Make it with toxicity/toxic_data_for_eval.py, or set the path of one."


def read_texts(path: Path | str, field: str = "text") -> list[str]:
    """One field of every row of a JSON Lines file. A row without it, or a file without rows, is a `UserError`."""
    rows = read_jsonl(path, HINT)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise UserError(f"{path}, row {number}: there is no {field!r} with text in it. {HINT}")
    if not rows:
        raise UserError(f"{path} holds no rows. {HINT}")
    return [row[field] for row in rows]


class ToxicTask(TextTask):
    """Next-token loss on toxic text. The training file is shuffled before examples are taken from it, for the
    published split is sorted by score.

    Args:
        tokenizer: the model's tokenizer.
        train, test: JSON Lines with a `text` in each row, or the texts themselves; the shipped ones by default.
        length: tokens a text is cut to, prefix included.
        examples: training texts to use (100 in the paper); all when None.
        seed: of the choice and the order of training texts.

    Raises:
        UserError: a file is missing or empty, or a text is in both.
    """

    def __init__(
        self,
        tokenizer: Any,
        train: Path | str | Sequence[str] = TINY / "text" / "toxic_train.jsonl",
        test: Path | str | Sequence[str] = TINY / "text" / "toxic_test.jsonl",
        length: int = 50,
        examples: int | None = 100,
        seed: int = 0,
    ) -> None:
        texts, held_out = (
            read_texts(source) if isinstance(source, str | Path) else list(source) for source in (train, test)
        )
        if both := set(texts) & set(held_out):
            raise UserError(f"{len(both)} texts are both in the training and the held-out toxic data. {HINT}")
        random.Random(seed).shuffle(texts)
        prefix = prefix_token(tokenizer)
        super().__init__(
            "toxic text",
            encode(tokenizer, texts[:examples], prefix, length),
            encode(tokenizer, held_out, prefix, length),
            seed,
        )
