"""Training, validation and held-out texts of an experiment, with no text in two of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from circuit_breaking.errors import UserError
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.runs.files import read_jsonl
from circuit_breaking.tasks import OWTTask, ToxicTask
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.toxicity.sampling import normalised

SHARE = 5  # at most one in 5 texts is used for validation
LIMIT = 10_000  # most ordinary texts for training


@dataclass
class Splits:
    """`toxic` and `ordinary` texts, each split into `train`, `validation` and `test` (held out)."""

    toxic: dict[str, TokenBatch]
    ordinary: dict[str, TokenBatch]
    files: list[Path] = field(default_factory=list)  # the files that were read

    def tasks(self, seed: int, validate: bool = False) -> tuple[TextTask, TextTask]:
        """Toxic and ordinary text as tasks, tested on held-out texts or, with `validate`, on validation texts."""
        test = "validation" if validate else "test"
        return (
            TextTask("toxic text", self.toxic["train"], self.toxic[test], seed),
            TextTask("ordinary text", self.ordinary["train"], self.ordinary[test], seed),
        )

    @property
    def about(self) -> dict[str, dict[str, int]]:
        """Number of texts of each kind and split, for a report."""
        return {
            name: {part: len(batch) for part, batch in parts.items()}
            for name, parts in (("toxic", self.toxic), ("ordinary", self.ordinary))
        }


def load_splits(
    tokenizer: PreTrainedTokenizerBase,
    toxic_train: Path,
    toxic_test: Path,
    ordinary: str,
    length: int = 50,
    examples: int | None = 100,
    validation: int = 50,
    seed: int = 0,
    text_column: str = "text",
) -> Splits:
    """Read and split the texts of an experiment.

    Args:
        tokenizer: the model's tokenizer.
        toxic_train, toxic_test, ordinary, length: as for `ToxicTask` and `OWTTask`.
        examples: toxic training texts, the first ones of a seeded order; None for all that are not used for validation.
        validation: texts of each kind for choosing checkpoints, the last of those that are not held out; at most a
            fifth of them.
        seed: of the order of texts.
        text_column: the column of the ordinary text that holds the texts, if it has columns.

    Raises:
        UserError: a file is missing, empty or damaged; a toxic text or id is in both files; there are too few texts.
    """
    check_disjoint(toxic_train, toxic_test)
    toxic = ToxicTask(tokenizer, toxic_train, toxic_test, length, examples=None, seed=seed)
    plain = OWTTask(tokenizer, ordinary, length, LIMIT, seed, text_column)
    parts = []
    for task, count in ((toxic, examples), (plain, None)):
        train = without(task.train, task.test)
        held_back = min(validation, len(train) // SHARE)
        if held_back == 0:
            raise UserError(f"{len(train)} texts of {task.name} are too few to train on some and validate with others.")
        rest = train[: len(train) - held_back]
        # a text that occurs twice in a file must not be used for both training and validation
        validating = train[len(train) - held_back :]
        parts.append({"train": without(rest, validating)[:count], "validation": validating, "test": task.test})
    files = [path for path in (toxic_train, toxic_test, Path(ordinary)) if Path(path).is_file()]
    return Splits(*parts, files=files)


def check_disjoint(train: Path, test: Path) -> None:
    """Raise a `UserError` if a row of one file is also in the other, by its id or by its text.

    Texts that differ only in case, compatibility forms or white space count as the same.
    """
    seen: dict[str, set[Any]] = {"id": set(), "text": set()}
    for path in (train, test):
        mine: dict[str, set[Any]] = {"id": set(), "text": set()}
        for row in read_jsonl(path):
            if isinstance(row, dict) and isinstance(row.get("text"), str):
                mine["text"].add(normalised(row["text"]))
                if row.get("id") is not None:
                    mine["id"].add(str(row["id"]))
        for what in ("text", "id"):
            if both := mine[what] & seen[what]:
                raise UserError(
                    f"{len(both)} rows of {test} are both in the training and the held-out data ({train}), by their "
                    f"{what}. Make both with toxicity/toxic_data_for_eval.py."
                )
        seen = mine


def without(texts: TokenBatch, others: TokenBatch) -> TokenBatch:
    """The texts whose tokens, after truncation, are not among those of `others`.

    Raises:
        UserError: no text is left.
    """
    taken = {tuple(row[:n].tolist()) for row, n in zip(others.tokens, others.lengths, strict=True)}
    kept = [
        at
        for at, (row, n) in enumerate(zip(texts.tokens, texts.lengths, strict=True))
        if tuple(row[:n].tolist()) not in taken
    ]
    if not kept:
        raise UserError("every training text is held out too. Check the data.")
    return texts if len(kept) == len(texts) else texts[torch.tensor(kept)]
