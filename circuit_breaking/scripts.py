"""What scripts share: settings left open, files of a model, training into a run folder (layer 3)."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from circuit_breaking.cli import UserError
from circuit_breaking.models import TINY
from circuit_breaking.tasks.owt import SHIPPED
from circuit_breaking.training import MaskResult, MaskSettings, train_mask

T = TypeVar("T")


def fill_in(settings: T, *sources: Mapping[str, Any]) -> T:
    """Settings with each None replaced by the first source that has a value of that name; paths become `Path`s."""
    found = {}
    for field in dataclasses.fields(settings):
        if getattr(settings, field.name) is None:
            value = next((s[field.name] for s in sources if s.get(field.name) is not None), None)
            found[field.name] = Path(value) if value is not None and "Path" in str(field.type) else value
    return dataclasses.replace(settings, **found)


def check_counts(settings: Any, *names: str) -> None:
    """Raise a `UserError` for a setting of these names that is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise UserError(f"{name} is {getattr(settings, name)}; give 1 or more.")


def files_of(model: str) -> list[Path]:
    """Files with the weights of a model that is a folder or a file here; none for a hub's name."""
    path = TINY if model == SHIPPED else Path(model).expanduser()
    return [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.gguf")])


def train_into(
    folder: Path,
    model: Any,
    break_task: Any,
    keep_task: Any,
    settings: MaskSettings,
    allowed: Tensor | None = None,
) -> MaskResult:
    """`train_mask`, each step's row written to `metrics.jsonl` of a run folder as it comes."""
    path = folder / "metrics.jsonl"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as metrics:
            return train_mask(
                model,
                break_task,
                keep_task,
                settings,
                allowed,
                on_step=lambda row: print(json.dumps(row), file=metrics, flush=True),
            )
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}.") from error
