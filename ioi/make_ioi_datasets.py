"""Make indirect-object prompts and their ABC counterparts for a model's tokenizer.

Reads   a tokenizer, and words and templates (ioi/words.json, or your own file of this form).
Writes  data/ioi/prompts/<model>/: for each of the sets one, two and all (one template, two, all of them)
        <set>_train.jsonl and <set>_test.jsonl and, line by line, their counterparts <set>_abc_train.jsonl and
        <set>_abc_test.jsonl; report.json.
Time    ten seconds.

Words of the project's list that are not single tokens of the tokenizer are left out, and so are templates with such
words; in your own list they are an error. No prompt, and no partner of a pair, is both in training and held out.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from circuit_breaking.errors import UserError
from circuit_breaking.ioi.settings import FOLDER, SETS
from circuit_breaking.runs.cli import read_settings, run_script
from circuit_breaking.runs.config import check_counts


@dataclass
class Settings:
    MOST_USED: ClassVar = ("model", "words", "train", "test", "pairs", "seed", "out")

    model: str = "tiny"  # model whose tokenizer is used: tiny (the shipped one), a name on the hub, or a folder
    words: Path | None = None  # JSON file like ioi/words.json with your own words and templates; None: the project's
    train: int = 8000  # training prompts of each set
    test: int = 2000  # held-out prompts of each set
    pairs: bool = True  # make prompts in pairs that differ in the giver only: one ABBA, one BABA
    seed: int = 0  # seed of the choice of words and templates
    out: Path | None = None  # folder to write; None: data/ioi/prompts/<model>

    def check(self) -> None:
        check_counts(self, "train", "test")
        if self.pairs and (self.train % 2 or self.test % 2):
            raise UserError(f"{self.train} and {self.test} prompts do not come in pairs. Give even numbers.")


if __name__ == "__main__":
    settings = read_settings(Settings)

from random import Random

from circuit_breaking.ioi.prompts import (
    BANK,
    Words,
    check_single,
    draw_frames,
    known_words,
    make_rows,
    read_words,
    with_positions,
)
from circuit_breaking.models.load import load_tokenizer
from circuit_breaking.models.tokens import prefix_token
from circuit_breaking.runs.files import write_json, write_jsonl
from circuit_breaking.runs.provenance import provenance


def main(settings: Settings) -> None:
    settings.check()
    out = settings.out or FOLDER / "prompts" / Path(settings.model).name
    tokenizer = load_tokenizer(settings.model)
    prefix_token(tokenizer)  # positions count it: an error for a tokenizer without one
    given = read_words(settings.words or BANK)
    if settings.words is None:
        words = known_words(given, tokenizer)
    else:
        check_single(given, tokenizer)
        words = given
    if len(words.templates) < 2:
        raise UserError("the set of two templates needs two, and there is one. Add a template.")
    counts = {}
    for name, templates in SETS.items():
        rows = make_set(settings, replace(words, templates=words.templates[:templates]), tokenizer, name)
        for file, part in rows.items():
            counts[f"{name}_{file}"] = write_jsonl(out / f"{name}_{file}.jsonl", part)
    left_out = {key: [word for word in getattr(given, key) if word not in getattr(words, key)] for key in vars(given)}
    about = {"prompts": counts, "words": words, "left_out": left_out}
    write_json(out / "report.json", {**about, **provenance(settings, [settings.words or BANK])})
    print(
        f"{len(words.names)} names, {len(words.places)} places, {len(words.objects)} objects and "
        f"{len(words.templates)} templates ({sum(map(len, left_out.values()))} of the list left out: not single tokens)"
    )
    print(f"{sum(counts.values()):,} prompts in {len(counts)} files written to {out}")


def make_set(settings: Settings, words: Words, tokenizer: object, name: str) -> dict[str, list[dict]]:
    """Rows of the four files of a set."""
    random = Random(f"{settings.seed} {name}")
    each = 2 if settings.pairs else 1  # prompts a frame
    frames = draw_frames(words, (settings.train + settings.test) // each, random)
    both = list(make_rows(words, frames, random, settings.pairs))
    plain, abc = (list(with_positions([pair[kind] for pair in both], tokenizer)) for kind in (0, 1))
    split = settings.train
    return {"train": plain[:split], "test": plain[split:], "abc_train": abc[:split], "abc_test": abc[split:]}


if __name__ == "__main__":
    run_script(main, settings)
