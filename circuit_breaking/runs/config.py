"""Settings that are left open (None) and resolved from a record or from defaults, and checks of settings."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from circuit_breaking.errors import UserError

T = TypeVar("T")


def resolve_defaults(settings: T, *sources: Mapping[str, Any]) -> T:
    """Replace each setting that is None by the first value that a source holds under its name.

    Args:
        settings: a dataclass. A string that is found for a `Path` becomes a `Path`.
        sources: mappings from names of settings to values, in the order in which they are asked.

    Raises:
        UserError: a value has another type than the setting.
    """
    found, types = {}, get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        if getattr(settings, field.name) is None:
            value = next((s[field.name] for s in sources if s.get(field.name) is not None), None)
            kinds = get_args(types[field.name]) or (types[field.name],)
            value = Path(value) if isinstance(value, str) and Path in kinds and str not in kinds else value
            kinds += (int,) if float in kinds else ()
            # sources may be files that were edited by hand; a `Literal` is checked where it is used
            if value is not None and all(isinstance(kind, type) for kind in kinds) and not isinstance(value, kinds):
                raise UserError(f"the record of the run gives {field.name} as {value!r}. Give it in the settings.")
            found[field.name] = value
    return dataclasses.replace(settings, **found)


def option(name: str) -> str:
    """A setting as it is given on the command line: `--max-edges` for `max_edges`."""
    return f"--{name.replace('_', '-')}"


def check_counts(settings: Any, *names: str) -> None:
    """Raise a `UserError` for a setting of these names that is below 1."""
    _check(settings, names, lambda value: value >= 1, "give 1 or more")


def check_positive(settings: Any, *names: str) -> None:
    """Raise a `UserError` for a setting of these names that is not above 0."""
    _check(settings, names, lambda value: value > 0, "it must be above 0")


def check_not_negative(settings: Any, *names: str) -> None:
    """Raise a `UserError` for a setting of these names that is below 0."""
    _check(settings, names, lambda value: value >= 0, "it cannot be negative")


def check_device(device: str) -> None:
    """Raise a `UserError` for the name of a device that torch cannot have, before torch is loaded."""
    if not re.fullmatch(r"auto|(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise UserError(f"device {device!r} is none of auto, cpu, cuda, cuda:<number> and mps.")


def check_ablate_from(settings: Any) -> None:
    """Raise a `UserError` if `ablate_from` is negative, or so high that no cut acts in texts of `length` tokens."""
    check_not_negative(settings, "ablate_from")
    if settings.ablate_from >= settings.length > 1:  # texts of one token are refused for another reason
        raise UserError(
            f"ablate_from is {settings.ablate_from}, so no cut acts in the {settings.length} tokens of a text that are "
            "used. Give a lower one, or a higher length."
        )


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise a `UserError` for a value that is not one of the choices; `name` says what it is a choice of."""
    choices = tuple(choices)
    if value not in choices:
        raise UserError(f"{name} {value!r} is not one of {', '.join(choices)}.")


def _check(settings: Any, names: Sequence[str], is_right: Callable[[Any], bool], advice: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not is_right(value):  # which NaN never is
            raise UserError(f"{name} is {value}; {advice}.")
