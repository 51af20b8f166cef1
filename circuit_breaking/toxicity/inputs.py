"""What experiments on toxic text read by default, and their prompts (layer 2)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from circuit_breaking.errors import UserError
from circuit_breaking.models.load import SHIPPED, TINY
from circuit_breaking.models.tokens import TokenBatch, pad_right, prefix_token
from circuit_breaking.runs.files import DATA, is_text, read_jsonl
from circuit_breaking.tasks.toxic import HINT

FOLDER = DATA / "toxicity"  # run folders, posts and means
POSTS = FOLDER / "posts"  # what toxicity/toxic_data_for_eval.py writes
TEXT = TINY / "text"  # what ships with the tiny model

# Settings that depend on the model, for scripts that leave them None.
TINY_DATA = {
    "toxic_train": TEXT / "toxic_train.jsonl",
    "toxic_test": TEXT / "toxic_test.jsonl",
    "ordinary": SHIPPED,
    "ordinary_prompts": TEXT / "neutral_prompts.jsonl",
}
REAL_DATA = {
    "toxic_train": POSTS / "train.jsonl",
    "toxic_test": POSTS / "test.jsonl",
    "ordinary": "NeelNanda/pile-10k",
}


def default_data(model: str) -> dict[str, Any]:
    """Data settings for a model: the shipped texts for the shipped model, posts and a hub data set for any other."""
    return TINY_DATA if model == SHIPPED else REAL_DATA


def read_prompt_rows(path: Path | str, count: int | None = None) -> list[tuple[str, bool]]:
    """The first rows of a JSON Lines file: a row's `prompt` and True, or, where it has none, its `text` and False.

    A file that is missing, empty or damaged, or a row with neither, is a `UserError`.
    """
    rows = []
    for number, row in enumerate(read_jsonl(path, HINT)[:count], 1):
        text = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
        if not is_text(text):
            raise UserError(f"{path}, row {number}: there is neither a 'prompt' nor a 'text'. {HINT}")
        rows.append((text, "prompt" in row))
    return rows


def load_prompts(tokenizer: Any, source: Path | str | Sequence[str], count: int, first_tokens: int) -> TokenBatch:
    """The first `count` prompts of a source, each behind the prefix token.

    Args:
        tokenizer: the model's tokenizer.
        source: a JSON Lines file, each row with a `prompt`, which is taken whole, or a `text`, whose beginning is the
            prompt; or a list of texts.
        count: most prompts to take.
        first_tokens: how much of a text is its prompt.

    Raises:
        UserError: the file is missing, empty or damaged, or a row has neither `prompt` nor `text`.
    """
    if isinstance(source, str | Path):
        found = read_prompt_rows(source, count)
    else:
        found = [(text, False) for text in list(source)[:count]]
    encoded = tokenizer([text for text, _ in found], add_special_tokens=False)["input_ids"] if found else []
    prefix = prefix_token(tokenizer)
    rows = [[prefix, *(row if whole else row[:first_tokens])] for row, (_, whole) in zip(encoded, found, strict=True)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise UserError(f"{source if isinstance(source, str | Path) else 'the ordinary text'} holds no prompt. {HINT}")
    return pad_right(rows, prefix)
