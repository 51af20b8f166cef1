"""Values of a JSON file, checked as they are read.

    report = CheckedJson(read_json(path), path, "Make it with toxicity/evaluation.py.")
    loss = report["models"]["original"]["loss"].number()

A value that is missing or of another type raises a `UserError` that names the file and the position in it. Code that
draws or prints then works on plain values: whatever it raises is a defect of ours and keeps its traceback.
"""

import math
from pathlib import Path
from typing import Any, NoReturn

from circuit_breaking.errors import UserError

NAMES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}


class CheckedJson:
    """A value of a JSON file, with its position in the file.

    Args:
        value: the value, as `read_json` returns it.
        path: the file it comes from.
        hint: what to do where the file is not as expected; ends each error message.
        at: position of the value in the file, such as `models.original`.
    """

    def __init__(self, value: Any, path: Path, hint: str = "", at: str = ""):
        self.value, self.path, self.hint, self.at = value, path, hint, at

    def __getitem__(self, key: str) -> "CheckedJson":
        """The field of an object; it must be there."""
        if key not in self._of(dict):
            raise UserError(f"{self.path} lacks {self._position(key)}. {self.hint}".rstrip())
        return self._inner(key, self.value[key])

    def get(self, key: str) -> "CheckedJson | None":
        """The field of an object, or None where it is missing or null."""
        found = self._of(dict).get(key)
        return None if found is None else self._inner(key, found)

    def items(self) -> "list[tuple[str, CheckedJson]]":
        """Name and value of each field of an object."""
        return [(key, self._inner(key, value)) for key, value in self._of(dict).items()]

    def rows(self) -> "list[CheckedJson]":
        """The values of a list."""
        return [self._inner(str(number), value) for number, value in enumerate(self._of(list))]

    def text(self) -> str:
        return self._of(str)

    def integer(self) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self.refuse("an integer")
        return self.value

    def number(self) -> float:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            self.refuse("a number")
        return float(self.value)

    def number_or_nan(self) -> float:
        """A number, or NaN for null, which result files hold where a figure was not finite."""
        return math.nan if self.value is None else self.number()

    def refuse(self, expected: str) -> NoReturn:
        """Raise a `UserError`: this value is not what is expected here."""
        kind = NAMES.get(type(self.value), "null")
        raise UserError(
            f"{self.path}: {self.at or 'its content'} is {kind} and should be {expected}. {self.hint}".rstrip()
        )

    def _of(self, kind: type) -> Any:
        if not isinstance(self.value, kind):
            self.refuse(NAMES[kind])
        return self.value

    def _position(self, key: str) -> str:
        return f"{self.at}.{key}" if self.at else key

    def _inner(self, key: str, value: Any) -> "CheckedJson":
        return CheckedJson(value, self.path, self.hint, self._position(key))
