"""Sums and differences of two numbers of two digits, after two worked examples (as in MIB's arithmetic task).

    12+35=47
    61+20=81
    23+45= -> 68

Where a tokenizer writes the result as several tokens, its first digit is asked for. In the counterfactual, both numbers
are others, and so is the answer, which is the wrong one.
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from circuit_breaking.tasks.prompts import Example, tokens_of

SIGNS = {"addition": "+", "subtraction": "-"}  # by name of the task
SHOTS = 2  # worked examples


def generate(tokenizer: PreTrainedTokenizerBase, draw: random.Random, name: str) -> Iterator[Example]:
    """Random problems. Differences are positive."""
    sign = SIGNS[name]
    while True:
        problems = [problem(draw, sign) for _ in range(SHOTS + 2)]
        shots = "".join(f"{text}{result}\n" for text, result in problems[:SHOTS])
        prompts = [shots + text for text, _ in problems[SHOTS:]]
        answers = [
            first_token(tokenizer, prompt, result)
            for prompt, (_, result) in zip(prompts, problems[SHOTS:], strict=True)
        ]
        if answers[0] != answers[1]:
            yield Example(prompts[0], (answers[0],), (answers[1],), prompts[1])


def problem(draw: random.Random, sign: str) -> tuple[str, str]:
    """A problem of two numbers of two digits up to the equals sign, and its result, which is not 0."""
    one, other = draw.randrange(10, 100), draw.randrange(10, 100)
    if sign == "-":
        one, other = max(one, other), min(one, other)
        if one == other:
            one, other = (one + 1, other) if one < 99 else (one, other - 1)
    return f"{one}{sign}{other}=", str(one + other if sign == "+" else one - other)


def first_token(tokenizer: PreTrainedTokenizerBase, prompt: str, result: str) -> str:
    """The result if it is one token after the prompt, else its first digit."""
    before, whole = (len(tokens) for tokens in tokens_of(tokenizer, [prompt, prompt + result]))
    return result if whole == before + 1 else result[0]
