"""Ordinary text: the behaviour to keep."""

from pathlib import Path
from typing import Any

from circuit_breaking.errors import UserError, first_line, one_line
from circuit_breaking.models.shipped import SHIPPED, TEXT
from circuit_breaking.models.tokens import encode, prefix_token
from circuit_breaking.runs.files import read_lines
from circuit_breaking.tasks.base import TextTask


def load_texts(source: str | Path, limit: int) -> tuple[list[str], list[str]]:
    """Training and held-out texts of a source.

    Args:
        source: a text file with one text per line (every fifth is held out), `"tiny"` for the shipped sentences, or
            the name of a Hugging Face data set with a `text` column, such as `NeelNanda/pile-10k`.
        limit: largest number of training texts; a quarter as many are held out.
    """
    if str(source) == SHIPPED:
        return read_lines(TEXT / "plain_train.txt")[:limit], read_lines(TEXT / "plain_test.txt")[: limit // 4 + 1]
    try:
        path = Path(source).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, a home that is nobody's
        raise UserError(f"cannot read {str(source)[:200]!r} ({one_line(error, 100)}). Check the settings.") from error
    if is_folder:
        raise UserError(f"{path} is a folder; the ordinary text is a file with one text a line, or a data set's name.")
    if is_file or path.suffix in {".txt", ".text"} or path.is_absolute():
        texts = read_lines(path)
    else:
        texts = _from_hub(str(source), limit + limit // 4 + 1)
    held_out = texts[::5][: limit // 4 + 1]
    train = [text for number, text in enumerate(texts) if number % 5][:limit]
    # a line that occurs twice must not be in both
    seen = set(held_out)
    train = [text for text in train if text not in seen]
    if not train:
        raise UserError(f"{source} has {len(texts)} texts, too few to train on some and hold out others.")
    return train, held_out


def _from_hub(name: str, count: int) -> list[str]:
    try:
        from datasets import load_dataset

        rows = load_dataset(name, split="train", streaming=True)
        texts = [text for row, _ in zip(rows, range(count), strict=False) if (text := row["text"].strip())]
    except Exception as error:  # the library raises many kinds, from requests' to its own
        raise UserError(
            f"the data set {name!r} is not to be had from the Hugging Face hub ({first_line(error)}). "
            "Check the name and the network, or set the path of a text file with one text a line."
        ) from error
    if not texts:
        raise UserError(f"the data set {name!r} holds no text.")
    return texts


class OWTTask(TextTask):
    """Next-token loss on ordinary text (OpenWebText in the paper).

    Args:
        tokenizer: the model's tokenizer.
        source: see `load_texts`.
        length: largest number of tokens of a text, prefix included; longer texts are truncated.
        limit: largest number of training texts.
        seed: of the order of training texts.
    """

    def __init__(
        self, tokenizer: Any, source: str | Path = SHIPPED, length: int = 50, limit: int = 10_000, seed: int = 0
    ) -> None:
        train, test = load_texts(source, limit)
        prefix = prefix_token(tokenizer)
        super().__init__(
            "ordinary text", encode(tokenizer, train, prefix, length), encode(tokenizer, test, prefix, length), seed
        )
