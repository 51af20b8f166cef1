"""The grid of a sweep: which settings vary, and every combination of their values. Imports no large library."""

import itertools
import math
from collections.abc import Iterable

from circuit_breaking.errors import UserError

MOST_VALUES = 10_000  # most values of a range and most jobs of a sweep: a typing error should not start a million


def parse_grid(words: Iterable[str]) -> dict[str, list[str]]:
    """`alpha=0.1,0.2` is a list and `seed=0:5` or `seed=0:10:2` a range without its end; values by setting.

    Raises `UserError` for a word that is neither, and for a setting that is given twice.
    """
    grid: dict[str, list[str]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().removeprefix("--").replace("_", "-")
        if not equals or not name or not text:
            raise UserError(f"{word!r} is not a setting with values. Write alpha=0.1,0.2 or seed=0:5.")
        if name in grid:
            raise UserError(f"the setting {name} is given twice. Put all its values into one list.")
        grid[name] = _range(word, text) if ":" in text else [value.strip() for value in text.split(",")]
        if not all(grid[name]):
            raise UserError(f"{word!r} has an empty value.")
    return grid


def _range(word: str, text: str) -> list[str]:
    try:
        numbers = [int(part) for part in text.split(":")]
        values = range(*numbers)
        count = len(values)
    except OverflowError:
        raise UserError(f"{word!r} holds more values than the {MOST_VALUES:,} that are possible.") from None
    except (TypeError, ValueError):
        raise UserError(f"{word!r} is not a range of whole numbers. Write seed=0:5 or seed=0:10:2.") from None
    if not 0 < count <= MOST_VALUES or len(numbers) < 2:
        raise UserError(f"{word!r} holds {count} values; 1 to {MOST_VALUES:,} are possible.")
    return [str(value) for value in values]


def combinations(grid: dict[str, list[str]]) -> list[dict[str, str]]:
    """Every combination of the values, the last setting changing fastest. `UserError` if there are too many."""
    count = math.prod(len(values) for values in grid.values())
    if count > MOST_VALUES:
        raise UserError(f"the grid has {count:,} jobs; at most {MOST_VALUES:,} are possible. Give fewer values.")
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
