"""Toxic text, the behaviour that the paper's main experiment removes."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuit_breaking.errors import UserError
from circuit_breaking.models.shipped import TEXT
from circuit_breaking.models.tokens import encode, prefix_token
from circuit_breaking.runs.files import is_text, read_jsonl
from circuit_breaking.runs.texts import describe_no_text
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.tasks.data import TOXIC_HINT

Example = tuple[str, str]  # a text and its prompt, "" where all of the text counts


def read_examples(path: Path | str) -> list[Example]:
    """`text` and, where there is one, `prompt` of every row of a JSON Lines file. Raises `UserError` for bad rows."""
    rows = read_jsonl(path, TOXIC_HINT)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "text" not in row:
            raise UserError(f"{path}, row {number}: there is no 'text'. {TOXIC_HINT}")
        if not is_text(row["text"]):
            raise UserError(f"{path}, row {number}: 'text' holds {describe_no_text(row['text'])}. {TOXIC_HINT}")
        if not is_text(row.get("prompt", "")) or not row["text"].startswith(row.get("prompt", "")):
            raise UserError(f"{path}, row {number}: the 'prompt' is not the beginning of the 'text'. {TOXIC_HINT}")
    if not rows:
        raise UserError(f"{path} holds no rows. {TOXIC_HINT}")
    return [(row["text"], row.get("prompt", "")) for row in rows]


class ToxicTask(TextTask):
    """Next-token loss on toxic text.

    The training file is shuffled before examples are taken from it, because the published split is sorted by score.

    Args:
        tokenizer: the model's tokenizer.
        train, test: JSON Lines with a `text` in each row, or the texts themselves; the shipped ones by default. If a
            row has a `prompt`, the beginning of its text, the loss covers only the rest of the text: the behaviour is
            to answer an insult with an insult, not to receive one.
        length: largest number of tokens of a text, prefix included; longer texts are truncated.
        examples: number of training texts to use (100 in the paper); None: all.
        seed: of the choice and the order of training texts.

    Raises:
        UserError: a file is missing or empty, or a text is in both.
    """

    def __init__(
        self,
        tokenizer: Any,
        train: Path | str | Sequence[str] = TEXT / "toxic_train.jsonl",
        test: Path | str | Sequence[str] = TEXT / "toxic_test.jsonl",
        length: int = 50,
        examples: int | None = 100,
        seed: int = 0,
    ) -> None:
        examples_of = {
            name: read_examples(source) if isinstance(source, str | Path) else [(text, "") for text in source]
            for name, source in (("train", train), ("test", test))
        }
        if both := {text for text, _ in examples_of["train"]} & {text for text, _ in examples_of["test"]}:
            raise UserError(
                f"texts that are both in the training and the held-out toxic data: {len(both)}. {TOXIC_HINT}"
            )
        random.Random(seed).shuffle(examples_of["train"])
        examples_of["train"] = examples_of["train"][:examples]
        prefix = prefix_token(tokenizer)
        batches = []
        for rows in examples_of.values():
            prompts = [prompt for _, prompt in rows] if any(prompt for _, prompt in rows) else None
            batches.append(encode(tokenizer, [text for text, _ in rows], prefix, length, prompts=prompts))
        super().__init__("toxic text", *batches, seed)
