"""Factual recall (as in Meng et al. 2022): the capital or the language of a country.

    The capital of France is the city of -> Paris

The wrong answer is that of another country, and the counterfactual asks about that country.
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from circuit_breaking.errors import UserError
from circuit_breaking.tasks.prompts import Example, tokens_of
from circuit_breaking.tasks.registry import single_words

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Greece": "Athens", "Austria": "Vienna", "Ireland": "Dublin", "Poland": "Warsaw", "Russia": "Moscow",
    "Sweden": "Stockholm", "Norway": "Oslo", "Denmark": "Copenhagen", "Finland": "Helsinki", "Hungary": "Budapest",
    "Belgium": "Brussels", "England": "London", "Scotland": "Edinburgh", "Ukraine": "Kiev", "Turkey": "Ankara",
    "Egypt": "Cairo", "Iraq": "Baghdad", "Iran": "Tehran", "Syria": "Damascus", "Japan": "Tokyo", "China": "Beijing",
    "Thailand": "Bangkok", "Cuba": "Havana", "Peru": "Lima", "Chile": "Santiago", "Kenya": "Nairobi",
    "Afghanistan": "Kabul", "Qatar": "Doha", "Taiwan": "Taipei", "Venezuela": "Caracas", "Canada": "Ottawa",
    "Pakistan": "Islamabad", "Romania": "Bucharest", "Lebanon": "Beirut", "Libya": "Tripoli",
}  # fmt: skip
LANGUAGES = {
    "France": "French", "Germany": "German", "Italy": "Italian", "Spain": "Spanish", "Portugal": "Portuguese",
    "Greece": "Greek", "Austria": "German", "Poland": "Polish", "Russia": "Russian", "Sweden": "Swedish",
    "Norway": "Norwegian", "Denmark": "Danish", "Finland": "Finnish", "Hungary": "Hungarian", "England": "English",
    "Ukraine": "Ukrainian", "Turkey": "Turkish", "Egypt": "Arabic", "Iraq": "Arabic", "Iran": "Persian",
    "Japan": "Japanese", "China": "Chinese", "Thailand": "Thai", "Cuba": "Spanish", "Peru": "Spanish",
    "Chile": "Spanish", "Brazil": "Portuguese", "Mexico": "Spanish", "Argentina": "Spanish", "Australia": "English",
    "Syria": "Arabic", "Venezuela": "Spanish", "Romania": "Romanian", "Israel": "Hebrew", "Vietnam": "Vietnamese",
}  # fmt: skip
RELATIONS = (  # facts, and prompts that ask for them
    (CAPITALS, ("The capital of {} is the city of", "The government of {} has its seat in the capital,",
                "The capital city of {} is called", "We flew to the capital of {}, which is")),
    (LANGUAGES, ("The official language of {} is", "Most people in {} speak",
                 "The newspapers of {} are written in", "She grew up in {}, so her first language is")),
)  # fmt: skip


def generate(tokenizer: PreTrainedTokenizerBase, draw: random.Random, name: str) -> Iterator[Example]:
    """Random facts. A counterfactual asks about a country with as many tokens and another answer."""
    relations = []
    for facts, templates in RELATIONS:
        known = set(single_words(tokenizer, list(facts.values()), 0, name))
        lengths = dict(zip(facts, map(len, tokens_of(tokenizer, [f"a {country}" for country in facts])), strict=True))
        pairs = [
            (one, other)
            for one in facts for other in facts
            if known.issuperset((facts[one], facts[other])) and lengths[one] == lengths[other]
            and facts[one] != facts[other]
        ]  # fmt: skip
        if pairs:
            relations.append((facts, templates, pairs))
    if not relations:
        raise UserError(f"this tokenizer has no single tokens for the answers of the task {name}. Use another task.")
    while True:
        facts, templates, pairs = draw.choice(relations)
        template, (one, other) = draw.choice(templates), draw.choice(pairs)
        yield Example(template.format(one), (f" {facts[one]}",), (f" {facts[other]}",), template.format(other))
