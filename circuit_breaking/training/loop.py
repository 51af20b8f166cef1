"""The step loop of everything that is trained: a progress bar, stop signals, checkpoints and a callback for rows."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from circuit_breaking.runs.checkpoints import Checkpoints
from circuit_breaking.runs.distributed import is_main
from circuit_breaking.runs.progress import progress_bar
from circuit_breaking.runs.signals import stop_signals

Row = dict[str, Any]  # what is recorded of a step; JSON-able


def run_steps(
    step: Callable[[int], Row | None],
    total: int,
    *,
    label: str,
    unit: str = "step",
    done: int = 0,
    progress: bool = True,
    describe: Callable[[], str | None] = lambda: None,
    on_step: Callable[[Row], None] | None = None,
    seconds_before: float | None = None,
    checkpoints: Checkpoints | None = None,
    state: Callable[[], dict[str, Tensor]] = dict,
    values: Callable[[], dict[str, Any]] = dict,
    is_over: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Run steps `done` to `total - 1`, and save a checkpoint when one is due.

    Args:
        step: runs the step of a number, from 0, and returns its row, or None if nothing is recorded of it.
        total: number of steps of the whole run.
        label, unit: what the progress bar calls the run and one of its steps.
        done: steps that were done before, in a run that continues.
        progress: show a progress bar, in the main process.
        describe: text at the end of the bar, read after every step; None leaves the text as it is.
        on_step: called with each row.
        seconds_before: seconds that the run took before; rows and checkpoints then hold their `seconds`. None: they
            are not timed.
        checkpoints: where the state is saved. SIGTERM and SIGUSR1 then end the run after the current step.
        state: returns the tensors that the next steps depend on.
        values: returns everything else that they depend on, JSON-able.
        is_over: whether the run ends early, read after every step.

    Returns:
        the rows of these steps, each with its number as `step`.

    Raises:
        Stopped: a signal ended the run; its state is saved.
    """
    rows: list[Row] = []
    start = time.perf_counter() - (seconds_before or 0.0)
    with (
        stop_signals() if checkpoints is not None else nullcontext(()) as signals,
        progress_bar(shown=progress and is_main(), total=total, initial=done, desc=label, unit=unit) as bar,
    ):
        for number in range(done, total):
            row, extra = step(number), {}
            if seconds_before is not None:
                extra["seconds"] = round(time.perf_counter() - start, 3)
            if row is not None:
                row = {"step": number, **row, **extra}
                rows.append(row)
                if on_step is not None:
                    on_step(row)
            text = describe()
            if text is not None:
                bar.set_postfix_str(text)
            bar.update()
            last = number + 1 == total or is_over()
            if checkpoints is not None:
                checkpoints.after(number + 1, state, {**values(), **extra}, signals, last)
            if last:
                break
    return rows
