"""Signals that ask a script to stop: it completes its step and saves its state first, if it keeps a state."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from circuit_breaking.errors import UserError
from circuit_breaking.runs.launcher import rank

# what SLURM sends before it takes a node away; Windows has no SIGUSR1
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# what reaches a script whose terminal is used or closed
TERMINAL_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name))


class Stopped(UserError):
    """A signal asked the run to stop, and it has saved its state."""

    exit_code = 75  # "try again later" (sysexits.h); slurm/job.sbatch queues the job again for it


_received: list[int] | None = None  # the list of the outermost `stop_signals` block, if there is one
_saved = False  # whether this process has saved a state


def end_on_signals() -> None:
    """From now on, SIGTERM and SIGUSR1 end the process with a sentence, except within a `stop_signals` block.

    For the time in which nothing can be saved: while libraries and the model are loaded, and in scripts that keep no
    checkpoints. The exit code is 75 if the process has saved a state before, else 128 plus the number of the signal, as
    shells say it of a process that a signal has ended.
    """
    for number in SIGNALS:
        signal.signal(number, _end)


def note_saved() -> None:
    """Note that this process has saved a state from which the same command continues."""
    global _saved
    _saved = True


def _end(number: int, frame: object) -> None:
    if rank() == 0:
        sentence = (
            f"stopped by {signal.Signals(number).name}. Run the same command again: it starts from the last checkpoint "
            "if the script keeps checkpoints, else from the beginning."
        )
        with suppress(OSError):  # a closed terminal
            os.write(2, f"{sentence}\n".encode())  # sys.stderr may be in the middle of a write
    raise SystemExit(Stopped.exit_code if _saved else 128 + number)


@contextmanager
def stop_signals(numbers: Sequence[int] = SIGNALS) -> Iterator[list[int]]:
    """A list that stays empty until SIGTERM or SIGUSR1 arrives, and then holds the signal's number.

    A training loop looks at it between steps. A block within another block shares the outer list, so a signal that
    arrives between two trainings of a run stops the second one. Python can catch signals in the main thread only; in
    other threads the list stays empty.

    Args:
        numbers: the signals, if they are others.
    """
    global _received
    if _received is not None:
        yield _received
        return
    received: list[int] = []
    before = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, lambda received_number, _: received.append(received_number))
    except ValueError:
        pass
    _received = received
    try:
        yield received
    finally:
        _received = None
        for number, handler in before.items():
            signal.signal(number, handler)
