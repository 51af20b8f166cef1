"""Docstring arguments (Heimersheim and Janiak 2023): a docstring names the arguments of a function in their order.

    def get(self, load, size, files, last):
        '''oil column piece

        :param load: crime population
        :param size: unit dark
        :param -> files

The wrong answer is the argument after the right one. In the counterfactual, the two have changed places in the
function's definition.
"""

import random
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from circuit_breaking.tasks.induction import WORDS as COMMON
from circuit_breaking.tasks.prompts import Example
from circuit_breaking.tasks.registry import single_words

ARGUMENTS = [
    "load", "size", "files", "last", "name", "value", "key", "data", "text", "line", "item", "list", "model",
    "index", "count", "path", "mode", "user", "date", "time", "type", "test", "code", "page", "role", "option",
    "action", "results", "source", "target", "input", "output", "table", "event", "error", "state", "order",
    "level",
]  # fmt: skip
METHODS = ["get", "port", "update", "check", "send", "write", "run", "find", "add", "set"]
TEMPLATE = '''def {method}(self, {arguments}):
    """{about}

    :param {first}: {one}
    :param {second}: {two}
    :param'''


def generate(tokenizer: PreTrainedTokenizerBase, draw: random.Random, name: str) -> Iterator[Example]:
    """Random functions with four arguments, of which two are described."""
    arguments, words = single_words(tokenizer, ARGUMENTS, 4, name), single_words(tokenizer, COMMON, 7, name)
    while True:
        first, second, right, wrong = draw.sample(arguments, 4)
        text = draw.sample([word for word in words if word not in (first, second, right, wrong)], 7)
        method = draw.choice(METHODS)
        prompt, other = (
            TEMPLATE.format(
                method=method, arguments=", ".join([first, second, *last]), about=" ".join(text[:3]),
                first=first, one=" ".join(text[3:5]), second=second, two=" ".join(text[5:]),
            )
            for last in ([right, wrong], [wrong, right])
        )  # fmt: skip
        yield Example(prompt, (f" {right}",), (f" {wrong}",), other)
