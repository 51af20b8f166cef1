"""Send the rows of `metrics.jsonl` to a tracking tool as well, through the trackers of accelerate."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from circuit_breaking.errors import UserError
from circuit_breaking.runs.distributed import is_main

PROJECT = "circuit-breaking"  # the project that runs belong to, in tools that have projects


@contextmanager
def tracked(
    log_with: str, folder: Path, config: Mapping[str, Any], start: int = 0
) -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """A function that sends the row of a step to a tracking tool, as long as the block lasts.

    TensorBoard's files go to the folder `tensorboard` in the run folder. The other tools get the folder's name as the
    name of the run, and the settings.

    Args:
        log_with: `"tensorboard"`, `"wandb"`, `"trackio"`, or another tool that accelerate has a tracker for; `"none"`.
        folder: the run folder.
        config: the settings of the run.
        start: the first step, above 0 for a run that continues. TensorBoard forgets the steps from there on.

    Yields:
        The function. None for `"none"`, and in all processes but the main one.

    Raises:
        UserError: accelerate or the tool is not installed.
    """
    if log_with == "none" or not is_main():
        yield None
        return
    tracker = _tracker(log_with, folder, start)
    try:
        if not tracker.requires_logging_directory:  # TensorBoard would make a second run of the settings
            plain = {
                key: value if isinstance(value, bool | int | float | str) else str(value)
                for key, value in config.items()
            }
            tracker.store_init_configuration(plain)
        yield lambda row: tracker.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])
    finally:
        tracker.finish()


def _tracker(log_with: str, folder: Path, start: int) -> Any:
    """A tracker that has started."""
    try:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    except ImportError as error:
        raise UserError(
            f"log_with is {log_with}, which needs accelerate: pip install '.[tracking]'. Or leave log_with unset."
        ) from error
    if find_spec(log_with) is None:
        raise UserError(
            f"log_with is {log_with}, and the package {log_with} is not installed: pip install {log_with}. Or leave "
            "log_with unset."
        )
    PartialState()  # which the trackers' log messages need
    kind = LOGGER_TYPE_TO_CLASS[log_with]
    if kind.requires_logging_directory:
        tracker = kind(log_with, logging_dir=folder, purge_step=start)
    else:
        tracker = kind(PROJECT, name=folder.name)
    tracker.main_process_only = False  # only the main process has one
    tracker.start()
    return tracker
