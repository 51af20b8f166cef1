"""Signals that tell a run to stop: it ends its step and saves its state first."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from circuit_breaking.errors import UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # what SLURM sends before it takes a node away


class Stopped(UserError):
    """The run was told to stop and has saved its state."""

    exit_code = 75  # "try again later" (sysexits.h); slurm/job.sbatch queues the job again for this one alone


_received: list[int] | None = None  # of the block of `stop_signals` that is open, if one is


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is empty until SIGTERM or SIGUSR1 arrives, and then holds the signal.

    So that a step can end and its state be saved first. A block in another has the list of the outer one: a signal
    that comes between two trainings of a run stops the second. Outside the main thread signals cannot be caught, and
    the list stays empty.
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
