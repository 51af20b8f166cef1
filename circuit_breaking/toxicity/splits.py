"""Which texts train, which validate, which are held out; and that none is in two places (layer 3)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from circuit_breaking.errors import UserError
from circuit_breaking.models.tokens import TokenBatch
from circuit_breaking.runs.files import read_jsonl
from circuit_breaking.tasks import OWTTask, ToxicTask
from circuit_breaking.tasks.base import TextTask
from circuit_breaking.toxicity.sampling import normalised

SHARE = 5  # at most one text in so many validates
LIMIT = 10_000  # most ordinary texts to train on


@dataclass
class Splits:
    """Texts by what they are for: `toxic` and `ordinary`, each with `train`, `validation` and `test`."""

    toxic: dict[str, TokenBatch]
    ordinary: dict[str, TokenBatch]
    files: list[Path] = field(default_factory=list)  # that were read

    def tasks(self, seed: int, validate: bool = False) -> tuple[TextTask, TextTask]:
        """Toxic and ordinary text as tasks; what they test on is held out, or, with `validate`, validates."""
        test = "validation" if validate else "test"
        return (
            TextTask("toxic text", self.toxic["train"], self.toxic[test], seed),
            TextTask("ordinary text", self.ordinary["train"], self.ordinary[test], seed),
        )

    @property
    def about(self) -> dict[str, dict[str, int]]:
        """How many texts there are of each, for a report."""
        return {
            name: {part: len(batch) for part, batch in parts.items()}
            for name, parts in (("toxic", self.toxic), ("ordinary", self.ordinary))
        }


def load_splits(
    tokenizer: Any,
    toxic_train: Path,
    toxic_test: Path,
    ordinary: str,
    length: int = 50,
    examples: int | None = 100,
    validation: int = 50,
    seed: int = 0,
) -> Splits:
    """Read and split the texts of an experiment.

    Args:
        tokenizer: the model's tokenizer.
        toxic_train, toxic_test, ordinary, length: as for `ToxicTask` and `OWTTask`.
        examples: toxic texts to train on, the first of a seeded order; None: all that do not validate.
        validation: texts of each kind to choose checkpoints by, the last of those that are not held out; at most a
            fifth of them.
        seed: of that order.

    Raises:
        UserError: a file is missing, empty or damaged; a toxic text or id is in both files; there are too few texts.
    """
    check_apart(toxic_train, toxic_test)
    toxic = ToxicTask(tokenizer, toxic_train, toxic_test, length, examples=None, seed=seed)
    plain = OWTTask(tokenizer, ordinary, length, LIMIT, seed)
    parts = []
    for task, count in ((toxic, examples), (plain, None)):
        train = without(task.train, task.test)
        held_back = min(validation, len(train) // SHARE)
        if held_back == 0:
            raise UserError(f"{len(train)} texts of {task.name} are too few to train on some and validate with others.")
        rest = train[: len(train) - held_back]
        # a text that stands twice in a file must not train and validate
        validating = train[len(train) - held_back :]
        parts.append({"train": without(rest, validating)[:count], "validation": validating, "test": task.test})
    files = [path for path in (toxic_train, toxic_test, Path(ordinary)) if Path(path).is_file()]
    return Splits(*parts, files=files)


def check_apart(train: Path, test: Path) -> None:
    """Raise a `UserError` where a row of one file is in the other, by its id or by its text.

    Texts count as the same where only case, compatibility forms or white space tell them apart.
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
    """The texts whose tokens, as they were cut, are not among the others'.

    Raises:
        UserError: none is left.
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
