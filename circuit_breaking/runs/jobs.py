"""The jobs of a sweep while they run: processes on this machine, or jobs of SLURM."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import submitit

GRACE = 60.0  # seconds in which a job that was asked to stop may save its state


class Job(Protocol):
    """A job that was started."""

    def done(self) -> bool:
        """Whether it has ended."""

    def result(self) -> dict[str, Any]:
        """Exit code and seconds of a job that has ended, and an error if it was lost."""

    def stop(self) -> None:
        """Ask it to save its state and to stop. Returns at once."""

    def kill(self) -> None:
        """End it without delay."""


def run_job(command: list[str], log: str) -> dict[str, Any]:
    """Run the command of one job, its output in the file `log`. Returns exit code and seconds, and never raises."""
    start = time.perf_counter()
    try:
        with Path(log).open("w", encoding="utf-8") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    except (OSError, ValueError) as error:  # ValueError: a NUL in a word
        return {"exit_code": 1, "seconds": 0.0, "error": str(error)}
    return {"exit_code": code, "seconds": round(time.perf_counter() - start, 2)}


class LocalJob:
    """A command that runs as a process of this machine. It has another session, so Ctrl-C reaches it only by `stop`.

    Args:
        command: the command.
        log: file for its output.
        minutes: its time limit. It is then asked to stop, and ended if it has not stopped `GRACE` seconds later.
    """

    def __init__(self, command: list[str], log: Path, minutes: float) -> None:
        self.started, self.asked, self.seconds = time.perf_counter(), 0.0, 60 * minutes
        self.process: subprocess.Popen | None = None
        self.error, self.ended = "", 0.0
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8") as file:
                self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        except (OSError, ValueError) as error:  # ValueError: a NUL in a word
            self.error = str(error)

    def done(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            self.ended = self.ended or time.perf_counter()
            return True
        now = time.perf_counter()
        if not self.asked and now - self.started > self.seconds:
            self.error = f"it ran longer than its time limit of {self.seconds / 60:g} minutes"
            self.stop()
        elif self.asked and now - self.asked > GRACE:
            self.kill()
        return False

    def result(self) -> dict[str, Any]:
        code = 1 if self.process is None else self.process.returncode
        found = {"exit_code": code, "seconds": round(self.ended - self.started, 2)}
        return {**found, "error": self.error} if self.error else found

    def stop(self) -> None:
        if self.process is not None and not self.asked:
            self.asked = time.perf_counter()
            self.process.terminate()

    def kill(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        if hasattr(os, "killpg"):
            os.killpg(self.process.pid, signal.SIGKILL)  # with the processes that it has started itself
        else:
            self.process.kill()


class SlurmJob:
    """A job that submitit has handed to SLURM."""

    def __init__(self, job: "submitit.Job") -> None:
        self.job, self.cancelled = job, False

    def done(self) -> bool:
        return self.cancelled or self.job.done()  # SLURM ends a cancelled job, whether or not anyone waits

    def result(self) -> dict[str, Any]:
        try:
            return self.job.result()
        except Exception as error:  # killed, out of time or of memory; one lost job does not stop the others
            lines = str(error).strip().splitlines()
            return {"exit_code": -1, "error": lines[-1] if lines else repr(error)}

    def stop(self) -> None:
        if not self.cancelled:
            self.job.cancel(check=False)  # SLURM sends SIGTERM, and SIGKILL some time later
            self.cancelled = True

    def kill(self) -> None:
        self.stop()


def stop_all(jobs: Sequence[Job], signals: Sequence[int]) -> None:
    """Stop running jobs, and return when all have ended.

    Args:
        jobs: the jobs.
        signals: the list that `stop_signals` gives. A further signal ends the jobs without delay.
    """
    received = len(signals)
    for job in jobs:
        job.stop()
    while waiting := [job for job in jobs if not job.done()]:
        if len(signals) > received:
            for job in waiting:
                job.kill()
        time.sleep(0.05)
