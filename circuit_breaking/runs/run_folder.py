"""Run folders: held by one run at a time, resumed from checkpoints, recognized by what they were made from."""

import dataclasses
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
from circuit_breaking.runs.locks import locked
from circuit_breaking.runs.tracking import tracked

METRICS = "metrics.jsonl"  # of a run folder: one row for each step


def hold(folder: Path) -> AbstractContextManager[None]:
    """Lock a run folder against other runs (`locked`) while a block lasts; one process of several does so."""
    return locked(folder) if is_main() else nullcontext()


@contextmanager
def recorded(
    folder: Path,
    run: Mapping[str, Any] | None = None,
    resume: bool = True,
    every: int = 50,
    lock: bool = True,
    log_with: str = "none",
) -> Iterator[dict[str, Any]]:
    """The arguments `on_step`, `checkpoints` and `resume_from` of a training loop that writes into a run folder.

    `on_step` appends the row of a step to `metrics.jsonl`.

    Args:
        folder: the run folder.
        run: the run's provenance. With it, checkpoints are kept in the folder, from which an interrupted run is
            resumed if settings, data and code are the same.
        resume: resume from a checkpoint, if there is one.
        every: steps between checkpoints.
        lock: lock the folder against other runs while the block lasts (`hold`); False if the caller has done so.
        log_with: the tracking tool that gets the rows as well (`tracking.tracked`).
    """
    path = folder / METRICS
    checkpoints = None if run is None else Checkpoints(folder, resume_key(run), every)
    with hold(folder) if lock else nullcontext():
        saved = _saved(path, checkpoints if resume else None)
        settings, first = (run or {}).get("settings") or {}, 0 if saved is None else saved.step
        try:
            with (
                path.open("a", encoding="utf-8") if is_main() else nullcontext() as metrics,
                tracked(log_with, folder, settings, first) as track,
            ):

                def on_step(row: Mapping[str, Any]) -> None:
                    print(json.dumps(row), file=metrics, flush=True)
                    if track is not None:
                        track(row)

                yield {
                    "on_step": metrics and on_step,
                    "checkpoints": checkpoints,
                    "resume_from": saved,
                }
        except OSError as error:
            end_at_whole_line(path)
            raise UserError(f"cannot write {path}: {error.strerror}.") from error


def _saved(path: Path, checkpoints: Checkpoints | None) -> Saved | None:
    """The checkpoint to resume from, the same in all processes. The main one removes the rows of `metrics.jsonl` after
    that checkpoint."""
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
        print(f"{path} lacks steps before the checkpoint: starting from the beginning.", file=sys.stderr)
        saved, rows = None, []
    if saved is not None:
        print(f"resuming from step {saved.step}", file=sys.stderr)
    write_jsonl(path, rows)  # without the rows after the checkpoint
    return saved


@dataclasses.dataclass
class CheckpointedParts:
    """Checkpoints of a run that trains several times, a folder for each training, until the whole run is done.

    A training that is finished has saved its end, so that a resumed run continues after it.

    Attributes:
        folder: where the folders of the trainings are. The caller has locked the run folder (`locked`).
        run, resume, every: as for `recorded`.
        ignored: settings that make no difference to a training.
    """

    folder: Path
    run: Mapping[str, Any]
    resume: bool = True
    every: int = 50
    ignored: tuple[str, ...] = ()

    def open(self, name: str, **depends_on: Any) -> dict[str, Any]:
        """The arguments `checkpoints` and `resume_from` of one training.

        Args:
            name: name of the training within the run.
            depends_on: JSON-able values that it depends on, besides the run's provenance.
        """
        about = {**resume_key(self.run, *self.ignored), "part": name, **depends_on}
        checkpoints = Checkpoints(self.folder / re.sub(r"[^\w.+-]+", "_", name), about, self.every)
        saved = checkpoints.load() if self.resume else None
        if saved is not None:
            print(f"{name}: resuming from step {saved.step}", file=sys.stderr)
        return {"checkpoints": checkpoints, "resume_from": saved}

    def remove(self) -> None:
        """Delete all checkpoints, once the run's results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def resume_key(run: Mapping[str, Any], *ignored: str) -> dict[str, Any]:
    """What must be the same for a run to be resumed.

    Args:
        run: the run's provenance.
        ignored: settings that make no difference, besides those that say where results go and how they are resumed.

    Returns:
        The provenance without those settings and the git commit, as it is read back from JSON. The hash of the source
        files stays (`code.code_hash`): it alone says whether the code is the same.
    """
    elsewhere = {"resume", "checkpoint_every", "run", "out", "log_with", *ignored}
    kept = {name: value for name, value in run["settings"].items() if name not in elsewhere}
    about = {name: value for name, value in run.items() if name != "git_commit"}
    return json.loads(json.dumps({**about, "settings": kept}, default=plain))


def is_up_to_date(path: Path, made_from: str, read: Callable[[Path], Any]) -> bool:
    """Whether a result is there that was made from the same settings, data and code.

    Args:
        path: file of the result.
        made_from: `records.fingerprint` of what it depends on.
        read: gives the file's record, whose `made_from` is compared. A file that it refuses is not up to date, and
            stderr says why.
    """
    try:
        return path.is_file() and read(path).made_from == made_from
    except UserError as error:
        print(f"made again: {error}", file=sys.stderr)
        return False
