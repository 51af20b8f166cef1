"""Signals that ask a run to stop: it completes its step and saves its state first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from circuit_breaking.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what SLURM sends before it takes a node away


class Stopped(UserError):
    """A signal asked the run to stop, and it has saved its state."""

    exit_code = 75  # "try again later" (sysexits.h); slurm/job.sbatch queues the job again for this code only


_received: list[int] | None = None  # the list of the outermost `stop_signals` block, if there is one


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that stays empty until SIGTERM or SIGUSR1 arrives, and then holds the signal's number.

    A training loop looks at it between steps. A block within another block shares the outer list, so a signal that
    arrives between two trainings of a run stops the second one. Python can catch signals in the main thread only; in
    other threads the list stays empty.
    """
    global _received
    if _received is not None:
        yield _received
        return
    received: list[int] = []
    before = {}
    try:
        for number in SIGNALS:
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
