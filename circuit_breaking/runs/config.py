"""Settings left open: filled in from a record or from defaults, and checked."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from circuit_breaking.errors import UserError

T = TypeVar("T")


def fill_in(settings: T, *sources: Mapping[str, Any]) -> T:
    """Settings with each None replaced by the first source that has a value of that name; paths become `Path`s.

    A value of another type than the setting's is a `UserError`.
    """
    found, types = {}, get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        if getattr(settings, field.name) is None:
            value = next((s[field.name] for s in sources if s.get(field.name) is not None), None)
            value = Path(value) if isinstance(value, str) and "Path" in str(field.type) else value
            kinds = get_args(types[field.name]) or (types[field.name],)
            kinds += (int,) if float in kinds else ()
            # a record that was read may say anything; a choice of words is checked where it is used
            if value is not None and all(isinstance(kind, type) for kind in kinds) and not isinstance(value, kinds):
                raise UserError(f"the record of the run gives {field.name} as {value!r}. Give it in the settings.")
            found[field.name] = value
    return dataclasses.replace(settings, **found)


def check_counts(settings: Any, *names: str) -> None:
    """Raise a `UserError` for a setting of these names that is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}; give 1 or more.")
