"""Greater-than (Hanna, Liu, Variengien 2023): something that began in one year ends in a later one.

    The war lasted from the year 1732 to the year 17 -> 33, 34, ..., 99

Right are the tokens after which only later years can come, wrong are those after which none can. Where a tokenizer has
a token for two digits, these are the years after and up to the first one; where each digit is a token, they are the
higher and the lower digits. In the counterfactual, the first year ends in 01, so that nearly all years are later.
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from circuit_breaking.errors import UserError
from circuit_breaking.tasks.prompts import Example, tokens_of

NOUNS = [
    "war", "battle", "siege", "reign", "dynasty", "voyage", "journey", "treaty", "contract", "project", "plan",
    "study", "trial", "drought", "plague", "strike", "tour", "pact", "survey", "mission", "campaign", "conflict",
    "construction", "expedition", "rebellion", "revolution", "investigation", "negotiation", "competition",
    "operation", "occupation", "expansion",
]  # fmt: skip
TEMPLATE = "The {noun} lasted from the year {century}{year:02d} to the year {century}"
CENTURIES = (11, 12, 13, 14, 15, 16, 17, 18)
LOWEST = 1  # the last two digits of the first year in the counterfactual


def generate(tokenizer: PreTrainedTokenizerBase, draw: random.Random, name: str) -> Iterator[Example]:
    """Random events, centuries and years."""
    answers = {century: next_tokens(tokenizer, century) for century in CENTURIES}
    centuries = [century for century, found in answers.items() if len(found) > 1]
    if not centuries:
        raise UserError(f"this tokenizer has no tokens for parts of years, so the task {name} cannot be made for it.")
    while True:
        noun, century, year = draw.choice(NOUNS), draw.choice(centuries), draw.randrange(LOWEST + 1, 99)
        right = tuple(text for text, years in answers[century].items() if min(years) > year)
        wrong = tuple(text for text, years in answers[century].items() if max(years) <= year)
        if right and wrong:
            prompt, other = (TEMPLATE.format(noun=noun, century=century, year=each) for each in (year, LOWEST))
            yield Example(prompt, right, wrong, other)


def next_tokens(tokenizer: PreTrainedTokenizerBase, century: int) -> dict[str, list[int]]:
    """What can come after the century as one token, and the last two digits of the years that begin with it."""
    start = TEMPLATE.format(noun=NOUNS[0], century=century, year=50)
    before = tokens_of(tokenizer, [start])[0]
    found: dict[str, list[int]] = {}
    for year, tokens in enumerate(tokens_of(tokenizer, [f"{start}{year:02d}" for year in range(100)])):
        if tokens[: len(before)] == before:
            characters = 2 if len(tokens) == len(before) + 1 else 1
            found.setdefault(f"{year:02d}"[:characters], []).append(year)
    return found
