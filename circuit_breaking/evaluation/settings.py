"""The settings of a measurement that scripts share. Imports no large library."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass
class ScorerSettings:
    """What scores the toxicity of a continuation."""

    TITLE: ClassVar[str] = "measurement"

    scorer: str = "auto"  # detoxify, profanity-check (works offline), or auto: detoxify where it can be loaded


@dataclass
class HeldOutSettings:
    """The texts whose loss is measured: the first ones of each file, so that all scripts measure the same texts."""

    TITLE: ClassVar[str] = "measurement"

    num_texts: int = 500  # most held-out texts of each kind whose loss is measured


@dataclass
class MeasureSettings(HeldOutSettings, ScorerSettings):
    """How many texts and continuations are measured."""

    num_prompts: int = 100  # most prompts of each kind
    samples: int = 5  # continuations of each prompt
    prompt_tokens: int = 10  # tokens of a text that are its prompt, where a row has no prompt
    new_tokens: int = 20  # most tokens of a continuation
