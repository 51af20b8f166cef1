"""Indirect-object prompts from templates (Wang et al. 2022), for any tokenizer whose words are single tokens.

A template has the slots {A} and {B} for two names, {S} for the giver, who is one of them, and optionally {place} and
{object}; it ends just before the other name. In ABBA order the giver is {B}, in BABA order {A}. In the ABC counterpart
of a prompt the giver is a third person, so that no name is repeated and the prompt does not determine the next name.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from circuit_breaking.errors import UserError
from circuit_breaking.runs.files import ROOT, is_text, read_json

if TYPE_CHECKING:  # a large library, which only the scripts that tokenise need
    from transformers import PreTrainedTokenizerBase

BANK = ROOT / "ioi" / "words.json"  # the shipped words and templates
NAMES = ("A", "B", "S")
SLOT = re.compile(r"\{(\w*)\}")
FILLERS = {"place": "places", "object": "objects"}  # list of words for each slot
CHUNK = 2000  # prompts per call of the tokenizer


@dataclass(frozen=True)
class Words:
    """Words and templates of prompts."""

    names: list[str]
    places: list[str]
    objects: list[str]
    templates: list[str]


@dataclass(frozen=True)
class Frame:
    """A prompt without its giver: the part that the two prompts of a symmetric pair share."""

    template: int
    first: str
    second: str
    place: str
    object: str


def read_words(path: Path | str) -> Words:
    """Read and check words and templates: a JSON file with lists `names`, `places`, `objects` and `templates`.

    Raises:
        UserError: the file is missing or damaged, a list is missing or too short, a word is repeated, or a template
            lacks a slot, has an unknown one, or does not end before the name.
    """
    value = read_json(path, f"Copy {BANK.name} and change that.")
    for key, least in (("names", 3), ("places", 1), ("objects", 1), ("templates", 1)):
        found = value.get(key) if isinstance(value, dict) else None
        if not isinstance(found, list) or not all(is_text(word) and word for word in found):
            raise UserError(f"{path} has no list of texts {key!r}. Copy {BANK.name} and change that.")
        if len(found) < least:
            raise UserError(f"{path} gives {len(found)} {key}; at least {least} are needed.")
        if len(set(found)) < len(found):
            twice = next(word for word in found if found.count(word) > 1)
            raise UserError(f"{path} gives {twice!r} twice among its {key}. Remove one.")
    words = Words(**{key: list(value[key]) for key in ("names", "places", "objects", "templates")})
    for template in words.templates:
        check_template(template)
    return words


def check_template(template: str) -> None:
    """Raise a `UserError` for a template that does not make indirect-object prompts."""
    slots = SLOT.findall(template)
    known = "{A}, {B}, {S}, {place} and {object}"
    for name in NAMES:
        if slots.count(name) != 1:
            what = "lacks the slot" if name not in slots else "has more than one slot"
            raise UserError(f"the template {template!r} {what} {{{name}}}. It needs {{A}}, {{B}} and {{S}}, each once.")
        if f" {{{name}}}" not in template:
            raise UserError(f"the template {template!r} has no space before {{{name}}}, so that its name is no word.")
    if unknown := [slot for slot in slots if slot not in (*NAMES, *FILLERS)]:
        raise UserError(f"the template {template!r} has the slot {{{unknown[0]}}}. Known slots are {known}.")
    if "{" in SLOT.sub("", template) or "}" in SLOT.sub("", template):
        raise UserError(f"the template {template!r} has a brace that is no slot. Known slots are {known}.")
    if slots[-1] != "S" and template.rindex("{S}") < max(template.rindex("{A}"), template.rindex("{B}")):
        raise UserError(f"the template {template!r} has its giver {{S}} before {{A}} or {{B}}. Let {{S}} come last.")
    if SLOT.search(template[-1:]) or not re.search(r"\w$", template):
        raise UserError(f"the template {template!r} must end with the word before the name, such as 'to'.")


def is_single(tokenizer: "PreTrainedTokenizerBase", word: str, first: bool = False) -> bool:
    """Whether a word is one token after another word, or with `first`, at the start of a text."""

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    return count(word) == 1 if first else count(f"in {word}") == count("in") + 1


def check_single(words: Words, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise a `UserError` for a name, place or object that is not one token."""
    for key in ("names", "places", "objects"):
        for word in getattr(words, key):
            if not is_single(tokenizer, word):
                pieces = tokenizer.tokenize(f" {word}")
                raise UserError(
                    f"{word!r}, one of the {key}, is {len(pieces)} tokens of this tokenizer and not one "
                    f"({' '.join(pieces)}). Take it out of the list, or choose another word."
                )


def known_words(words: Words, tokenizer: "PreTrainedTokenizerBase") -> Words:
    """Keep the words that are single tokens, and the templates of which all words are.

    Raises:
        UserError: too few are left to make prompts.
    """

    def familiar(template: str) -> bool:
        found = [(match.group(), match.start() == 0) for match in re.finditer(r"\w+", SLOT.sub("", template))]
        return all(is_single(tokenizer, word, first) for word, first in found)

    lists = {
        key: [word for word in getattr(words, key) if is_single(tokenizer, word)]
        for key in ("names", "places", "objects")
    }
    left = Words(**lists, templates=[template for template in words.templates if familiar(template)])
    for key, least in (("names", 3), ("places", 1), ("objects", 1), ("templates", 1)):
        if len(getattr(left, key)) < least:
            raise UserError(
                f"of the {len(getattr(words, key))} {key} of the project's list {len(getattr(left, key))} are made of "
                f"single tokens of this tokenizer; at least {least} are needed. Write a list of your own (words)."
            )
    return left


def draw_frames(words: Words, count: int, random: Random) -> list[Frame]:
    """Draw `count` different frames uniformly at random; their prompts all differ.

    Raises:
        UserError: there are fewer than `count` frames.
    """
    most = sum(
        len(words.names) * (len(words.names) - 1) * len(_fillers(words, t, "place")) * len(_fillers(words, t, "object"))
        for t in words.templates
    )
    if count > most:
        raise UserError(
            f"{count:,} prompts without a repetition were asked for, and these words and templates give {most:,}. "
            "Ask for fewer, or add words."
        )
    found: dict[Frame, None] = {}
    while len(found) < count:
        number = random.randrange(len(words.templates))
        first, second = random.sample(words.names, 2)
        template = words.templates[number]
        place, thing = (random.choice(_fillers(words, template, slot)) for slot in FILLERS)
        found.setdefault(Frame(number, first, second, place, thing))
    return list(found)


def _fillers(words: Words, template: str, slot: str) -> list[str]:
    return getattr(words, FILLERS[slot]) if f"{{{slot}}}" in template else [""]


def fill(template: str, frame: Frame, giver: str) -> tuple[str, dict[str, int]]:
    """Fill a template: the prompt, and by slot the position in characters where each name ends."""
    values = {**asdict(frame), "A": frame.first, "B": frame.second, "S": giver}
    text, ends, done = "", {}, 0
    for match in SLOT.finditer(template):
        text += template[done : match.start()]
        value = values[match.group(1)]
        if re.match("[aeiou]", value):
            text = re.sub(r"\b([Aa]) $", r"\1n ", text)
        text += value
        ends[match.group(1)] = len(text)
        done = match.end()
    return text + template[done:], ends


def make_rows(words: Words, frames: Iterable[Frame], random: Random, pairs: bool = True) -> Iterator[list[dict]]:
    """Yield the row of each prompt together with that of its ABC counterpart.

    Positions are in characters; `with_positions` turns them into tokens. With `pairs`, each frame gives an ABBA prompt
    followed by the BABA prompt that differs only in the giver; without, it gives one of the two.
    """
    for frame in frames:
        givers = [frame.second, frame.first] if pairs else [random.choice([frame.second, frame.first])]
        for subject in givers:
            io = frame.first if subject == frame.second else frame.second
            third = random.choice([name for name in words.names if name not in (io, subject)])
            abba = io == frame.first
            yield [
                _row(words, frame, io, subject, subject, "ABBA" if abba else "BABA"),
                _row(words, frame, io, subject, third, "ABC" if abba else "BAC"),
            ]


def _row(words: Words, frame: Frame, io: str, subject: str, giver: str, order: str) -> dict[str, Any]:
    text, ends = fill(words.templates[frame.template], frame, giver)
    first, second = ends["A"], ends["B"]
    places = {"IO": first, "S1": second} if io == frame.first else {"IO": second, "S1": first}
    places |= {"S2": ends["S"], "end": len(text)}
    row = {"text": text, "IO": io, "S": subject, "order": order, "template": frame.template, "positions": places}
    return row if giver == subject else {**row, "giver": giver}


def with_positions(rows: list[dict[str, Any]], tokenizer: "PreTrainedTokenizerBase") -> Iterator[dict[str, Any]]:
    """Rows with the positions of the names and of the last word in tokens; the prefix token has position 0.

    Raises:
        UserError: a name is not one token in its prompt.
    """
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        encoded = tokenizer([row["text"] for row in part], add_special_tokens=False, return_offsets_mapping=True)
        for row, spans in zip(part, encoded["offset_mapping"], strict=True):
            token_at = {end: (number, begin) for number, (begin, end) in enumerate(spans, 1) if end > begin}
            positions = {}
            for key, end in row["positions"].items():
                word = {"IO": row["IO"], "S1": row["S"], "S2": row.get("giver", row["S"])}.get(key)
                number, begin = token_at.get(end, (0, 0))
                # some byte-level tokenizers include the space before a word in its token, others do not
                if not number or (word is not None and begin not in (end - len(word), end - len(word) - 1)):
                    raise UserError(f"{word or 'the last word'!r} is not one token in {row['text']!r}. Choose others.")
                positions[key] = number
            yield {**row, "positions": positions}


def check_layout(rows: list[dict[str, Any]], path: Path) -> None:
    """Raise a `UserError` unless the names and the end of all prompts of a file are at the same positions."""
    layouts: dict[tuple[int, ...], Any] = {}
    for number, row in enumerate(rows, 1):
        positions = row.get("positions")
        if not isinstance(positions, dict) or set(positions) != {"IO", "S1", "S2", "end"}:
            raise UserError(f"{path}, row {number}: there are no 'positions'. Make it with ioi/make_ioi_datasets.py.")
        pair = sorted((positions["IO"], positions["S1"]))  # which of the two comes first is the order's to say
        layouts.setdefault((*pair, positions["S2"], positions["end"]), row.get("template"))
    if len(layouts) > 1:
        (one, first), (two, second) = list(layouts.items())[:2]
        raise UserError(
            f"{path} has names at other positions in template {first} ({list(one)}) than in template {second} "
            f"({list(two)}), so that a mean per position would mix them. Use the set one or two, or the kind mean."
        )
