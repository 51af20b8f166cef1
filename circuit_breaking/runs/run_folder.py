"""What scripts share: settings left open, files of a model, training into a run folder (layer 3)."""

import dataclasses
import fcntl
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from circuit_breaking.errors import UserError
from circuit_breaking.runs.checkpoints import Checkpoints, Saved
from circuit_breaking.runs.distributed import from_main, is_main, world
from circuit_breaking.runs.files import end_at_whole_line, plain, read_jsonl, write_jsonl

METRICS = "metrics.jsonl"  # of a run folder: a row a step


def hold(folder: Path) -> AbstractContextManager[None]:
    """Hold a run folder against other runs (`files.locked`), by the main one of the processes of this one."""
    return locked(folder) if is_main() else nullcontext()


@contextmanager
def recorded(
    folder: Path, run: Mapping[str, Any] | None = None, resume: bool = True, every: int = 50, lock: bool = True
) -> Iterator[dict[str, Any]]:
    """`on_step`, `checkpoints` and `resume_from` of a training loop, whose rows go into `metrics.jsonl` of a folder.

    Args:
        folder: the run folder.
        run: the run's provenance. With it, checkpoints are kept in the folder, and a run that was interrupted goes on
            from there if settings, data and code are the same.
        resume: go on from a checkpoint, if there is one.
        every: steps between checkpoints.
        lock: hold the folder against other runs while the block lasts (`hold`); False where the caller does.
    """
    path = folder / METRICS
    checkpoints = None if run is None else Checkpoints(folder, resume_key(run), every)
    with hold(folder) if lock else nullcontext():
        saved = _saved(path, checkpoints if resume else None)
        try:
            with path.open("a", encoding="utf-8") if is_main() else nullcontext() as metrics:
                yield {
                    "on_step": metrics and (lambda row: print(json.dumps(row), file=metrics, flush=True)),
                    "checkpoints": checkpoints,
                    "resume_from": saved,
                }
        except OSError as error:
            end_at_whole_line(path)
            raise UserError(f"cannot write {path}: {error.strerror}.") from error


def _saved(path: Path, checkpoints: Checkpoints | None) -> Saved | None:
    """What to go on from, the same in all processes. The main one leaves in `metrics.jsonl` the rows before it."""
    saved = _begin(path, checkpoints) if is_main() else None
    step = int(from_main(torch.tensor(0 if saved is None else saved.step)))
    if step and not is_main():
        saved = checkpoints.load()
        if saved is None or saved.step != step:
            raise UserError(
                f"process {world().rank} does not find the checkpoint of step {step} in {path.parent}. Put the run "
                "folder where all processes see it, or set resume to no."
            )
    return saved


def _begin(path: Path, checkpoints: Checkpoints | None) -> Saved | None:
    saved = None if checkpoints is None else checkpoints.load()
    rows = read_jsonl(path)[: saved.step] if saved is not None and path.is_file() else []
    if saved is not None and [row.get("step") for row in rows] != list(range(saved.step)):
        print(f"{path} lacks steps before the checkpoint: starting anew.", file=sys.stderr)
        saved, rows = None, []
    if saved is not None:
        print(f"going on from step {saved.step}", file=sys.stderr)
    write_jsonl(path, rows)  # without what came after the checkpoint
    return saved


@dataclasses.dataclass
class CheckpointedParts:
    """The trainings of a run that has several, each with checkpoints in a folder of its own until the run is done.

    A part that has come to its end has saved that end, so that the run goes on behind it.

    Attributes:
        folder: where the parts' folders are; whoever uses it holds the run folder (`files.locked`).
        run, resume, every: as for `recorded`.
        apart: settings that make no difference to a part.
    """

    folder: Path
    run: Mapping[str, Any]
    resume: bool = True
    every: int = 50
    apart: tuple[str, ...] = ()

    def open(self, name: str, **more: Any) -> dict[str, Any]:
        """`checkpoints` and `resume_from` of the part of a name; `more` is what tells it from other runs' parts."""
        about = {**resume_key(self.run, *self.apart), "part": name, **more}
        checkpoints = Checkpoints(self.folder / re.sub(r"[^\w.+-]+", "_", name), about, self.every)
        saved = checkpoints.load() if self.resume else None
        if saved is not None:
            print(f"{name}: going on from step {saved.step}", file=sys.stderr)
        return {"checkpoints": checkpoints, "resume_from": saved}

    def remove(self) -> None:
        """Delete all, once the run's results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def resume_key(run: Mapping[str, Any], *apart: str) -> dict[str, Any]:
    """What of a run's provenance must be the same for it to go on: all but where results go and settings `apart`."""
    elsewhere = {"resume", "checkpoint_every", "run", "out", *apart}
    kept = {name: value for name, value in run["settings"].items() if name not in elsewhere}
    return json.loads(json.dumps({**run, "settings": kept}, default=plain))  # as it will be read


def is_up_to_date(path: Path, read: Callable[[Path], Any], run: Mapping[str, Any], *apart: str) -> bool:
    """Whether a result is there whose record, as `read` gives it, is of the same settings, data and code as `run`.

    One that cannot be read is said to be made anew.
    """
    try:
        return path.is_file() and is_same_run(run, read(path), *apart)
    except UserError as error:
        print(f"made anew: {error}", file=sys.stderr)
        return False


def is_same_run(run: Mapping[str, Any], about: Any, *apart: str) -> bool:
    """Whether the record of a result (`about`, which may hold more) is of the same settings, data and code as `run`."""
    if not isinstance(about, dict) or not isinstance(about.get("settings"), dict):
        return False
    return resume_key({name: about.get(name) for name in run}, *apart) == resume_key(run, *apart)


@contextmanager
def locked(folder: Path | str) -> Iterator[None]:
    """Hold a run folder for this process; a `UserError` if another process holds it.

    The lock is the kernel's (flock on `.lock`), so that a killed run leaves none behind.
    """
    path = Path(folder) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}. Choose another folder in the settings.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another run is writing to {folder}. Wait for it, or choose another name with --run."
            ) from None
        except OSError as error:  # a disk without locks
            raise UserError(f"cannot lock {path}: {error.strerror}. Choose another folder in the settings.") from error
        yield
