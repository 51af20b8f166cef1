"""Ordinary text: the behaviour to keep."""

from itertools import islice
from pathlib import Path
from typing import Any

from circuit_breaking.errors import UserError, first_line, one_line
from circuit_breaking.models.shipped import SHIPPED, TEXT
from circuit_breaking.models.tokens import encode, prefix_token
from circuit_breaking.runs.files import read_lines
from circuit_breaking.runs.texts import TEXT_SUFFIXES, column_texts, read_rows
from circuit_breaking.tasks.base import TextTask


def load_texts(source: str | Path, limit: int, text_column: str = "text") -> tuple[list[str], list[str]]:
    """Training and held-out texts of a source.

    Args:
        source: a text file with one text per line, JSON Lines or CSV (every fifth text is held out); `"tiny"` for the
            shipped sentences; or the name of a Hugging Face data set, such as `NeelNanda/pile-10k`.
        limit: largest number of training texts; a quarter as many are held out.
        text_column: the column of the file or data set that holds the texts.

    Raises:
        UserError: the source is missing, damaged, has no such column or too few texts.
    """
    if str(source) == SHIPPED:
        _no_columns(SHIPPED, text_column)
        return read_lines(TEXT / "plain_train.txt")[:limit], read_lines(TEXT / "plain_test.txt")[: limit // 4 + 1]
    try:
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that is nobody's
        raise UserError(f"cannot read {str(source)[:200]!r} ({one_line(error, 100)}). Check the settings.") from error
    if is_folder:
        raise UserError(f"{path} is a folder; the ordinary text is a file with one text a line, or a data set's name.")
    if is_file or path.suffix.lower() in TEXT_SUFFIXES or path.is_absolute():
        if (rows := read_rows(path)) is None:
            _no_columns(path, text_column)
            texts = read_lines(path)
        else:
            texts = column_texts(rows, text_column, str(path))
    else:
        texts = _from_hub(str(source), limit + limit // 4 + 1, text_column)
    held_out = texts[::5][: limit // 4 + 1]
    train = [text for number, text in enumerate(texts) if number % 5][:limit]
    # a line that stands twice must not be on both sides
    seen = set(held_out)
    train = [text for text in train if text not in seen]
    if not train:
        raise UserError(f"{source} has {len(texts)} texts, too few to train on some and hold out others.")
    return train, held_out


def _no_columns(source: str | Path, text_column: str) -> None:
    if text_column != "text":
        raise UserError(f"{source} is plain text and has no column {text_column!r}. Set text_column to 'text'.")


def _from_hub(name: str, count: int, text_column: str) -> list[str]:
    try:
        from datasets import load_dataset

        rows = list(islice(load_dataset(name, split="train", streaming=True), count))
    except Exception as error:  # the library raises many kinds, from requests' to its own
        raise UserError(
            f"the data set {name!r} is not to be had from the Hugging Face hub ({first_line(error)}). "
            "Check the name and the network, or set the path of a text file with one text a line."
        ) from error
    return column_texts(rows, text_column, f"the data set {name!r}")


class OWTTask(TextTask):
    """Next-token loss on ordinary text (OpenWebText in the paper).

    Args:
        tokenizer: the model's tokenizer.
        source: see `load_texts`.
        length: largest number of tokens of a text, prefix included; longer texts are truncated.
        limit: largest number of training texts.
        seed: of the order of training texts.
        text_column: the column of the source that holds the texts, if it has columns.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: str | Path = SHIPPED,
        length: int = 50,
        limit: int = 10_000,
        seed: int = 0,
        text_column: str = "text",
    ) -> None:
        train, test = load_texts(source, limit, text_column)
        prefix = prefix_token(tokenizer)
        super().__init__(
            "ordinary text", encode(tokenizer, train, prefix, length), encode(tokenizer, test, prefix, length), seed
        )
