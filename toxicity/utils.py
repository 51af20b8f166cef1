"""What the toxicity scripts share: where their data is by default, and prompts."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from circuit_breaking.cli import UserError
from circuit_breaking.files import DATA, read_jsonl
from circuit_breaking.models import TINY, prefix_token
from circuit_breaking.tasks.owt import SHIPPED
from circuit_breaking.tasks.toxic import HINT
from circuit_breaking.text import TokenBatch, pad_right

T = TypeVar("T")
FOLDER = DATA / "toxicity"  # run folders, posts and means
POSTS = FOLDER / "posts"  # what toxic_data_for_eval.py writes
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


def fill_in(settings: T, *sources: Mapping[str, Any]) -> T:
    """Settings with each None replaced by the first source that has a value of that name; paths become `Path`s."""
    found = {}
    for field in dataclasses.fields(settings):
        if getattr(settings, field.name) is None:
            value = next((s[field.name] for s in sources if s.get(field.name) is not None), None)
            found[field.name] = Path(value) if value is not None and "Path" in str(field.type) else value
    return dataclasses.replace(settings, **found)


def check_counts(settings: Any, *names: str) -> None:
    """Raise a `UserError` for a setting of these names that is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}; give 1 or more.")


def files_of(model: str) -> list[Path]:
    """Files with the weights of a model that is a folder or a file here; none for a hub's name."""
    path = TINY if model == SHIPPED else Path(model).expanduser()
    return [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.gguf")])


def read_prompt_rows(path: Path | str, count: int | None = None) -> list[tuple[str, bool]]:
    """The first rows of a JSON Lines file: a row's `prompt` and True, or, where it has none, its `text` and False.

    A file that is missing, empty or damaged, or a row with neither, is a `UserError`.
    """
    rows = []
    for number, row in enumerate(read_jsonl(path, HINT)[:count], 1):
        text = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
        if not isinstance(text, str):
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
