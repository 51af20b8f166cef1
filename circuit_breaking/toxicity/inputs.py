"""The prompts of experiments on toxic text."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from circuit_breaking.errors import UserError
from circuit_breaking.models.tokens import TokenBatch, pad_right, prefix_token
from circuit_breaking.runs.files import is_text, read_jsonl
from circuit_breaking.runs.texts import describe_no_text
from circuit_breaking.tasks.data import TOXIC_HINT


def read_prompt_rows(path: Path | str, count: int | None = None) -> list[tuple[str, bool]]:
    """The first rows of a JSON Lines file: the `prompt` of a row and True, or, if it has none, its `text` and False.

    Raises:
        UserError: the file is missing, empty or damaged, a row has neither, or it holds something else than text.
    """
    rows = []
    for number, row in enumerate(read_jsonl(path, TOXIC_HINT)[:count], 1):
        names = [name for name in ("prompt", "text") if isinstance(row, dict) and name in row]
        if not names:
            raise UserError(f"{path}, row {number}: there is neither a 'prompt' nor a 'text'. {TOXIC_HINT}")
        text = row[names[0]]
        if not is_text(text):
            raise UserError(f"{path}, row {number}: {names[0]!r} holds {describe_no_text(text)}. {TOXIC_HINT}")
        rows.append((text, names[0] == "prompt"))
    return rows


def load_prompts(
    tokenizer: PreTrainedTokenizerBase, source: Path | str | Sequence[str], count: int, first_tokens: int
) -> TokenBatch:
    """The first `count` prompts of a source, each behind the prefix token.

    Args:
        tokenizer: the model's tokenizer.
        source: a JSON Lines file or a list of texts. A row's `prompt` is used whole; of a `text`, its first tokens are.
        count: most prompts to take.
        first_tokens: tokens of a text that make its prompt.

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
        raise UserError(
            f"{source if isinstance(source, str | Path) else 'the ordinary text'} holds no prompt. {TOXIC_HINT}"
        )
    return pad_right(rows, prefix)
