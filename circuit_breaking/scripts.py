"""What scripts share: settings left open, files of a model, training into a run folder (layer 3)."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from torch import Tensor

from circuit_breaking.checkpoints import Checkpoints
from circuit_breaking.cli import UserError
from circuit_breaking.files import end_at_whole_line, locked, read_jsonl, write_jsonl
from circuit_breaking.models import TINY
from circuit_breaking.tasks.owt import SHIPPED
from circuit_breaking.training import MaskResult, MaskSettings, train_mask

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
    run: Mapping[str, Any] | None = None,
    resume: bool = True,
    every: int = 50,
) -> MaskResult:
    """`train_mask`, each step's row written to `metrics.jsonl` of a run folder as it comes.

    Args:
        folder: the run folder; held against other processes while training.
        model, break_task, keep_task, settings, allowed: as for `train_mask`.
        run: the run's provenance. With it, checkpoints are kept in the folder, and a run that was interrupted goes on
            from there if settings, data and code are the same.
        resume: go on from a checkpoint, if there is one.
        every: steps between checkpoints.
    """
    path = folder / "metrics.jsonl"
    checkpoints = None if run is None else Checkpoints(folder, _identity(run), every)
    with locked(folder):
        saved = checkpoints.load() if checkpoints is not None and resume else None
        rows = read_jsonl(path)[: saved.step] if saved is not None and path.is_file() else []
        if saved is not None and [row.get("step") for row in rows] != list(range(saved.step)):
            print(f"{path} lacks steps before the checkpoint: starting anew.", file=sys.stderr)
            saved, rows = None, []
        if saved is not None:
            print(f"going on from step {saved.step}", file=sys.stderr)
        write_jsonl(path, rows)  # without what came after the checkpoint
        try:
            with path.open("a", encoding="utf-8") as metrics:
                return train_mask(
                    model,
                    break_task,
                    keep_task,
                    settings,
                    allowed,
                    on_step=lambda row: print(json.dumps(row), file=metrics, flush=True),
                    checkpoints=checkpoints,
                    resume_from=saved,
                )
        except OSError as error:
            end_at_whole_line(path)
            raise UserError(f"cannot write {path}: {error.strerror}.") from error


def _identity(run: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's provenance must be the same for it to go on: all but where results go."""
    elsewhere = ("resume", "checkpoint_every", "run", "out")
    kept = {name: value for name, value in run["settings"].items() if name not in elsewhere}
    return {**run, "settings": kept}
